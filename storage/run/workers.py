"""Threads for a tier's blocking calls. One whose call hangs is left behind, and another takes its place."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from lmcache.forks import Home
from lmcache.storage.run.deadlines import Deadlines

logger = logging.getLogger(__name__)


class Job:
    """A call that waits for a thread, runs on one, or has ended."""

    __slots__ = ("_call", "_late", "_limit_s", "_on_late", "ended", "started_at")

    def __init__(self, call: Callable[[], None], limit_s: float, on_late: Callable[[], None]) -> None:
        self._call = call
        self._limit_s = limit_s
        self._on_late = on_late
        self._late = False
        self.started_at: float | None = None
        self.ended = False


class Workers:
    """``count`` daemon threads that take jobs in order, and at most ``spare`` more in place of those that hang.

    A job that runs for longer than its limit is late: its ``on_late`` is called (by the thread of ``deadlines``), a
    spare thread takes over, and its own thread ends with it. When all have been lost, ``submit`` refuses, until one
    comes back, of which ``on_back`` tells.
    """

    def __init__(
        self,
        name: str,
        count: int,
        spare: int,
        deadlines: Deadlines,
        on_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._home = Home("these threads")
        self._name = name
        self._count = count
        self._spare = spare
        self._deadlines = deadlines
        self._on_back = on_back
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._working = 0  # threads that take jobs
        self.lost = 0
        """Threads whose job is late."""
        self._closed = False
        for _ in range(count):
            self._start()

    def submit(self, call: Callable[[], None], limit_s: float, on_late: Callable[[], None]) -> Job | None:
        """Run ``call`` when a thread is free; None when none is left, as in a child by fork, or after close()."""
        if self._home.left:
            return None
        job = Job(call, limit_s, on_late)
        with self._changed:
            if self._closed or not self._working:
                return None
            self._jobs.append(job)
            self._changed.notify()
        return job

    def withdraw(self, job: Job) -> None:
        """Whoever wanted the job waits no longer: if it has not started it never will, else it is late."""
        with self._changed:
            if job.started_at is None:
                if job in self._jobs:
                    self._jobs.remove(job)
                return
        self.overdue(job)

    def overdue(self, job: Job) -> None:
        """The running job takes too long. Nothing happens when it has ended, or was late before."""
        with self._changed:
            if job.started_at is None or job.ended or job._late:
                return
            job._late = True
            self.lost += 1
            self._working -= 1
            if self.lost <= self._spare and not self._closed:
                self._start()
            elif not self._working:
                logger.error("%s: all its threads hang; it is left alone until one comes back", self._name)
        job._on_late()

    @property
    def working(self) -> bool:
        """Whether a thread is left that would run a job."""
        return self._working > 0 and not self._closed

    def close(self) -> list[Job]:
        """No more jobs; threads end when their job does. Returns the jobs that will not run."""
        with self._changed:
            self._closed = True
            left = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        return left

    def _start(self) -> None:
        self._working += 1
        threading.Thread(target=self._run, name=f"lmcache-{self._name}", daemon=True).start()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            watch = self._deadlines.at(time.monotonic() + job._limit_s, partial(self.overdue, job))
            try:
                job._call()
            # The entry loop of a thread: a job that fails must not take the thread with it.
            except Exception:
                logger.exception("a storage job failed")
            watch.cancel()
            if not self._end(job):
                return
            if job._late:
                self._on_back()

    def _end(self, job: Job) -> bool:
        """Whether the job's thread takes another."""
        with self._changed:
            job.ended = True
            if job._late:
                self.lost -= 1
                if self._working >= self._count:
                    return False
                self._working += 1
            return True

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._closed:
                return None
            job = self._jobs.popleft()
            job.started_at = time.monotonic()
            return job
