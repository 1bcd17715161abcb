"""L1: chunks in the pool, by key. Whoever needs a chunk takes a handle of its own, so eviction cannot pull it away."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lmcache import metrics
from lmcache.keys import ChunkKey
from lmcache.storage.eviction import EvictionPolicy
from lmcache.storage.pool import PinnedPool, PoolBuffer

# One eviction frees at least this share of the pool, so that it does not run for every chunk.
LOW_WATERMARK = 1 / 64


class MemoryTier:
    """A map from keys to pool buffers. Thread-safe; nothing here copies bytes or blocks."""

    name = "memory"

    def __init__(self, pool: PinnedPool, policy: EvictionPolicy) -> None:
        self.pool = pool
        self._policy = policy
        self._buffers: dict[ChunkKey, PoolBuffer] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.generation = 0
        """Goes up with every clear; a read notes it before it starts."""

    def __len__(self) -> int:
        return len(self._buffers)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._buffers

    def leading(self, keys: Sequence[ChunkKey]) -> int:
        """Length of the leading run of ``keys`` that is here."""
        for count, key in enumerate(keys):
            if key not in self._buffers:
                return count
        return len(keys)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Payload bytes of each of that run."""
        sizes: list[int] = []
        for key in keys:
            if (buffer := self._buffers.get(key)) is None:
                break
            sizes.append(buffer.nbytes)
        return sizes

    def pin(self, keys: Sequence[ChunkKey]) -> list[PoolBuffer]:
        """Handles on the leading run of ``keys`` that is here; the caller releases them."""
        handles: list[PoolBuffer] = []
        with self._lock:
            for key in keys:
                buffer = self._buffers.get(key)
                if buffer is None:
                    break
                handles.append(buffer.share())
            # Last first: the head of a prefix, without which the rest is worth nothing, is evicted last.
            for key in reversed(keys[: len(handles)]):
                self._policy.touch(key)
        return handles

    def insert(self, key: ChunkKey, buffer: PoolBuffer, generation: int | None = None) -> None:
        """Take ``buffer`` over. A key that is here keeps its buffer, and the new one is released.

        So is what was read before a clear, told by its ``generation``, and whatever comes after close().
        """
        with self._lock:
            if key in self._buffers or self._closed or generation not in (None, self.generation):
                buffer.release()
                return
            self._buffers[key] = buffer
            self._policy.add(key, buffer.nbytes)

    def allocate(self, nbytes: int) -> PoolBuffer | None:
        """A buffer, evicting what nobody holds; None when there is no room even so."""
        if nbytes > self.pool.capacity:
            return None
        while (buffer := self.pool.allocate(nbytes)) is None:
            if not self._evict(nbytes):
                return None
        return buffer

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        """Forget chunks; whoever holds one keeps it. Returns how many were here."""
        count = 0
        with self._lock:
            for key in keys:
                if (buffer := self._buffers.pop(key, None)) is not None:
                    self._policy.remove(key)
                    buffer.release()
                    count += 1
        return count

    def clear(self, fingerprint: bytes | None = None) -> int:
        """Forget the chunks of one format, or all."""
        with self._lock:
            self.generation += 1
            keys = [key for key in self._buffers if fingerprint in (None, key.fingerprint)]
            for key in keys:
                self._policy.remove(key)
                self._buffers.pop(key).release()
        return len(keys)

    def close(self) -> None:
        """Forget everything, and keep nothing that still comes. The pool is its owner's to close."""
        with self._lock:
            self._closed = True
        self.clear()

    def _evict(self, nbytes: int) -> int:
        """Make room for ``nbytes`` and some more; evicts nothing when that cannot be had beside what is held."""
        goal = max(nbytes, int(self.pool.capacity * LOW_WATERMARK))
        with self._lock:
            victims, freed = [], 0
            for key in self._policy.victims():
                buffer = self._buffers[key]
                if not buffer.shared:
                    victims.append(key)
                    freed += buffer.nbytes
                    if freed >= goal:
                        break
            if freed + self.pool.free_bytes < nbytes:
                return 0
            for key in victims:
                self._policy.remove(key)
                self._buffers.pop(key).release()
        metrics.EVICTED_CHUNKS.labels(self.name).inc(len(victims))
        return len(victims)
