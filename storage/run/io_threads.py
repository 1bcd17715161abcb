"""A few threads that move bytes, with a limit on how many bytes are on their way at once."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from lmcache.errors import ClosedError
from lmcache.forks import Home

Job = tuple[int, Callable[[], bool]]
"""Bytes that it moves, and the call that moves them."""
Outcome = bool | OSError | None
"""What the call returned or raised; None when it was left out."""


class IOThreads:
    """Runs batches of jobs. Thread-safe; the threads start with the first batch and are daemons.

    most_bytes: of the jobs that run at once; one job alone may have more.
    """

    def __init__(self, threads: int, most_bytes: int, name: str) -> None:
        self._state = _State(most_bytes)
        self._threads, self._name, self._started = threads, name, False
        self._finalizer = weakref.finalize(self, _State.stop, self._state)

    def run(self, jobs: Sequence[Job], *, until_miss: bool = False) -> list[Outcome]:
        """Run the jobs, some at once; returns when none of them runs any more, which for a disk that hangs is never.

        until_miss: jobs behind one that returned False or raised need not be run.
        Raises whatever a job raised that is no OSError.
        """
        self._state.home.check()
        batch = _Batch(jobs, until_miss)
        state = self._state
        if len(jobs) == 1:
            # No thread is woken for the commonest case; it is admitted like any other.
            with state.admitted(jobs[0][0]):
                batch.execute(0)
        elif jobs:
            self._start()
            with state.changed:
                state.check_open()
                state.queue.extend((batch, index) for index in range(len(jobs)))
                state.changed.notify_all()
            batch.done.wait()
        if batch.error is not None:
            raise batch.error
        return batch.outcomes

    def check_open(self) -> None:
        """ClosedError after close()."""
        self._state.check_open()

    def close(self, timeout_s: float) -> bool:
        """Refuse new batches and wait for those that run; False when some still do after ``timeout_s``."""
        self._state.stop()
        with self._state.changed:
            return self._state.changed.wait_for(lambda: not self._state.queue and not self._state.bytes, timeout_s)

    def _start(self) -> None:
        with self._state.changed:
            if self._started:
                return
            self._started = True
        for number in range(self._threads):
            # The thread knows the state but not this object, so that one that is forgotten unclosed can go.
            threading.Thread(target=_work, args=(self._state,), name=f"{self._name}-{number}", daemon=True).start()


class _State:
    def __init__(self, most_bytes: int) -> None:
        self.home = Home("this tier")
        self.changed = threading.Condition()
        self.queue: deque[tuple[_Batch, int]] = deque()
        self.bytes = 0
        self.stopping = False
        self._most = most_bytes

    def fits(self, nbytes: int) -> bool:
        return not self.bytes or self.bytes + nbytes <= self._most

    def check_open(self) -> None:
        if self.stopping:
            raise ClosedError("this tier is closed")

    @contextlib.contextmanager
    def admitted(self, nbytes: int) -> Iterator[None]:
        with self.changed:
            self.check_open()
            self.changed.wait_for(lambda: self.fits(nbytes))
            self.bytes += nbytes
        try:
            yield
        finally:
            self.finished(nbytes)

    def finished(self, nbytes: int) -> None:
        with self.changed:
            self.bytes -= nbytes
            self.changed.notify_all()

    def next(self) -> tuple[_Batch, int] | None:
        """The next job, admitted; None when there will be none."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.fits(self.queue[0][0].jobs[self.queue[0][1]][0]) if self.queue else self.stopping
            )
            if not self.queue:
                return None
            batch, index = self.queue.popleft()
            self.bytes += batch.jobs[index][0]
            return batch, index

    def stop(self) -> None:
        if self.home.left:
            return
        with self.changed:
            self.stopping = True
            self.changed.notify_all()


class _Batch:
    def __init__(self, jobs: Sequence[Job], until_miss: bool) -> None:
        self.jobs = jobs
        self.outcomes: list[Outcome] = [None] * len(jobs)
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._left = len(jobs)
        self._until_miss = until_miss
        self._miss = len(jobs)

    def execute(self, index: int) -> None:
        outcome: Outcome = None
        try:
            if index < self._miss:
                outcome = self.jobs[index][1]()
        except OSError as error:
            outcome = error
        except BaseException as error:
            self.error = error  # raised again, where the batch was given
        self.outcomes[index] = outcome
        with self._lock:
            self._left -= 1
            if self._until_miss and outcome is not True:
                self._miss = min(self._miss, index)
            if not self._left:
                self.done.set()


def _work(state: _State) -> None:
    while (job := state.next()) is not None:
        batch, index = job
        nbytes = batch.jobs[index][0]
        batch.execute(index)
        state.finished(nbytes)
        del batch, job  # it holds on to the buffers, and this thread may now wait for long
