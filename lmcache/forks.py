"""Which process opened something: threads, connections and locks are not those of a child that it forks."""

from __future__ import annotations

import os

from lmcache.errors import ClosedError


class Home:
    """Remembers the process that opened ``what``.

    In a child of it, by fork, the threads are gone, locks may be held for ever, and connections are the parent's too:
    whoever has a Home asks it first, before any lock, and lets everything be in a child, also in ``close``.
    """

    __slots__ = ("_pid", "_what")

    def __init__(self, what: str) -> None:
        self._pid = os.getpid()
        self._what = what

    @property
    def left(self) -> bool:
        """Whether this is another process."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """ClosedError in another process."""
        if self.left:
            raise ClosedError(f"{self._what} was opened by process {self._pid}, not this one: open one in the child")
