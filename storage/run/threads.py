"""The threads that run blocking calls: those of a lower tier (flow/), and those of backends that make many at once.

submit ──> waiting ──> running ──> ended             its thread takes the next call
              │           └─ longer than its limit: late; a spare thread takes over
              └─ withdrawn, or dropped by close(): it never runs
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from lmcache.errors import ClosedError, StorageError
from lmcache.forks import Home
from lmcache.storage.run.deadlines import Deadlines

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def _nothing() -> None: ...


@dataclass(eq=False)
class Job(Generic[T]):
    """A call that waits for a thread, runs on one, or has ended.

    result, error: of one that is ``done``. Dropped by ``close()``, its error is a ClosedError.
    """

    _threads: Threads
    _call: Callable[[], T]
    _limit_s: float = math.inf
    _on_late: Callable[[], object] = _nothing
    _unwanted: Callable[[T], object] | None = None
    raises: bool = False  # where it was asked for, so that it need not be logged
    started_at: float | None = None
    ended: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    result: T = field(init=False)
    error: BaseException | None = None
    _late: bool = False
    _withdrawn: bool = False


class Threads:
    """Runs calls, in the order in which they come, on at most ``count`` daemon threads. Thread-safe.

    Threads start when they are needed, and end when this is closed or no longer used. One whose call runs longer than
    its limit is *lost* until that call ends: the call's ``on_late`` is called (by the thread of ``deadlines``), and one
    of at most ``spare`` further threads takes its place. While all are lost ``submit`` refuses; ``on_back`` tells when
    one has come back. What has no limit (``call``, ``run``) keeps its thread for as long as it takes.

    owner: what a ClosedError says was closed, or was opened in another process.
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        spare: int = 0,
        deadlines: Deadlines | None = None,
        on_back: Callable[[], object] = _nothing,
        owner: str = "this tier",
    ) -> None:
        self._home = Home(owner)
        self._name, self._owner = name, owner
        self._count, self._spare = count, spare
        self._deadlines = deadlines
        self._on_back = on_back
        self._queue = _Queue(self._home)
        self._changed = self._queue.changed
        self._working = 0  # threads that take jobs
        self.lost = 0
        """Threads whose job is late."""
        weakref.finalize(self, self._queue.close).atexit = False

    @property
    def working(self) -> bool:
        """Whether a thread is left that would run a job."""
        return self.lost < self._count + self._spare and not self._queue.closed

    def check_open(self) -> None:
        """ClosedError after close()."""
        if self._queue.closed:
            raise self._closed_error()

    def submit(
        self,
        call: Callable[[], T],
        limit_s: float,
        on_late: Callable[[], object],
        unwanted: Callable[[T], object] | None = None,
    ) -> Job[T] | None:
        """Run ``call`` when a thread is free; None when none is left, in a child by fork, or after close().

        unwanted: takes the result of a job that was withdrawn while it ran.
        """
        if self._home.left:
            return None
        job = Job(self, call, limit_s, on_late, unwanted)
        return job if self._take([job]) else None

    def wait(self, job: Job[T], timeout_s: float) -> bool:
        """Wait for a job; one that has not ended by then is withdrawn. Returns whether it has ended."""
        return job.done.wait(timeout_s) or self.withdraw(job)

    def withdraw(self, job: Job[T]) -> bool:
        """Nobody waits for the job any more: if it has not started it never will, else it is late.

        Returns whether it had ended before.
        """
        with self._changed:
            if job.ended:
                return True
            job._withdrawn = True
            if job.started_at is None:
                self._queue.drop(job)
                return False
        self.overdue(job)
        return False

    def overdue(self, job: Job[T]) -> None:
        """The running job takes too long. Nothing happens when it has ended, or was late before."""
        with self._changed:
            if job.started_at is None or job.ended or job._late:
                return
            job._late = True
            self.lost += 1
            self._working -= 1
            if self._queue.jobs:
                self._grow()
            if not self.working and not self._queue.closed:
                logger.error("%s: all its threads hang; it is left alone until one comes back", self._name)
        job._on_late()

    def call(self, function: Callable[[], T], timeout_s: float, what: str) -> T:
        """What ``function`` returns or raises; StorageError when that takes longer than ``timeout_s``.

        A call that takes longer keeps its thread until it ends, so that never more than ``count`` hang; while all do,
        every further one fails in its time.
        """
        self._home.check()
        job = Job(self, function, raises=True)
        if not self._take([job]):
            raise self._closed_error()
        if not job.done.wait(timeout_s):
            with self._changed:
                waited = self._queue.drop(job)
            busy = f"all {self._count} threads were busy for" if waited else "no answer within"
            raise StorageError(f"{what}: {busy} {timeout_s} s")
        if job.error is not None:
            raise job.error
        return job.result

    def run(
        self, calls: Sequence[Callable[[], T]], *, ends: Callable[[T | OSError], bool] = lambda outcome: False
    ) -> list[T | OSError | None]:
        """Run a batch, some at once; what each call returned, or the OSError that it raised.

        A batch of one, which is the commonest, runs on the calling thread, so that no other need be woken for it.

        Returns, or raises, when none of them runs any more: they may use memory of whoever asked, who releases it then.
        ends: whether an outcome ends the batch: what stands behind it and has not begun is left out (None). Any other
        error ends it too, and is raised.
        """
        self._home.check()
        stops = [len(calls)]

        def one(index: int) -> T | OSError | None:
            if index > min(stops):
                return None
            outcome: T | OSError
            try:
                outcome = calls[index]()
            except OSError as error:
                outcome = error
            except BaseException:
                stops.append(-1)
                raise
            if ends(outcome):
                stops.append(index)
            return outcome

        if len(calls) == 1:
            with self._queue.entered(self._closed_error):
                return [one(0)]
        jobs = [Job(self, partial(one, index), raises=True) for index in range(len(calls))]
        if jobs and not self._take(jobs):
            raise self._closed_error()
        for job in jobs:
            job.done.wait()
        for index, job in enumerate(jobs):
            if job.error is not None and (job.ended or index < min(stops)):
                raise job.error
        return [job.result if job.ended else None for job in jobs]

    def map(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``call`` of each item. After the first that raises no other is begun, and its error is raised."""
        results: list[R] = []
        for outcome in self.run([partial(call, item) for item in items], ends=lambda each: isinstance(each, OSError)):
            if isinstance(outcome, OSError):
                raise outcome
            results.append(outcome)  # type: ignore[arg-type]
        return results

    def close(self, timeout_s: float | None = 0.0) -> bool:
        """Begin nothing more, and wait for what runs (None: however long); False when something still does.

        What has not begun is dropped. Threads end when their call does. Idempotent.
        """
        if self._home.left:
            return False
        for job in self._queue.close():
            job.error = self._closed_error()
            job.done.set()
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue.running, timeout_s)

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"{self._owner} is closed")

    def _take(self, jobs: Sequence[Job[T]]) -> bool:
        with self._changed:
            if not self.working:
                return False
            for job in jobs:
                self._queue.jobs.append(job)
                if len(self._queue.jobs) > self._queue.idle:
                    self._grow()
            self._changed.notify(len(jobs))
            return True

    def _grow(self) -> None:
        """Start one more thread, if there may be one (with the lock held)."""
        if self._working < min(self._count, self._count + self._spare - self.lost):
            threading.Thread(target=_work, args=(self._queue,), name=f"lmcache-{self._name}", daemon=True).start()
            self._working += 1

    def _run(self, job: Job[T]) -> bool:
        """Run a job on this thread; whether the thread takes another."""
        watch = None
        if self._deadlines is not None and job._limit_s < math.inf:
            watch = self._deadlines.at(time.monotonic() + job._limit_s, partial(self.overdue, job))
        try:
            job.result = job._call()
        # The entry loop of a thread: a job that fails must not take the thread with it.
        except BaseException as error:
            job.error = error
            if not job.raises:
                logger.exception("a storage job failed")
        if watch is not None:
            watch.cancel()
        with self._changed:
            self._queue.left()
            job.ended = stays = True
            if job._late:
                self.lost -= 1
                stays = self._working < self._count
                self._working += stays
        job.done.set()
        if job._withdrawn and job._unwanted is not None and job.error is None:
            job._unwanted(job.result)
        if job._late and stays:
            self._on_back()
        return stays


class _Queue:
    """What the threads share. They hold no reference to the Threads, so that an unclosed one can be collected."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.changed = threading.Condition()
        self.jobs: deque[Job] = deque()  # type: ignore[type-arg]
        self.idle = self.running = 0
        self.closed = False

    def next(self) -> Job | None:  # type: ignore[type-arg]
        with self.changed:
            self.idle += 1
            self.changed.wait_for(lambda: self.jobs or self.closed)
            self.idle -= 1
            if self.closed:
                return None
            job = self.jobs.popleft()
            job.started_at = time.monotonic()
            self.running += 1
            return job

    def left(self) -> None:
        """A call has ended (with the lock held)."""
        self.running -= 1
        if self.closed:
            self.changed.notify_all()

    @contextlib.contextmanager
    def entered(self, refusal: Callable[[], Exception]) -> Iterator[None]:
        """For a call on a thread of somebody else's."""
        with self.changed:
            if self.closed:
                raise refusal()
            self.running += 1
        try:
            yield
        finally:
            with self.changed:
                self.left()

    def drop(self, job: Job[T]) -> bool:
        """Whether it had not started, and never will (with the lock held)."""
        if job in self.jobs:
            self.jobs.remove(job)
            return True
        return False

    def close(self) -> list[Job]:  # type: ignore[type-arg]
        """Returns the jobs that will not run."""
        if self._home.left:
            return []
        with self.changed:
            self.closed = True
            left = list(self.jobs)
            self.jobs.clear()
            self.changed.notify_all()
        return left


def _work(queue: _Queue) -> None:
    while (job := queue.next()) is not None:
        if not job._threads._run(job):
            return
        del job  # it holds on to buffers, and to its Threads, and this thread may now wait for long
