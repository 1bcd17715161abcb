"""What the disk tier knows about the files of its folders, and which of them goes first."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence

from lmcache.keys import ChunkKey
from lmcache.storage.eviction.base import EvictionPolicy


@dataclasses.dataclass(slots=True)
class Entry:
    """A file. folder: number of its folder. size: bytes of it. used_ns: its modification time, as far as we know."""

    folder: int
    size: int
    used_ns: int


class DiskIndex:
    """Keys to entries, in the order of an eviction policy. Thread-safe; does no I/O."""

    def __init__(self, policy: EvictionPolicy, folders: int) -> None:
        self._policy = policy
        self._entries: dict[ChunkKey, Entry] = {}
        self._known = [0] * folders
        self._leaving: set[ChunkKey] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: ChunkKey) -> Entry | None:
        return self._entries.get(key)

    def known_bytes(self, folder: int) -> int:
        """Bytes of the files that are in the index."""
        return self._known[folder]

    def add(self, key: ChunkKey, entry: Entry) -> None:
        """A file is there; in place of what was known under its key."""
        with self._lock:
            old = self._entries.get(key)
            if old is not None:
                self._known[old.folder] -= old.size
            self._leaving.discard(key)  # the file that leaves was another
            self._entries[key] = entry
            self._known[entry.folder] += entry.size
            self._policy.add(key, entry.size)

    def forget(self, key: ChunkKey, entry: Entry | None = None) -> Entry | None:
        """A file is gone; returns what was known of it. Only ``entry`` of it if given, not what was added since."""
        with self._lock:
            return self._forget(key) if entry is None or self._entries.get(key) is entry else None

    def touch(self, keys: Iterable[ChunkKey], used_ns: int) -> None:
        """Files were used, in this order."""
        with self._lock:
            for key in keys:
                if (entry := self._entries.get(key)) is not None:
                    entry.used_ns = used_ns
                    self._policy.touch(key)

    def candidates(self, folder: int, nbytes: int) -> list[tuple[ChunkKey, Entry]]:
        """Files of ``folder`` that should go first, of ``nbytes`` together or all there are.

        Nobody else is given them until ``forget``, or ``keep``, which whoever calls this calls for each of them.
        """
        chosen: list[tuple[ChunkKey, Entry]] = []
        with self._lock:
            for key in self._policy.victims():
                if nbytes <= 0:
                    break
                entry = self._entries[key]
                if entry.folder == folder and key not in self._leaving:
                    chosen.append((key, entry))
                    nbytes -= entry.size
            self._leaving.update(key for key, _ in chosen)
        return chosen

    def keep(self, key: ChunkKey, used_ns: int) -> None:
        """A candidate was used by another process, so it counts as touched instead."""
        self.touch([key], used_ns)
        with self._lock:
            self._leaving.discard(key)

    def keys_of(self, folder: int) -> Sequence[ChunkKey]:
        """The keys whose files are in ``folder``."""
        with self._lock:
            return [key for key, entry in self._entries.items() if entry.folder == folder]

    def _forget(self, key: ChunkKey) -> Entry | None:
        entry = self._entries.pop(key, None)
        self._leaving.discard(key)
        if entry is not None:
            self._known[entry.folder] -= entry.size
            self._policy.remove(key)
        return entry
