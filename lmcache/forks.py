"""Which process opened something: threads, connections and locks are not those of a child that it forks."""

from __future__ import annotations

import os

from lmcache.errors import ClosedError

_forks = 0  # that lead to this process; asking the system for its number at every call costs more than a lookup


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class Home:
    """Remembers the process that opened ``what``.

    In a child of it, by fork, the threads are gone, locks may be held for ever, and connections are the parent's too:
    whoever has a Home asks it first, before any lock, and lets everything be in a child, also in ``close``.
    """

    __slots__ = ("_forks", "_pid", "_what")

    def __init__(self, what: str) -> None:
        self._forks = _forks
        self._pid = os.getpid()
        self._what = what

    @property
    def left(self) -> bool:
        """Whether this is another process."""
        return _forks != self._forks

    def check(self) -> None:
        """ClosedError in another process."""
        if _forks != self._forks:
            raise ClosedError(f"{self._what} was opened by process {self._pid}, not this one: open one in the child")
