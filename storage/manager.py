"""The tiers in order: write to all, read from the first that has it, promote to memory.

put      L1 at once ──> bounded queue of every lower tier ──> its writing thread
acquire  L1 pins what it has; the rest is read tier by tier into pool buffers, verified, handed to L1 and pinned
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from lmcache import metrics
from lmcache.config import LMCacheConfig
from lmcache.errors import ClosedError
from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.lease import Lease
from lmcache.storage.memory import MemoryTier
from lmcache.storage.pool import PinnedPool, PoolBuffer
from lmcache.storage.registry import EVICTION_POLICIES, build_tiers
from lmcache.storage.tier import LowerTier

logger = logging.getLogger(__name__)

READ_BATCH_BYTES, READ_BATCH_CHUNKS = 16 << 20, 256
# How long a question to a tier's index may take; it is asked on paths where something waits.
ASK_TIMEOUT_S = 1.0


class StorageManager:
    """All tiers of one process. Thread-safe. Nothing it does waits without a deadline, and no tier's failure raises."""

    def __init__(
        self, config: LMCacheConfig, *, pin: bool = False, tiers: Sequence[StorageBackend] | None = None
    ) -> None:
        self._config = config
        policy = EVICTION_POLICIES.get(config.memory.eviction)()
        backends = build_tiers(config.tiers) if tiers is None else tiers
        self.pool = PinnedPool(config.memory.capacity, pin=pin, huge_pages=config.memory.huge_pages)
        self._memory = MemoryTier(self.pool, policy)
        # Queued chunks cannot be evicted, so they may not take more than half of memory.
        queue_bytes = min(config.write_queue, config.memory.capacity // 2)
        self._tiers = [LowerTier(backend, config, queue_bytes) for backend in backends]
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._closed = False

    def allocate(self, nbytes: int) -> PoolBuffer | None:
        """A buffer, evicting chunks that nobody holds; None when there is no room. Never blocks."""
        buffer = self._memory.allocate(nbytes)
        if buffer is None and self._sweep():
            buffer = self._memory.allocate(nbytes)
        metrics.MEMORY_USED_BYTES.set(self.pool.used_bytes)
        return buffer

    def put(self, key: ChunkKey, buffer: PoolBuffer, on_written: Callable[[bool], None] | None = None) -> None:
        """Store a chunk, taking the handle over. Visible in L1 at once; lower tiers follow in the background.

        on_written: called once, from whatever thread: True when a lower tier has the chunk, False when none will.
        """
        report = None if on_written is None else _first_success(on_written, len(self._tiers))
        for tier in self._tiers:
            tier.write(key, buffer.share(), report)
        self._memory.insert(key, buffer)
        if on_written is not None and not self._tiers:
            on_written(False)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Payload bytes of each of the leading run of ``keys`` that is in some tier."""
        sizes: list[int] = []
        while len(sizes) < len(keys):
            rest = keys[len(sizes) :]
            found = self._memory.sizes(rest) or self._sizes_below(rest)
            if not found:
                break
            sizes += found
        return sizes

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        """Length of the leading run of ``keys`` that is in some tier."""
        count = 0
        while count < len(keys):
            found = self._memory.leading(keys[count:]) or self._leading_below(keys[count:])
            if not found:
                break
            count += found
        return count

    def acquire(
        self,
        keys: Sequence[ChunkKey],
        sizes: Sequence[int | range],
        on_done: Callable[[Lease], None] | None = None,
        timeout_s: float | None = None,
    ) -> Lease:
        """A lease on the longest prefix of ``keys`` that can be had.

        sizes: payload bytes of each, or the range that they are in; a chunk of another size is damaged.

        Done on return when nothing has to be read. At ``timeout_s`` (``read_timeout_s``) it is done with what it has.
        on_done: called once, from whatever thread ends it, without a lock held.
        """
        if self._closed:
            raise ClosedError("the storage manager is closed")
        self._sweep()
        lease = Lease(keys, sizes, self._config.lease_timeout_s, on_done)
        with self._lock:
            self._leases.add(lease)
        lease._extend(self._memory.pin(keys))
        if lease.ready == len(keys) or not self._tiers:
            lease._finish()
        else:
            try:
                self._read_below(lease, timeout_s or self._config.read_timeout_s)
            except BaseException:
                lease.close()
                raise
        return lease

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        """Forget chunks, in every tier that answers in time. Returns the largest number that one tier had."""
        counts = [self._memory.remove(keys)]
        counts += [tier.remove(keys, ASK_TIMEOUT_S) for tier in self._tiers]
        # Once more, for what a read found in a tier before that tier was asked.
        self._memory.remove(keys)
        return max(counts)

    def clear(self, fingerprint: bytes | None = None) -> int:
        """Forget the chunks of one KVFormat, or all, in every tier. Returns the largest number that one tier had."""
        counts = [self._memory.clear(fingerprint)]
        counts += [tier.clear(fingerprint, self._config.read_timeout_s) for tier in self._tiers]
        # Once more, for what a read found in a tier before that tier was cleared.
        self._memory.clear(fingerprint)
        return max(counts)

    def flush(self, timeout_s: float) -> bool:
        """Wait until every queued write is done; False when some are not by then."""
        deadline = time.monotonic() + timeout_s
        return all([tier.flush(max(0.0, deadline - time.monotonic())) for tier in self._tiers])

    def close(self) -> None:
        """Write what is queued, within ``close_timeout_s``, and let go of everything. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if not self.flush(self._config.close_timeout_s):
            logger.warning("not everything was written within %s s; the rest is lost", self._config.close_timeout_s)
        for tier in self._tiers:
            tier.close()
        for lease in list(self._leases):
            lease.close()
        self._memory.close()
        self.pool.close()

    def stats(self) -> dict[str, int]:
        """What is where, now."""
        with self._lock:
            self._leases = {lease for lease in self._leases if not lease.closed}
        return {
            "chunks": len(self._memory),
            "used_bytes": self.pool.used_bytes,
            "free_bytes": self.pool.free_bytes,
            "leases": len(self._leases),
            "pending_write_bytes": sum(tier.pending_bytes for tier in self._tiers),
            "open_breakers": sum(tier.breaker.is_open for tier in self._tiers),
        }

    def _leading_below(self, keys: Sequence[ChunkKey]) -> int:
        for tier in self._tiers:
            if found := tier.ask(lambda: tier.backend.contains(keys), 0, ASK_TIMEOUT_S):  # noqa: B023
                return found
        return 0

    def _sizes_below(self, keys: Sequence[ChunkKey]) -> list[int]:
        nothing: list[int] = []
        for tier in self._tiers:
            if found := tier.ask(lambda: tier.backend.sizes(keys), nothing, ASK_TIMEOUT_S):  # noqa: B023
                return found
        return nothing

    def _read_below(self, lease: Lease, timeout_s: float) -> None:
        reading: list[LowerTier] = []

        def deadline() -> None:
            if not lease.done:
                for tier in reading[-1:]:
                    tier.failed(f"a read did not end within {timeout_s} s")
                lease._finish()

        timer = threading.Timer(timeout_s, deadline)
        timer.daemon = True
        timer.start()

        def advance(index: int) -> None:
            """Go on with tier ``index`` at the first key that is not held yet."""
            if lease.done or index >= len(self._tiers):
                timer.cancel()
                lease._finish()
                return
            tier = self._tiers[index]
            if not tier.breaker.allows():
                advance(index + 1)
                return
            tier.read(lambda: step(index))

        def step(index: int) -> None:
            # A tier answers for the time that it works, not for the time that its queue is long.
            reading.append(self._tiers[index])
            before = lease.ready
            if not lease.done:
                self._read_batch(lease, self._tiers[index])
                lease._extend(self._memory.pin(lease.keys[lease.ready :]))
            if lease.ready == len(lease.keys) or lease.closed:
                index = len(self._tiers)
            elif lease.ready > before:
                index = 0
            else:
                index += 1
            advance(index)

        advance(0)

    def _read_batch(self, lease: Lease, tier: LowerTier) -> None:
        """Read the next keys of ``lease`` from ``tier`` into L1, and hold them."""
        generation, first = self._memory.generation, lease.ready
        nbytes = 0
        keys = lease.keys[first : first + READ_BATCH_CHUNKS]
        nothing: list[int] = []
        sizes = tier.guarded(lambda: tier.backend.sizes(keys), nothing, transfers=False)
        buffers: list[PoolBuffer] = []
        for index, size in enumerate(sizes):
            if not lease.fits(first + index, size):
                metrics.CORRUPT_CHUNKS.labels(tier.name).inc()
                logger.warning("removed %s from tier %s: a chunk of %d bytes", keys[index], tier.name, size)
                tier.guarded(lambda: tier.backend.remove(keys[index : index + 1]), 0)  # noqa: B023
                break
            if buffers and nbytes + size > READ_BATCH_BYTES:
                break
            nbytes += size
            buffer = self.allocate(size)
            if buffer is None:
                break
            buffers.append(buffer)
        keys = keys[: len(buffers)]
        got = tier.guarded(lambda: tier.backend.get(keys, buffers), 0) if buffers else 0
        for buffer in buffers[got:]:
            buffer.release()
        if not got:
            return
        metrics.TIER_HITS.labels(tier.name).inc(got)
        lease._extend([buffer.share() for buffer in buffers[:got]])
        for key, buffer in zip(keys, buffers[:got], strict=False):
            self._memory.insert(key, buffer, generation)

    def _sweep(self) -> int:
        """Close leases that ran out and forget closed ones; returns how many ran out."""
        now = time.monotonic()
        with self._lock:
            expired = [lease for lease in self._leases if not lease.closed and now > lease.expires_at]
            self._leases = {lease for lease in self._leases if not lease.closed and now <= lease.expires_at}
        for lease in expired:
            logger.warning("a lease on %d chunks ran out", lease.ready)
            lease.close()
        return len(expired)


def _first_success(report: Callable[[bool], None], calls: int) -> Callable[[bool], None]:
    """What is called ``calls`` times, and reports once: at the first True, or when all were False."""
    lock = threading.Lock()
    left, reported = calls, False

    def one(ok: bool) -> None:
        nonlocal left, reported
        with lock:
            left -= 1
            if reported or not (ok or left == 0):
                return
            reported = True
        report(ok)

    return one
