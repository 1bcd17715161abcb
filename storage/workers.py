"""The threads of the manager: workers that a hanging call cannot exhaust, and one timer."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_GIVEN_UP = 8


class Workers:
    """A few daemon threads that run jobs in the order in which they came; they start with the first jobs.

    A thread whose job hangs can be given up: another takes its place, and the old one ends when its call returns.
    Daemons, because a call that never returns must not keep the process alive.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._given_up: set[threading.Thread] = set()
        self._started: dict[threading.Thread, float] = {}
        self._closed = False

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        with self._changed:
            return not self._jobs and not self._started

    def submit(self, job: Callable[[], None]) -> bool:
        """Queue a job, which must not raise; False after close()."""
        with self._changed:
            if self._closed:
                return False
            self._jobs.append(job)
            if len(self._threads) < self._count and len(self._jobs) + len(self._started) > len(self._threads):
                self._start()
            self._changed.notify()
            return True

    def replace_stuck(self, started_before: float) -> None:
        """Give up threads whose job began before that time (time.monotonic), and start others instead."""
        with self._changed:
            for thread, started in self._started.items():
                if thread in self._threads and started <= started_before and len(self._given_up) < MAX_GIVEN_UP:
                    self._threads.remove(thread)
                    self._given_up.add(thread)
            while self._jobs and len(self._threads) < self._count and not self._closed:
                self._start()

    def close(self, deadline: float) -> None:
        """Drop what waits and end; what runs is waited for until ``deadline``, then left alone."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                self._started.pop(me, None)
                if me in self._given_up:
                    self._given_up.remove(me)
                    return
                while not self._jobs:
                    if self._closed:
                        return
                    self._changed.wait()
                job = self._jobs.popleft()
                self._started[me] = time.monotonic()
            # The entry loop of a thread: jobs turn failures into misses themselves, so this is a defect of ours.
            try:
                job()
            except Exception:
                logger.exception("%s: a job failed", self._name)
            del job


class Alarm:
    """One callback of a Timer."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Timer:
    """Runs callbacks when their time has come, on one daemon thread that sleeps in between."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._alarms: list[tuple[float, int, Alarm]] = []
        self._number = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def at(self, when: float, callback: Callable[[], None]) -> Alarm:
        """Call ``callback`` (which must be quick) at that time.monotonic(); never after close()."""
        alarm = Alarm(callback)
        with self._changed:
            if self._closed:
                return alarm
            heapq.heappush(self._alarms, (when, next(self._number), alarm))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif self._alarms[0][2] is alarm:
                self._changed.notify()
        return alarm

    def close(self, deadline: float) -> None:
        with self._changed:
            self._closed = True
            self._alarms.clear()
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._is_due():
                    left = self._alarms[0][0] - time.monotonic() if self._alarms else None
                    self._changed.wait(left)
                if self._closed:
                    return
                callback = heapq.heappop(self._alarms)[2].callback
            if callback is not None:
                try:
                    callback()
                # The entry loop of a thread: the other alarms must still ring.
                except Exception:
                    logger.exception("%s: a callback failed", self._name)
            del callback

    def _is_due(self) -> bool:
        return bool(self._alarms) and self._alarms[0][0] <= time.monotonic()
