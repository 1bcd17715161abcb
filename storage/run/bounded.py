"""Calls of libraries that may block for ever, under a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from lmcache.errors import ClosedError, StorageError
from lmcache.forks import Home

T = TypeVar("T")


class _Job(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.done = threading.Event()
        self.result: T
        self.error: BaseException | None = None


class BoundedCaller:
    """Runs calls on at most ``threads`` daemon threads. A call that runs over time keeps its thread until it ends.

    So there are never more hanging calls than threads; while all of them hang, every further call fails in its time.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._home = Home("this tier")
        self._free = threading.BoundedSemaphore(threads)
        self._most, self._name = threads, name
        self._jobs: SimpleQueue[_Job[object] | None] = SimpleQueue()
        self._started = 0
        self._lock = threading.Lock()
        self._closed = False

    def call(self, function: Callable[[], T], timeout_s: float, what: str) -> T:
        """What ``function`` returns or raises; StorageError when that takes longer than ``timeout_s``."""
        self._home.check()
        deadline = time.monotonic() + timeout_s
        if self._closed:
            raise ClosedError(f"{what}: closed")
        if not self._free.acquire(timeout=timeout_s):
            raise StorageError(f"{what}: all {self._most} threads were busy for {timeout_s} s")
        job = _Job(function)
        with self._lock:
            if self._closed:
                self._free.release()
                raise ClosedError(f"{what}: closed")
            if self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            self._jobs.put(job)  # type: ignore[arg-type]
        if not job.done.wait(max(0.0, deadline - time.monotonic())):
            raise StorageError(f"{what}: no answer within {timeout_s} s")
        if job.error is not None:
            raise job.error
        return job.result

    def close(self, timeout_s: float) -> bool:
        """Start nothing more, and wait for calls that run; False when some still do, or may, after ``timeout_s``."""
        if self._home.left:
            return False
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in range(self._started):
                    self._jobs.put(None)
        deadline = time.monotonic() + timeout_s
        free = 0
        while free < self._most and self._free.acquire(timeout=max(0.0, deadline - time.monotonic())):
            free += 1
        if free:
            self._free.release(free)
        return free == self._most

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.function()
            except BaseException as error:  # handed to the caller, who raises it
                job.error = error
            self._free.release()
            job.done.set()
            del job
