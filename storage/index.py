"""What is known here of chunks that lie elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from lmcache.keys import ChunkKey


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
