"""Indexes, in this process, of chunks that lie elsewhere: their sizes, and the order in which they are evicted."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Sequence

from lmcache.keys import ChunkKey
from lmcache.storage.eviction.base import EvictionPolicy


@dataclasses.dataclass(slots=True)
class Entry:
    """A chunk. folder: number of the one that it lies in, where there are several. size: bytes, header included.

    used_ns: when it was used last (the modification time of its file), as far as we know.
    """

    folder: int
    size: int
    used_ns: int = 0


class ChunkIndex:
    """Keys to entries, in the order of an eviction policy. Thread-safe; does no I/O.

    capacity: of ``reserve``. Of a place that processes share, disk/account.py counts the bytes: its backend asks for
        ``candidates`` instead.
    """

    def __init__(self, policy: EvictionPolicy, folders: int = 1, *, capacity: int = 0) -> None:
        self._policy = policy
        self._capacity = capacity
        self._reserved = 0
        self._entries: dict[ChunkKey, Entry] = {}
        self._known = [0] * folders
        self._leaving: set[ChunkKey] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: ChunkKey) -> Entry | None:
        return self._entries.get(key)

    def size(self, key: ChunkKey) -> int:
        """0 for a key that is not known."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.size

    def known_bytes(self, folder: int) -> int:
        """Bytes of the chunks that are in the index."""
        return self._known[folder]

    @property
    def used_bytes(self) -> int:
        """Of all of them, and what is reserved."""
        return sum(self._known) + self._reserved

    def add(self, key: ChunkKey, entry: Entry, *, reserved: bool = False) -> None:
        """A chunk is there; in place of what was known under its key. reserved: its bytes were, and are no more."""
        with self._lock:
            self._reserved -= entry.size if reserved else 0
            old = self._entries.get(key)
            if old is not None:
                self._known[old.folder] -= old.size
            self._leaving.discard(key)  # the chunk that leaves was another
            self._entries[key] = entry
            self._known[entry.folder] += entry.size
            self._policy.add(key, entry.size)

    def forget(self, key: ChunkKey, entry: Entry | None = None) -> Entry | None:
        """A chunk is gone; returns what was known of it. Only ``entry`` of it if given, not what was added since."""
        with self._lock:
            return self._forget(key) if entry is None or self._entries.get(key) is entry else None

    def touch(self, keys: Iterable[ChunkKey], used_ns: int = 0) -> None:
        """Chunks were used, in this order."""
        with self._lock:
            for key in keys:
                if (entry := self._entries.get(key)) is not None:
                    entry.used_ns = used_ns
                    self._policy.touch(key)

    def candidates(self, folder: int, nbytes: int) -> list[tuple[ChunkKey, Entry]]:
        """Chunks of ``folder`` that should go first, of ``nbytes`` together or all there are.

        No other call returns them again before ``forget`` or ``keep``: the caller calls one of these for each.
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

    def reserve(self, size: int) -> list[ChunkKey] | None:
        """Make room, by forgetting chunks; the keys of those, or None when there can be no room now."""
        with self._lock:
            if size > self._capacity:
                return None
            victims: list[ChunkKey] = []
            free = self._capacity - self.used_bytes
            for key in self._policy.victims():
                if free >= size:
                    break
                victims.append(key)
                free += self._entries[key].size
            if free < size:
                return None  # the rest is reserved by other writers
            for key in victims:
                self._forget(key)
            self._reserved += size
        return victims

    def unreserve(self, size: int) -> None:
        """What was to be written is not there."""
        with self._lock:
            self._reserved -= size

    def keep(self, key: ChunkKey, used_ns: int) -> None:
        """A candidate was used by another process, so it counts as touched instead."""
        self.touch([key], used_ns)
        with self._lock:
            self._leaving.discard(key)

    def keys_of(self, folder: int) -> Sequence[ChunkKey]:
        """The keys whose chunks are in ``folder``."""
        with self._lock:
            return [key for key, entry in self._entries.items() if entry.folder == folder]

    def _forget(self, key: ChunkKey) -> Entry | None:
        entry = self._entries.pop(key, None)
        self._leaving.discard(key)
        if entry is not None:
            self._known[entry.folder] -= entry.size
            self._policy.remove(key)
        return entry


class RecentSizes:
    """Payload bytes of chunks that were seen lately. At most ``entries``, each for ``ttl_s`` seconds. Thread-safe.

    It may name a chunk that another process has removed since: reading that is a miss.
    """

    def __init__(self, entries: int, ttl_s: float) -> None:
        self._entries = entries
        self._ttl_s = ttl_s
        self._known: dict[ChunkKey, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def among(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, int]:
        """What is known of ``keys``."""
        now, known = time.monotonic(), self._known
        with self._lock:
            found = {key: entry for key in keys if (entry := known.get(key)) is not None}
        return {key: size for key, (size, until) in found.items() if until > now}

    def add(self, key: ChunkKey, size: int) -> None:
        until = time.monotonic() + self._ttl_s
        with self._lock:
            self._known.pop(key, None)
            self._known[key] = (size, until)
            if len(self._known) > self._entries:
                del self._known[next(iter(self._known))]

    def drop(self, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            for key in keys:
                self._known.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._known.clear()
