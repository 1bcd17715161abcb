"""The calls of a lower tier's backend: on its own threads, tried again, under its breakers and within a deadline.

guarded   on the calling thread: breaker asked, retries, failure counted; nothing is raised
ask, transfer   the same on a thread of the tier, waited for until a deadline
read      a job on a reading thread, not waited for
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from lmcache import metrics
from lmcache.config import LMCacheConfig
from lmcache.errors import CorruptChunkError
from lmcache.storage.run.breaker import Side
from lmcache.storage.run.deadlines import Deadlines
from lmcache.storage.run.threads import Job, Threads

T = TypeVar("T")
# Errors that another attempt would only meet again.
FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
LATENCY_WEIGHT = 0.1  # of the newest call in the average


class TierCalls:
    """Runs blocking calls of one tier on threads of its own, so that one that hangs holds up nobody else.

    A call that fails, or is late, counts against the reads or the writes of the tier (``Side``), whose breaker then
    opens. Further attempts after an error that passes (``retry`` of the config) are made here.
    """

    def __init__(self, name: str, config: LMCacheConfig, deadlines: Deadlines) -> None:
        self.name = name
        self.read_side = Side(name, "read", config.breaker)
        self.write_side = Side(name, "write", config.breaker)
        self._retry = config.retry
        self._timeout_s = config.read_timeout_s
        self._stopping = threading.Event()
        self._latency_s: float | None = None
        threads = config.read_threads
        self._reads = Threads(f"{name}-read", threads, spare=threads, deadlines=deadlines)
        self._asks = Threads(f"{name}-ask", 1, spare=1, deadlines=deadlines)

    def doubt(self) -> None:
        """A write ended, and nobody knows whether it did."""

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
                    self.doubt()
                if not transfers or attempt >= self._retry.attempts or not self._pause(error, attempt, ends_at):
                    side.failed(str(error) or type(error).__name__)
                    return otherwise
            attempt += 1
        took = time.monotonic() - started
        if side is self.write_side and transfers and took > self._timeout_s / 2:
            self.doubt()  # inside of it the backend may have given an attempt up, which may land late
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
        return self._wait(self._asks, call, otherwise, timeout_s, side=side, transfers=False)

    def transfer(self, call: Callable[[], T], otherwise: T, timeout_s: float, unwanted: Callable[[T], None]) -> T:
        """The same for a call that moves bytes. unwanted: takes the result when nobody waits for it any more."""
        return self._wait(self._reads, call, otherwise, timeout_s, unwanted=unwanted)

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
        if not always and not side.breaker.ready:
            return otherwise
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
    """Whether another attempt is pointless. A write that failed like this will not land late either."""
    causes = (error, error.__cause__)  # a backend says what it could not do, and the system why
    return any(getattr(cause, "errno", None) in FINAL for cause in causes)
