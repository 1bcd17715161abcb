"""L1: chunks in the pool, by key. A lease holds a handle of its own on each; eviction passes over what is held.

Lookups take no lock of this tier: the map is a dict, whose single operations are atomic under the GIL, and the pool
tells when eviction released a handle between the look and the share. What was looked up goes to a list, which whoever
next holds the lock plays to the policy in order; so a lookup never waits for an eviction, nor the other way round.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from lmcache import metrics
from lmcache.keys import ChunkKey, tenant_id
from lmcache.storage.eviction.base import LRU, EvictionPolicy, Place
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer

logger = logging.getLogger(__name__)

# One eviction frees at least this share of the pool, so that it does not run for every chunk.
LOW_WATERMARK = 1 / 64


class MemoryTier:
    """A map from keys to pool buffers. Thread-safe; nothing here copies bytes or blocks.

    low_watermark: share of the pool that one eviction frees at least.
    quotas: bytes that a tenant's chunks may take up, by its name; a tenant that is not named may take all.
    quota_policy: makes the order of such a tenant's own chunks, so that those of others are not gone through for it.
    demotes: chunks come in dirty; those that were not ``settled`` (written below, or tried) go last.
    """

    name = "memory"

    def __init__(
        self,
        pool: PinnedPool,
        policy: EvictionPolicy,
        *,
        low_watermark: float = LOW_WATERMARK,
        quotas: Mapping[str, int] | None = None,
        quota_policy: Callable[[], EvictionPolicy] = LRU,
        demotes: bool = False,
    ) -> None:
        self.pool = pool
        self._policy = policy
        self.reserve = int(pool.capacity * low_watermark)
        self._low_watermark = low_watermark
        self._quotas = {
            tenant_id(name): _Quota(name, nbytes, quota_policy()) for name, nbytes in (quotas or {}).items()
        }
        self._demotes = demotes
        self._dirty: set[ChunkKey] = set()
        self._clean_bytes = 0
        self._buffers: dict[ChunkKey, PoolBuffer] = {}
        self._touched: deque[Sequence[ChunkKey]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self.generation = 0
        """Goes up with every removal; a read notes it before it starts."""

    def __len__(self) -> int:
        return len(self._buffers)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._buffers

    @property
    def tenant_bytes(self) -> dict[str, int]:
        """Bytes of every tenant that has a quota."""
        return {quota.name: quota.used for quota in self._quotas.values()}

    def has_quota(self, key: ChunkKey) -> bool:
        """Whether the tenant of a chunk has a quota."""
        return self._quota_of(key) is not None

    def leading(self, keys: Sequence[ChunkKey]) -> int:
        """Length of the leading run of ``keys`` that is here."""
        buffers = self._buffers
        for count, key in enumerate(keys):
            if key not in buffers:
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
        found: list[PoolBuffer] = []
        get = self._buffers.get
        for key in keys:
            buffer = get(key)
            if buffer is None:
                break
            found.append(buffer)
        if not found:
            return found
        handles = self.pool.share_leading(found)
        self._touched.append(keys[: len(handles)])
        # Whoever holds the lock plays it when this does not: there is nothing to wait for.
        if self._lock.acquire(blocking=False):
            try:
                self._play_touches()
            finally:
                self._lock.release()
        return handles

    def insert(
        self,
        key: ChunkKey,
        buffer: PoolBuffer,
        generation: int | None = None,
        *,
        place: Place | None = None,
        settled: bool = False,
    ) -> bool:
        """Take ``buffer`` over; returns whether the chunk is here now.

        A key that is here keeps its buffer, and the new one is released. So is what was read before a removal, told by
        its ``generation``, what a tenant's quota has no room for, and whatever comes after close().
        settled: the chunk is held below too.
        """
        evicted: list[PoolBuffer] = []
        with self._lock:
            here = key in self._buffers
            if here or self._closed or generation not in (None, self.generation):
                evicted.append(buffer)
            elif (quota := self._quota_of(key)) and not self._make_room_for(quota, buffer.nbytes, evicted):
                metrics.QUOTA_REFUSED_BYTES.labels(quota.name).inc(buffer.nbytes)
                evicted.append(buffer)
            else:
                here = True
                self._play_touches()
                self._buffers[key] = buffer
                self._policy.add(key, buffer.nbytes, place)
                if quota is not None:
                    quota.policy.add(key, buffer.nbytes, place)
                    quota.count(buffer.nbytes)
                if self._demotes and not settled:
                    self._dirty.add(key)
                else:
                    self._clean_bytes += buffer.nbytes
        self.pool.release_all(evicted)
        return here

    def allocate(self, nbytes: int) -> PoolBuffer | None:
        """A buffer, evicting what nobody holds; None when there is no room even so."""
        while (buffer := self.pool.allocate(nbytes)) is None:
            if nbytes > self.pool.largest or not self._evict(nbytes):
                return None
        return buffer

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        """Forget chunks; whoever holds one keeps it. Returns how many were here."""
        with self._lock:
            self.generation += 1
            gone = [self._forget(key) for key in keys if key in self._buffers]
        self.pool.release_all(gone)
        return len(gone)

    def clear(self, matches: Callable[[ChunkKey], bool] | None = None) -> int:
        """Forget the chunks whose key ``matches``, or all."""
        with self._lock:
            self.generation += 1
            gone = [self._forget(key) for key in list(self._buffers) if matches is None or matches(key)]
        self.pool.release_all(gone)
        return len(gone)

    def close(self) -> None:
        """Forget everything, and keep nothing that still comes. The pool is its owner's to close."""
        with self._lock:
            self._closed = True
        self.clear()

    def to_write(self, most_bytes: int | None = None) -> list[tuple[ChunkKey, PoolBuffer]]:
        """Handles on dirty chunks that should be written below, first those that will be evicted first.

        most_bytes: about how much; None: all of them. Empty while what is free or settled covers the reserve.
        """
        if most_bytes is not None and self.pool.free_bytes + self._clean_bytes >= self.reserve:
            return []
        with self._lock:
            self._play_touches()
            found, nbytes = [], 0
            for key in self._policy.victims():
                if key in self._dirty and not (buffer := self._buffers[key]).shared:
                    found.append((key, buffer))
                    nbytes += buffer.nbytes
                    if most_bytes is not None and nbytes >= most_bytes:
                        break
            handles = self.pool.share_leading([buffer for _, buffer in found])
        return [(key, handle) for (key, _), handle in zip(found, handles, strict=True)]

    def settle(self, keys: Sequence[ChunkKey], held: bool) -> None:
        """These were written below, or (not ``held``) cannot be: they may be evicted."""
        with self._lock:
            for key in keys:
                if key in self._dirty:
                    self._dirty.discard(key)
                    self._clean_bytes += self._buffers[key].nbytes

    def _forget(self, key: ChunkKey) -> PoolBuffer:
        """Take a chunk out of every record (with the lock held); its handle is the caller's to release."""
        buffer = self._buffers.pop(key)
        self._policy.remove(key)
        if key in self._dirty:
            self._dirty.discard(key)
        else:
            self._clean_bytes -= buffer.nbytes
        if (quota := self._quota_of(key)) is not None:
            quota.policy.remove(key)
            quota.count(-buffer.nbytes)
        return buffer

    def _quota_of(self, key: ChunkKey) -> _Quota | None:
        # Where there are no quotas, nobody pays for them.
        return self._quotas.get(key.tenant) if self._quotas else None

    def _play_touches(self) -> None:
        while self._touched:
            # Last first: the head of a prefix, without which the rest is worth nothing, is evicted last.
            for key in reversed(self._touched.popleft()):
                self._policy.touch(key)
                if quota := self._quota_of(key):
                    quota.policy.touch(key)

    def _evict(self, nbytes: int) -> int:
        """Make room for ``nbytes`` and some more; evicts nothing when that cannot be had beside what is held."""
        goal = max(nbytes - self.pool.free_bytes, self.reserve)  # fragmented: asked again
        with self._lock:
            self._play_touches()
            victims, freed = self._unheld(self._policy, goal, lambda key: key not in self._dirty)
            if freed + self.pool.free_bytes < nbytes and self._dirty:
                # Not written below in time: they are lost, for who allocates does not wait for a disk.
                dirty, lost = self._unheld(self._policy, nbytes - freed, self._dirty.__contains__)
                if freed + lost + self.pool.free_bytes >= nbytes:
                    metrics.EVICTED_UNWRITTEN_CHUNKS.inc(len(dirty))
                victims, freed = victims + dirty, freed + lost
            if freed + self.pool.free_bytes < nbytes:
                return 0
            gone = [self._forget(key) for key in victims]
        self.pool.release_all(gone)
        metrics.EVICTED_CHUNKS.labels(self.name).inc(len(gone))
        return len(gone)

    def _unheld(
        self, policy: EvictionPolicy, goal: int, wanted: Callable[[ChunkKey], bool]
    ) -> tuple[list[ChunkKey], int]:
        """Chunks that may go, first those that should, until they make ``goal`` bytes; and their bytes."""
        victims, nbytes = [], 0
        for key in policy.victims():
            if wanted(key) and not (buffer := self._buffers[key]).shared:
                victims.append(key)
                nbytes += buffer.nbytes
                if nbytes >= goal:
                    break
        return victims, nbytes

    def _make_room_for(self, quota: _Quota, nbytes: int, evicted: list[PoolBuffer]) -> bool:
        """Evict a tenant's own chunks until ``nbytes`` more fit its quota; False, evicting none, when they cannot."""
        over = quota.used + nbytes - quota.nbytes
        if over <= 0:
            return True
        if nbytes > quota.nbytes:
            quota.warn(nbytes)
            return False
        self._play_touches()
        goal = max(over, int(quota.nbytes * self._low_watermark))
        victims, freed = self._unheld(quota.policy, goal, lambda key: True)
        if freed < over:
            return False
        metrics.EVICTED_UNWRITTEN_CHUNKS.inc(len(self._dirty.intersection(victims)))
        evicted += [self._forget(key) for key in victims]
        metrics.EVICTED_CHUNKS.labels(self.name).inc(len(victims))
        return True


class _Quota:
    """What memory may keep of one tenant, and what it does."""

    def __init__(self, name: str, nbytes: int, policy: EvictionPolicy) -> None:
        self.name = name
        self.nbytes = nbytes
        self.policy = policy
        self.used = 0
        self._warned = False
        self._gauge = metrics.TENANT_MEMORY_BYTES.labels(name)

    def count(self, nbytes: int) -> None:
        """So much more is kept."""
        self.used += nbytes
        self._gauge.inc(nbytes)  # of all managers of the process

    def warn(self, nbytes: int) -> None:
        """A chunk is larger than the quota; said once."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "quotas: the quota of %r, %d bytes, is less than a chunk of %d: memory keeps no such chunk of it",
                self.name,
                self.nbytes,
                nbytes,
            )
