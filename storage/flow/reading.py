"""The waterfall: reads what a lease lacks, tier by tier, with the next batches in flight while one comes in.

          ┌─ a run: what a tier has of the keys from ``lease.ready`` on ─┐
lease ────┤ batch 0 │ batch 1 │ batch 2 │ ...                            ├──> next run, from the nearest tier again,
          └─ read by up to ``read_threads`` at once, held in order ──────┘    or from the next one if nothing came
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from lmcache import metrics
from lmcache.errors import ClosedError
from lmcache.keys import ChunkKey
from lmcache.storage.eviction.base import Place
from lmcache.storage.flow.tier import LowerTier
from lmcache.storage.lease import Lease
from lmcache.storage.memory.pool import PoolBuffer
from lmcache.storage.memory.tier import MemoryTier
from lmcache.storage.run.deadlines import Deadlines
from lmcache.storage.run.pace import SHARE
from lmcache.storage.run.threads import Job

logger = logging.getLogger(__name__)

WINDOW_CHUNKS = 4096  # that a tier's index is asked for at once
BATCH_CHUNKS = 256


class _Run:
    """What one tier has of the next keys, and the batches in which it is read."""

    def __init__(self, index: int, first: int, limit_s: float, generation: int) -> None:
        self.index = index  # of the tier
        self.first = first  # key
        self.limit_s = limit_s
        self.ends_at = time.monotonic() + limit_s
        self.generation = generation
        self.sizes: list[int] = []
        self.asked = 0  # sizes that batches were made of
        self.held = 0  # sizes whose batch has come in, in order
        self.landed: dict[int, tuple[list[PoolBuffer], int]] = {}  # batches that came in before an earlier one
        self.jobs: list[Job[None]] = []
        self.flying = 0
        self.cut = False  # a batch came in short: what lies behind it is no prefix
        self.full = False  # no memory
        self.abandoned = False  # hung: the lease has gone on without it


class Reading:
    """One lease's reads. ``keep`` says whether a chunk stays in memory when the lease lets go.

    parent: what the first key stands behind. on_progress: called, without a lock held, when the lease holds more.
    wanted: asked before more is read; once it says no, nothing is.
    """

    def __init__(
        self,
        lease: Lease,
        tiers: Sequence[LowerTier],
        memory: MemoryTier,
        *,
        batch_bytes: int,
        keep: Callable[[ChunkKey], bool],
        parent: ChunkKey | None = None,
        on_progress: Callable[[], None] = lambda: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._lease = lease
        self._parent = parent
        self._on_progress = on_progress
        self._wanted = wanted
        self._lacks: dict[int, int] = {}  # by tier: the key that it was asked for and did not have
        self._tiers = tiers
        self._memory = memory
        self._batch_bytes = batch_bytes
        self._keep = keep
        self._lock = threading.Lock()
        self._current: _Run | None = None

    def start(self, timeout_s: float, deadlines: Deadlines) -> None:
        """Begin; the lease is done after ``timeout_s`` at the latest."""
        self._ends_at = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._deadline = deadlines.at(self._ends_at, self._expire)
        self._go_on(0)

    def _go_on(self, index: int) -> None:
        """Go on with tier ``index``, or the first after it that can be read, at the first key that is not held."""
        while index < len(self._tiers) and not self._lease.done and self._wanted():
            if self._lacks.get(index) == self._lease.ready:
                index += 1
                continue
            left = self._ends_at - time.monotonic()
            # A tier that hangs leaves time for those behind it.
            run = _Run(index, self._lease.ready, left / (len(self._tiers) - index), self._memory.generation)
            self._current = run
            if left > 0 and self._tiers[index].available and self._submit(run, self._open):
                return
            index += 1
        self._deadline.cancel()
        self._lease.settle()

    def _submit(self, run: _Run, work: Callable[[_Run, float], None]) -> bool:
        with self._lock:
            run.flying += 1
        job = self._tiers[run.index].read(partial(self._work, run, work), run.limit_s, partial(self._abandon, run))
        with self._lock:
            if job is None:
                run.flying -= 1
                return False
            run.jobs = [each for each in run.jobs if not each.ended] + [job]
        return True

    def _work(self, run: _Run, work: Callable[[_Run, float], None]) -> None:
        # The tier answers for the time that it works; but what comes after the lease is done does not speak for it.
        ends_at = min(time.monotonic() + run.limit_s, self._ends_at)
        try:
            if not self._lease.done and not run.abandoned and self._wanted():
                work(run, ends_at)
        finally:
            with self._lock:
                run.flying -= 1
                ended = not run.flying and not run.abandoned
            if ended:
                self._end(run)

    def _open(self, run: _Run, ends_at: float) -> None:
        """Ask the tier's index, then read the first batch."""
        tier, first = self._tiers[run.index], run.first
        keys = self._lease.keys[first : first + WINDOW_CHUNKS]
        nothing: list[int] = []
        sizes = tier.guarded(lambda: tier.sizes(keys), nothing, transfers=False, ends_at=ends_at)
        for offset, size in enumerate(sizes):
            if not self._lease.fits(first + offset, size):
                metrics.CORRUPT_CHUNKS.labels(tier.name).inc()
                logger.warning("removed %s from tier %s: a chunk of %d bytes", keys[offset], tier.name, size)
                tier.remove_now(keys[offset : offset + 1])
                sizes = sizes[:offset]
                break
        run.sizes = sizes
        if len(sizes) < len(keys):
            self._lacks[run.index] = first + len(sizes)
        if sizes:
            self._read(run, ends_at)

    def _read(self, run: _Run, ends_at: float) -> None:
        """Read the next batch, after the one behind it was given to another thread."""
        tier, offset = self._tiers[run.index], run.asked
        buffers = self._room(run)
        if run.asked < len(run.sizes) and not run.full and not run.cut:
            self._submit(run, self._read)
        if not buffers:
            return
        first = run.first + offset
        keys = self._lease.keys[first : first + len(buffers)]
        got = tier.guarded(lambda: tier.get(keys, buffers), 0, ends_at=ends_at)
        self._memory.pool.release_all(buffers[got:])
        held = self._memory.pool.share_leading(buffers[:got])
        self._land(run, offset, held, len(buffers))
        if got:
            metrics.TIER_HITS.labels(tier.name).inc(got)
        for at, (key, buffer) in enumerate(zip(keys, buffers[:got], strict=False), start=first):
            if self._keep(key):
                # Its token positions are not known here.
                place = Place(self._lease.keys[at - 1] if at else self._parent, 0, 0)
                self._memory.insert(key, buffer, run.generation, place=place, settled=True)
            else:
                buffer.release()
        self._on_progress()

    def _room(self, run: _Run) -> list[PoolBuffer]:
        """Buffers for the next batch: as many as should come in a small part of the time that is left."""
        seconds = min(self._timeout_s * SHARE, (run.ends_at - time.monotonic()) / 2)
        most = self._tiers[run.index].read_pace.batch_bytes(seconds, self._batch_bytes)
        buffers: list[PoolBuffer] = []
        nbytes = 0
        while run.asked < len(run.sizes) and len(buffers) < BATCH_CHUNKS:
            size = run.sizes[run.asked]
            if buffers and nbytes + size > most:
                break
            try:
                buffer = self._memory.allocate(size)
            except ClosedError:
                buffer = None
            if buffer is None:
                run.full = True
                break
            buffers.append(buffer)
            nbytes += size
            run.asked += 1
        return buffers

    def _land(self, run: _Run, offset: int, handles: list[PoolBuffer], wanted: int) -> None:
        """A batch has come in: the lease holds it when it holds all before it."""
        with self._lock:
            run.landed[offset] = handles, wanted
            while not run.abandoned and (batch := run.landed.pop(run.held, None)) is not None:
                handles, wanted = batch
                if run.cut:
                    self._memory.pool.release_all(handles)
                else:
                    self._lease.hold(handles)
                run.held += wanted
                run.cut = run.cut or len(handles) < wanted
            if run.abandoned:
                self._drop_landed(run)

    def _end(self, run: _Run) -> None:
        if run.cut:
            self._lacks[run.index] = self._lease.ready  # it had not, or could not give, the next one
        self._lease.hold(self._memory.pin(self._lease.keys[self._lease.ready :]))
        self._on_progress()
        if run.full or self._lease.ready == len(self._lease.keys):
            self._go_on(len(self._tiers))
        else:
            self._go_on(0 if self._lease.ready > run.first else run.index + 1)

    def _abandon(self, run: _Run) -> None:
        """A read hangs: go on with the next tier. What the read still brings goes to memory only."""
        with self._lock:
            if run.abandoned:
                return
            run.abandoned = True
            self._drop_landed(run)
        if not self._lease.done:
            self._go_on(run.index + 1)

    def _drop_landed(self, run: _Run) -> None:
        for handles, _ in run.landed.values():
            self._memory.pool.release_all(handles)
        run.landed.clear()

    def _expire(self) -> None:
        run = self._current
        if run is not None and not self._lease.done:
            with self._lock:
                jobs = list(run.jobs)
            now = time.monotonic()
            for job in jobs:
                # A tier answers for the time that it works, not for the time that its queue is long.
                if job.started_at is not None and now - job.started_at > run.limit_s / 2:
                    self._tiers[run.index].overdue(job)
        self._lease.settle()
