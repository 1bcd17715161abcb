"""Timers, all on one thread: for the ends of leases, and for calls that take too long."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

from lmcache.forks import Home

logger = logging.getLogger(__name__)


class Deadline:
    """Something that will be called, unless it is cancelled before."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self._call: Callable[[], object] | None = call

    def cancel(self) -> None:
        self._call = None


class Deadlines:
    """One daemon thread, started with the first deadline. What it calls must be quick and wait for nothing."""

    def __init__(self) -> None:
        self._home = Home("this clock")
        self._due: list[tuple[float, int, Deadline]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._purge_at = 256
        self._started = False
        self._closed = False

    def at(self, when: float, call: Callable[[], object]) -> Deadline:
        """Have ``call`` called at ``when`` (of ``time.monotonic``); never after close()."""
        self._home.check()
        deadline = Deadline(call)
        with self._changed:
            if self._closed:
                return deadline
            if len(self._due) >= self._purge_at:
                self._due = [each for each in self._due if each[2]._call is not None]
                heapq.heapify(self._due)
                self._purge_at = max(256, 2 * len(self._due))
            heapq.heappush(self._due, (when, next(self._numbers), deadline))
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="lmcache-deadlines", daemon=True).start()
            elif self._due[0][2] is deadline:
                self._changed.notify()
        return deadline

    def close(self) -> None:
        if self._home.left:
            return
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            # The entry loop of a thread: one call that fails must not take the others with it.
            except Exception:
                logger.exception("what was due failed")

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            while not self._closed:
                left = self._due[0][0] - time.monotonic() if self._due else None
                if left is not None and left <= 0:
                    call = heapq.heappop(self._due)[2]._call
                    if call is not None:
                        return call
                else:
                    self._changed.wait(left)
        return None
