"""A lower tier as the manager runs it: a backend, its threads, its breakers and its health."""

from __future__ import annotations

import errno
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from lmcache import metrics
from lmcache.config import LMCacheConfig
from lmcache.errors import CorruptChunkError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.flow.owed import OwedRemovals
from lmcache.storage.flow.owed_files import OwedFiles
from lmcache.storage.flow.writing import WriteQueue
from lmcache.storage.run.breaker import Side, SideHealth
from lmcache.storage.run.deadlines import Deadlines
from lmcache.storage.run.pace import Pace
from lmcache.storage.run.threads import Job, Threads
from lmcache.storage.selection import Selection, clear_backend

logger = logging.getLogger(__name__)

T = TypeVar("T")
# What trying again does not mend.
FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
CLOSE_S = 1.0  # for a write under way, and for the backend
LATENCY_WEIGHT = 0.1  # of the newest call in the average


@dataclass(frozen=True)
class TierHealth:
    """How a lower tier fares."""

    name: str
    reads: SideHealth
    writes: SideHealth
    """Also removals."""
    latency_s: float | None
    """Exponentially weighted mean of the calls that moved bytes."""
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None
    """Means of one call, which say how large the next batches are; None before the first."""
    queue_bytes: int
    """Bytes that wait to be written, or are being written."""
    hung_threads: int
    """Calls that ran out of time and have not come back."""
    owes_clear: bool
    """Whether it is not cleared yet, as it was told: what should be gone counts as not there until it is."""
    owed_removals: int
    """Chunks (or selections of them) that count as not there, and are not known to be gone for good."""

    @property
    def breaker(self) -> str:
        """The worse of both: ``open``, ``half_open`` or ``closed``."""
        return max(self.reads.breaker, self.writes.breaker, key=["closed", "half_open", "open"].index)

    @property
    def failures(self) -> int:
        """Failures in a row, of the side that has more of them."""
        return max(self.reads.failures, self.writes.failures)

    @property
    def last_error(self) -> str | None:
        return self._latest.last_error

    @property
    def last_error_age_s(self) -> float | None:
        return self._latest.last_error_age_s

    @property
    def _latest(self) -> SideHealth:
        sides = [side for side in (self.reads, self.writes) if side.last_error_age_s is not None]
        return min(sides, key=lambda side: side.last_error_age_s or 0.0, default=self.reads)


class LowerTier:
    """Runs a backend's blocking calls on threads of its own, so that one that hangs holds up nobody else."""

    def __init__(
        self,
        backend: StorageBackend,
        config: LMCacheConfig,
        queue_bytes: int,
        deadlines: Deadlines,
        name: str | None = None,
        files: OwedFiles | None = None,
    ) -> None:
        self.backend = backend
        self.name = name or backend.name
        self.read_side = Side(self.name, "read", config.breaker)
        self.write_side = Side(self.name, "write", config.breaker)
        self._retry = config.retry
        self._timeout_s = config.read_timeout_s
        self._lock = threading.Lock()
        self._clearing: set[Selection] = set()  # in the background
        self._stopping = threading.Event()
        self._latency_s: float | None = None
        self.read_pace, self.write_pace = Pace(), Pace()
        threads = config.read_threads
        self._reads = Threads(f"{self.name}-read", threads, spare=threads, deadlines=deadlines)
        self._asks = Threads(f"{self.name}-ask", 1, spare=1, deadlines=deadlines)
        self.writes = WriteQueue(self, queue_bytes, config.read_timeout_s, deadlines)
        self.owed = OwedRemovals(self.name, self.remove_now, self.writes.returning, self._timeout_s, files)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """The backend's, without what counts as removed."""
        there = self.owed.leading(keys)
        return self.backend.sizes(there) if there else []

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        """The backend's, without what counts as removed."""
        there = self.owed.leading(keys)
        return self.backend.contains(there) if there else 0

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        """The backend's, without what counts as removed, also meanwhile."""
        began_at = time.monotonic()
        try:
            count = self.backend.get(keys, into)
        except Exception:
            self.read_pace.failed(sum(buffer.nbytes for buffer in into), time.monotonic() - began_at)
            raise
        if count:
            self.owed.answered(began_at)
            self.read_pace.moved(sum(buffer.nbytes for buffer in into[:count]), time.monotonic() - began_at)
        return len(self.owed.leading(keys[:count]))

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        """The backend's."""
        nbytes = sum(buffer.nbytes for buffer in buffers)
        began_at = time.monotonic()
        try:
            count = self.backend.put(keys, buffers)
        except Exception:
            self.write_pace.failed(nbytes, time.monotonic() - began_at)
            raise
        if count:
            self.write_pace.moved(nbytes, time.monotonic() - began_at)
        return count

    @property
    def available(self) -> bool:
        """Whether a read may be tried now."""
        return self.read_side.breaker.ready and self._reads.working

    def guarded(
        self,
        call: Callable[[], T],
        otherwise: T,
        *,
        side: Side | None = None,
        transfers: bool = True,
        always: bool = False,
        ends_at: float | None = None,
    ) -> T:
        """``call()``, or ``otherwise`` when it raises: a failing tier is a miss, counted and logged.

        side: whose breaker is asked and told: that of reads unless given.
        transfers: whether it moves bytes. Such a call is tried again. A quick look into an index says little about
        reads that come late, so its success closes an open breaker, but does not make up for failures.
        always: do not ask the breaker. ends_at: when an answer is late, by default ``read_timeout_s`` from now.
        """
        side = side or self.read_side
        if not always and not side.breaker.allows():
            return otherwise
        started = time.monotonic()
        ends_at = started + self._timeout_s if ends_at is None else ends_at
        attempt = 1
        while True:
            try:
                result = call()
                break
            # Whatever a backend raises, also one that is not ours, is this tier's failure and nobody else's.
            except Exception as error:
                if side is self.write_side and transfers and not _final(error):
                    self.owed.doubt()
                if not transfers or attempt >= self._retry.attempts or not self._pause(error, attempt, ends_at):
                    side.failed(str(error) or type(error).__name__)
                    return otherwise
            attempt += 1
        took = time.monotonic() - started
        if side is self.write_side and transfers and took > self._timeout_s / 2:
            self.owed.doubt()  # inside of it the backend may have given an attempt up, which may land late
        if transfers:
            known = took if self._latency_s is None else self._latency_s
            self._latency_s = known + LATENCY_WEIGHT * (took - known)
        # An answer after the deadline came too late for whoever asked: it does not speak for the tier.
        if time.monotonic() <= ends_at and (transfers or side.breaker.is_open):
            side.succeeded()
        else:
            side.breaker.undecided()
        return result

    def hung(self, side: Side, limit_s: float) -> None:
        """A call did not end in time: a failure, and its thread is replaced."""
        metrics.TIER_HUNG_CALLS.labels(self.name).inc()
        side.failed(f"a call did not end within {limit_s:.3g} s")

    def read(
        self, call: Callable[[], None], limit_s: float, on_late: Callable[[], None] | None = None
    ) -> Job[None] | None:
        """Run ``call`` on a reading thread; None when there is none. A call that takes longer is a failure."""

        def late() -> None:
            self.hung(self.read_side, limit_s)
            if on_late is not None:
                on_late()

        return self._reads.submit(call, limit_s, late)

    def overdue(self, job: Job[None]) -> None:
        """A running read will not be waited for."""
        self._reads.overdue(job)

    def ask(self, call: Callable[[], T], otherwise: T, timeout_s: float, side: Side | None = None) -> T:
        """``guarded(call)`` with a deadline: a tier that hangs answers ``otherwise``, which counts as a failure."""
        side = side or self.read_side
        if not side.breaker.ready:
            return otherwise
        return self._wait(self._asks, call, otherwise, timeout_s, side=side, transfers=False)

    def transfer(self, call: Callable[[], T], otherwise: T, timeout_s: float, unwanted: Callable[[T], None]) -> T:
        """The same for a call that moves bytes. unwanted: takes the result when nobody waits for it any more."""
        if not self.read_side.breaker.ready:
            return otherwise
        return self._wait(self._reads, call, otherwise, timeout_s, unwanted=unwanted)

    def remove(self, keys: Sequence[ChunkKey], timeout_s: float) -> int:
        """Forget chunks, also queued ones and those that are being written.

        Those that cannot be removed now, or that a write may bring back, count as not there until they are gone.
        """
        deadline = time.monotonic() + timeout_s
        # A write under way could be seen once more between this removal and its own undoing.
        self.writes.drop(set(keys).__contains__, timeout_s / 2)
        nothing: int | None = None
        began_at = time.monotonic()
        left = max(0.0, deadline - began_at)
        removed = self.ask(lambda: self.backend.remove(keys), nothing, left, self.write_side)
        self.owed.settle(keys, removed is not None, began_at)
        if removed is None:
            logger.warning("tier %s: %d chunks cannot be removed now; it is tried again", self.name, len(keys))
        return removed or 0

    def remove_now(self, what: Sequence[ChunkKey] | Selection, *, always: bool = False) -> bool:
        """Take chunks out of the place, on the calling thread; whether that succeeded."""

        def remove() -> bool:
            if isinstance(what, Selection):
                clear_backend(self.backend, what)
            else:
                self.backend.remove(what)
            return True

        return self.guarded(remove, False, side=self.write_side, transfers=False, always=always)

    def remove_soon(self, keys: Sequence[ChunkKey]) -> None:
        """The same, and return: from now on they count as not there."""
        self.writes.drop(set(keys).__contains__)
        self.owed.settle(keys, False, 0.0)

    def clear(self, selection: Selection, timeout_s: float) -> int:
        """Drop queued writes and stored chunks. Does not ask the breaker.

        Waits for a write under way, which is undone by its thread when it takes too long. What cannot be cleared now
        counts as not there, and is cleared later.
        """
        self.owed.owe(selection)
        self.writes.hold(selection.matches)
        return self._clear_held(selection, timeout_s)

    def clear_soon(self, selection: Selection) -> None:
        """The same, and return: from now on it counts as not there. What is put from now on is written behind it."""
        with self._lock:
            if selection in self._clearing:
                # No write of these has begun since; the clear that is about to be done, or is being, is theirs too.
                self.writes.drop(selection.matches)
                return
            self._clearing.add(selection)
        self.owed.owe(selection)
        self.writes.hold(selection.matches)
        threading.Thread(
            target=self._clear_held, args=(selection, self._timeout_s), name=f"lmcache-{self.name}-clear", daemon=True
        ).start()

    def _clear_held(self, selection: Selection, timeout_s: float) -> int:
        """Clear while no write begins, which then go on."""
        deadline = time.monotonic() + timeout_s
        nothing: int | None = None
        try:
            self.writes.wait_ended(timeout_s / 2)
            began_at = time.monotonic()
            cleared = self._wait(
                self._asks,
                lambda: clear_backend(self.backend, selection),
                nothing,
                max(0.0, deadline - began_at),
                side=self.write_side,
                transfers=False,
                always=True,
            )
            self.owed.settle([selection], cleared is not None, began_at)
        finally:
            with self._lock:
                self._clearing.discard(selection)
            self.writes.go_on()
        if cleared is None:
            logger.error("tier %s: could not be cleared now; what it has counts as not there until it is", self.name)
        return cleared or 0

    def close(self) -> None:
        """Stop; what is still queued is dropped. A call that hangs is left behind on its daemon thread.

        From then on it finds nothing, and takes nothing.
        """
        self._stopping.set()
        self.owed.close()
        ended = self.writes.close(CLOSE_S)
        if self.owed:
            self._wait(self._asks, lambda: self.owed.pay(math.inf), None, CLOSE_S, transfers=False, always=True)
        if self.owed:
            logger.error("tier %s: closed while %d removals are owed: chunks may come back", self.name, len(self.owed))
        if ended:
            self._wait(self._asks, self.backend.close, None, CLOSE_S, transfers=False, always=True)
        for threads in (self._reads, self._asks):
            threads.close()

    def health(self) -> TierHealth:
        return TierHealth(
            name=self.name,
            reads=self.read_side.health(),
            writes=self.write_side.health(),
            latency_s=self._latency_s,
            read_bytes_per_s=self.read_pace.bytes_per_s,
            write_bytes_per_s=self.write_pace.bytes_per_s,
            queue_bytes=self.writes.pending_bytes,
            hung_threads=self._reads.lost + self._asks.lost + self.writes.hung_threads,
            owes_clear=bool(self.owed.selections),
            owed_removals=len(self.owed),
        )

    def _wait(
        self,
        threads: Threads,
        call: Callable[[], T],
        otherwise: T,
        timeout_s: float,
        *,
        side: Side | None = None,
        transfers: bool = True,
        always: bool = False,
        unwanted: Callable[[T], None] | None = None,
    ) -> T:
        side = side or self.read_side
        ends_at = time.monotonic() + timeout_s
        guarded = partial(self.guarded, call, otherwise, side=side, transfers=transfers, always=always, ends_at=ends_at)
        job = threads.submit(guarded, timeout_s, lambda: self.hung(side, timeout_s), unwanted)
        if job is None or not threads.wait(job, timeout_s) or job.error is not None:
            return otherwise
        return job.result

    def _pause(self, error: Exception, attempt: int, ends_at: float) -> bool:
        """Wait before the next attempt; False when there should be none."""
        if isinstance(error, CorruptChunkError) or _final(error):
            return False
        pause = self._retry.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        if time.monotonic() + pause >= ends_at or self._stopping.wait(pause):
            return False
        metrics.TIER_RETRIES.labels(self.name).inc()
        return True


def _final(error: Exception) -> bool:
    """Whether trying again does not mend it. A write that failed so will not land late either."""
    causes = (error, error.__cause__)  # a backend says what it could not do, and the system why
    return any(getattr(cause, "errno", None) in FINAL for cause in causes)
