"""The tiers in order: write to all, read from the first that has it, promote to memory.

put      L1 at once ──> bounded queue of every lower tier ──> its writing thread     (or before eviction: demotion)
acquire  L1 pins what it has; the rest is read tier by tier into pool buffers, verified, handed to L1 and pinned
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lmcache import metrics
from lmcache.config import LMCacheConfig
from lmcache.errors import ClosedError, ConfigError
from lmcache.forks import Home
from lmcache.keys import ChunkKey, tenant_id
from lmcache.storage.base import StorageBackend
from lmcache.storage.eviction.base import Place
from lmcache.storage.flow.health import TierHealth
from lmcache.storage.flow.joining import Ends, Joining
from lmcache.storage.flow.owed_files import FOLDER, OwedFiles
from lmcache.storage.flow.promotion import promotion
from lmcache.storage.flow.tier import LowerTier
from lmcache.storage.flow.transfers import Transfers
from lmcache.storage.flow.writing import Settled
from lmcache.storage.lease import Lease, Prefetch
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer
from lmcache.storage.memory.tier import MemoryTier
from lmcache.storage.registry import EVICTION_POLICIES, build_tiers, check_policy, place_of
from lmcache.storage.run.deadlines import Deadline, Deadlines
from lmcache.storage.selection import Selection

logger = logging.getLogger(__name__)

# How long a question to a tier's index may take; it is asked on paths where something waits.
ASK_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class StorageHealth:
    """How storage fares, tier by tier."""

    used_bytes: int
    free_bytes: int
    chunks: int
    leases: int
    frozen: bool
    tenant_bytes: dict[str, int]
    """Of every tenant that has a quota."""
    tiers: tuple[TierHealth, ...]


class StorageManager:
    """All tiers of one process. Thread-safe. Every wait has a deadline; a tier that fails is a miss and does not raise.

    A key may stand in a batch more than once, and counts as in ``StorageBackend``. After ``close()`` lookups find
    nothing and ``put`` drops what it is given, as stores may still be under way; ``acquire``, ``prefetch``, ``remove``,
    ``clear``, ``copy`` and ``move`` raise ClosedError.
    """

    def __init__(
        self, config: LMCacheConfig, *, pin: bool = False, tiers: Sequence[StorageBackend] | None = None
    ) -> None:
        self._config = config
        self._home = Home("this storage")
        memory = config.memory
        check_policy(memory.eviction, "memory.eviction")
        policy = EVICTION_POLICIES.get(memory.eviction)
        backends = build_tiers(config.tiers) if tiers is None else tiers
        self._demotes = config.demotion == "on_evict" and bool(backends)
        self.pool = PinnedPool(
            memory.capacity,
            pin=pin,
            huge_pages=memory.huge_pages,
            numa_node=memory.numa_node,
            allocator=memory.allocator,
            slot=memory.slot,
        )
        pool = weakref.ref(self.pool)
        metrics.MEMORY_USED_BYTES.set_function(lambda: held.used_bytes if (held := pool()) else 0)
        self._memory = MemoryTier(
            self.pool,
            policy(),
            low_watermark=memory.low_watermark,
            quotas=config.quotas,
            quota_policy=policy,
            demotes=self._demotes,
        )
        self._deadlines = Deadlines()
        # Queued chunks cannot be evicted, so they may not take more than half of memory.
        self.write_queue_bytes = min(config.write_queue, memory.capacity // 2)
        """Bytes that may wait to be written to one lower tier; a chunk larger than that is not written."""
        self._tiers: list[LowerTier] = []
        for backend in backends:
            count = sum(tier.backend.name == backend.name for tier in self._tiers)
            name = f"{backend.name}-{count + 1}" if count else backend.name
            # Tiers that were opened elsewhere have no place that a later process would know again.
            files = _owed_files(config, len(self._tiers)) if tiers is None else None
            self._tiers.append(LowerTier(backend, config, self.write_queue_bytes, self._deadlines, name, files))
        self._transfers = Transfers(self._memory, self._tiers, config.read_batch)
        self._joining = Joining(
            self._tiers, self._memory, self._deadlines, batch_bytes=config.read_batch, most=config.lookup_queue
        )
        self._promotes = promotion(config.promote)
        self._leases: dict[Lease, Deadline | None] = {}
        """Each with when it is looked at next."""
        self._lock = threading.Lock()
        self._frozen = False
        self._closed = False

    @property
    def read_timeout_s(self) -> float:
        """How long reads from lower tiers may take where nobody says otherwise."""
        return self._config.read_timeout_s

    def allocate(self, nbytes: int, timeout_s: float = 0.0) -> PoolBuffer | None:
        """A buffer, evicting chunks that nobody holds; None when there is no room, or storage is frozen.

        timeout_s: how long to wait for leases and writes to end; by default not at all.
        """
        self._home.check()
        ends_at = time.monotonic() + timeout_s
        buffer = None
        while not self._frozen:
            seen = self.pool.releases
            buffer = self._memory.allocate(nbytes)
            if buffer is not None or nbytes > self.pool.largest:
                break
            left = ends_at - time.monotonic()
            if not self._close_expired() and (left <= 0 or not self.pool.wait_released(seen, left)):
                break
        return buffer

    def put(
        self,
        key: ChunkKey,
        buffer: PoolBuffer,
        place: Place | None = None,
        *,
        on_written: Callable[[bool], None] | None = None,
    ) -> None:
        """Store a chunk, taking the handle over. Visible in L1 at once; lower tiers follow in the background.

        place: where it stands in its chain, for eviction policies that care.
        Memory keeps no more of a tenant than its quota; what that has no room for goes to lower tiers only.
        on_written: called once, from whatever thread: True when a lower tier has the chunk, False when none will.
        Such a chunk is written now, also where writing waits for demotion.
        """
        self._home.check()
        if self._frozen or (on_written is not None and not self._tiers):
            if self._frozen:
                buffer.release()
            else:
                self._memory.insert(key, buffer, place=place)
            if on_written is not None:
                on_written(False)
            return
        # What a quota may turn out at any time is written at once, also where other chunks wait for demotion.
        at_once = self._memory.has_quota(key)
        if self._demotes and on_written is None and not at_once:
            self._memory.insert(key, buffer, place=place)
            self._write_ahead()
            return
        report = None if on_written is None else _first_success(on_written, len(self._tiers))
        for tier in self._tiers:
            if not tier.writes.put(key, buffer.share(), settled=report) and report is not None:
                report([key], False)
        self._memory.insert(key, buffer, place=place, settled=at_once)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Payload bytes of each of the leading run of ``keys`` that is in some tier."""
        self._home.check()
        sizes: list[int] = []
        while len(sizes) < len(keys):
            rest = keys[len(sizes) :]
            found = self._memory.sizes(rest) or self._sizes_below(rest)
            if not found:
                break
            sizes += found
        return sizes

    def contains(self, keys: Sequence[ChunkKey], *, below: bool = True) -> int:
        """Length of the leading run of ``keys`` that is in some tier.

        below: also ask the tiers below memory, and wait for each for up to a second. The thread that runs the model
        asks without, and has its answer at once.
        """
        self._home.check()
        if not below:
            return self._memory.leading(keys)
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
        *,
        hold_s: float | None = None,
        ends: Ends | None = None,
    ) -> Lease:
        """A lease on the longest prefix of ``keys`` that can be had. Asks no tier itself, so it returns at once.

        sizes: payload bytes of each, or the range that they are in; a chunk of another size is damaged.

        Done on return when nothing has to be read. At ``timeout_s`` (``read_timeout_s``) it is done with what it has.
        Chunks that another lease is having read are waited for, not read again.
        on_done: called once, from whatever thread ends it, without a lock held; it must not block.
        ends: given how many of ``keys`` are held, the keys and sizes of which one may be held behind them (the first
        that can be had; ``Lease.end`` says which). Asked once no more of ``keys`` can be had.
        hold_s: how long it holds them once it is done, unless it is renewed (``lease_timeout_s``).
        """
        return self._acquire(keys, sizes, on_done, timeout_s, hold_s, self._promotes, ends)

    def prefetch(
        self, keys: Sequence[ChunkKey], sizes: Sequence[int | range], timeout_s: float | None = None
    ) -> Prefetch:
        """Bring the longest prefix of ``keys`` into memory in the background, whatever ``promote`` says."""
        always = promotion("always")
        return Prefetch(lambda on_done: self._acquire(keys, sizes, on_done, timeout_s, None, always, join=False))

    def remove(self, keys: Sequence[ChunkKey], *, tier: str | None = None, wait: bool = True) -> int:
        """Forget chunks, in every tier that answers in time, or in the one of that name.

        wait: for lower tiers; without, they forget them in the background.
        Returns the largest number that one tier had (without ``wait``: that memory had).
        """
        self._check_open()
        counts = [self._memory.remove(keys)] if self._means_memory(tier) else []
        if not wait:
            for each in self._lower(tier):
                each.remove_soon(keys)
            if tier is None:
                self._joining.cancel(set(keys).__contains__)
            return max(counts, default=0)
        if tier is None:
            self._joining.cancel(set(keys).__contains__)
        counts += [each.remove(keys, ASK_TIMEOUT_S) for each in self._lower(tier)]
        if self._means_memory(tier):
            # Once more, for what a read found in a tier before that tier was asked.
            self._memory.remove(keys)
        return max(counts)

    def clear(
        self, fingerprint: bytes | None = None, *, tenant: str | None = None, tier: str | None = None, wait: bool = True
    ) -> int:
        """Forget the chunks of one KVFormat, of one tenant, or all; in every tier, or in the one of that name.

        tenant: its name (see ``lmcache.keys``); "": requests that name none. A place that cannot list its keys loses
        the other tenants of ``fingerprint`` too. Returns the largest number that one tier had.

        wait: for lower tiers, up to ``read_timeout_s`` each; without, this returns at once, with what memory had, and
        they are cleared in the background. Either way nothing of it is read any more, also after a restart, and what is
        put from now on is kept.
        """
        selection = Selection(fingerprint, None if tenant is None else tenant_id(tenant))
        return self.clear_selected(selection, tier=tier, wait=wait)

    def clear_selected(self, selection: Selection, *, tier: str | None = None, wait: bool = True) -> int:
        """The same, for who knows a tenant by what keys have of it."""
        self._check_open()
        if not wait:
            for each in self._lower(tier):
                each.clear_soon(selection)
            self._joining.cancel(selection.matches)
            return self._memory.clear(selection.matches) if self._means_memory(tier) else 0
        counts = [self._memory.clear(selection.matches)] if self._means_memory(tier) else []
        if self._means_memory(tier):
            self._joining.cancel(selection.matches)
        counts += [each.clear(selection, self._config.read_timeout_s) for each in self._lower(tier)]
        if self._means_memory(tier):
            # Once more, for what a read found in a tier before that tier was cleared.
            self._memory.clear(selection.matches)
        return max(counts)

    def copy(self, keys: Sequence[ChunkKey], source: str, target: str, timeout_s: float | None = None) -> int:
        """Copy what tier ``source`` has of ``keys`` to tier ``target`` ("memory" or a backend's name); returns how many
        are known to be there by ``timeout_s`` (``read_timeout_s``)."""
        self._check_open()
        return len(self._transfers.copy(keys, source, target, timeout_s or self._config.read_timeout_s))

    def move(self, keys: Sequence[ChunkKey], source: str, target: str, timeout_s: float | None = None) -> int:
        """The same, and ``source`` forgets what was copied."""
        self._check_open()
        limit_s = timeout_s or self._config.read_timeout_s
        return len(self._transfers.copy(keys, source, target, limit_s, forget=True))

    def freeze(self) -> None:
        """Store nothing from now on: no buffer is given, what is put is let go of. Reads go on."""
        self._frozen = True

    def thaw(self) -> None:
        """Store again."""
        self._frozen = self._closed

    def flush(self, timeout_s: float) -> bool:
        """Wait until every queued write is done; False when some are not by then."""
        self._home.check()
        deadline = time.monotonic() + timeout_s
        return all([tier.writes.flush(max(0.0, deadline - time.monotonic())) for tier in self._tiers])

    def close(self) -> None:
        """Write what is queued, within ``close_timeout_s``, and let go of everything. Idempotent.

        In a child of the process that opened it, by fork, this does nothing, and everything else is a ClosedError.
        """
        if self._home.left:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = self._frozen = True
        ends_at = time.monotonic() + self._config.close_timeout_s
        if self._demotes:
            for key, buffer in self._memory.to_write():
                self._tiers[0].writes.put(key, buffer, wait_until=ends_at)
        if not self.flush(max(0.0, ends_at - time.monotonic())):
            logger.warning("not everything was written within %s s; the rest is lost", self._config.close_timeout_s)
        for tier in self._tiers:
            tier.close()
        for lease in list(self._leases):
            lease.close()
        self._joining.cancel(lambda key: True)
        self._deadlines.close()
        self._memory.close()
        self.pool.close()

    def stats(self) -> dict[str, int]:
        """What is where, now."""
        return {
            "chunks": len(self._memory),
            "used_bytes": self.pool.used_bytes,
            "free_bytes": self.pool.free_bytes,
            "leases": len(self._leases),
            "pending_write_bytes": sum(tier.writes.pending_bytes for tier in self._tiers),
            "open_breakers": sum(
                side.breaker.is_open for tier in self._tiers for side in (tier.read_side, tier.write_side)
            ),
        }

    def health(self) -> StorageHealth:
        """How every tier fares, now."""
        return StorageHealth(
            used_bytes=self.pool.used_bytes,
            free_bytes=self.pool.free_bytes,
            chunks=len(self._memory),
            leases=len(self._leases),
            frozen=self._frozen,
            tenant_bytes=self._memory.tenant_bytes,
            tiers=tuple(tier.health() for tier in self._tiers),
        )

    def _acquire(
        self,
        keys: Sequence[ChunkKey],
        sizes: Sequence[int | range],
        on_done: Callable[[Lease], None] | None,
        timeout_s: float | None,
        hold_s: float | None,
        keep: Callable[[ChunkKey], bool],
        ends: Ends | None = None,
        *,
        join: bool = True,
    ) -> Lease:
        self._home.check()
        lease = Lease(keys, sizes, hold_s or self._config.lease_timeout_s, on_done, on_closed=self._forget)
        with self._lock:
            self._check_open()
            self._leases[lease] = None
        limit_s = timeout_s or self._config.read_timeout_s
        try:
            self._joining.read(lease, limit_s, keep=keep, ends=ends, join=join)
        except BaseException:
            lease.close()
            raise
        self._watch(lease)
        return lease

    def _check_open(self) -> None:
        self._home.check()
        if self._closed:
            raise ClosedError("the storage manager is closed")

    def _watch(self, lease: Lease) -> None:
        """Close the lease when it has run out; looks again when it was renewed, or is still being read."""
        if lease.closed:
            return
        left = lease.expires_at - time.monotonic()
        if left < 0:
            logger.warning("a lease on %d chunks ran out", lease.ready)
            lease.close()
            return
        due = time.monotonic() + min(left, self._config.read_timeout_s)
        watch = self._deadlines.at(max(due, time.monotonic() + 1e-3), partial(self._watch, lease))
        with self._lock:
            if lease in self._leases:
                self._leases[lease] = watch
                return
        watch.cancel()  # it was closed meanwhile

    def _forget(self, lease: Lease) -> None:
        with self._lock:
            watch = self._leases.pop(lease, None)
        if watch is not None:
            watch.cancel()

    def _close_expired(self) -> bool:
        """Close leases that ran out and have not been seen to; returns whether there were any."""
        with self._lock:
            expired = [lease for lease in self._leases if lease.expired]
        for lease in expired:
            logger.warning("a lease on %d chunks ran out", lease.ready)
            lease.close()
        return bool(expired)

    def _write_ahead(self) -> None:
        """Demotion: keep the reserve free, or written to the nearest tier that takes it."""
        tier = max(self._tiers, key=lambda tier: tier.writes.room_bytes > 0)
        if room := tier.writes.room_bytes:
            for key, buffer in self._memory.to_write(min(room, self._memory.reserve)):
                tier.writes.put(key, buffer, settled=self._memory.settle)

    def _leading_below(self, keys: Sequence[ChunkKey]) -> int:
        for tier in self._tiers:
            if found := tier.ask(lambda: tier.contains(keys), 0, ASK_TIMEOUT_S):  # noqa: B023
                return found
        return 0

    def _sizes_below(self, keys: Sequence[ChunkKey]) -> list[int]:
        nothing: list[int] = []
        for tier in self._tiers:
            if found := tier.ask(lambda: tier.sizes(keys), nothing, ASK_TIMEOUT_S):  # noqa: B023
                return found
        return nothing

    def _means_memory(self, tier: str | None) -> bool:
        return tier in (None, self._memory.name)

    def _lower(self, name: str | None) -> list[LowerTier]:
        found = [tier for tier in self._tiers if name in (None, tier.name)]
        if not found and not self._means_memory(name):
            known = [self._memory.name, *(tier.name for tier in self._tiers)]
            raise ConfigError(f"unknown tier {name!r}; known: {', '.join(known)}")
        return found


def _owed_files(config: LMCacheConfig, tier: int) -> OwedFiles:
    """In the tier's own folder, where it has one, and else in that of the user's."""
    place, folder = place_of(config.tiers[tier])
    folders = [config.state.expanduser() / FOLDER.removeprefix(".")]
    return OwedFiles([folder / FOLDER, *folders] if folder else folders, place)


def _first_success(report: Callable[[bool], None], calls: int) -> Settled:
    """A ``settled`` for the queues of ``calls`` tiers, which reports once: the first True, or False after the last."""
    lock = threading.Lock()
    left, reported = calls, False

    def one(keys: Sequence[ChunkKey], held: bool) -> None:
        nonlocal left, reported
        with lock:
            left -= 1
            if reported or not (held or left == 0):
                return
            reported = True
        report(held)

    return one
