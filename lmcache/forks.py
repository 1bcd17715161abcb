"""Tells an object that it is used in a forked child of the process that opened it, where it must not work."""

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

    In a forked child the threads are gone, locks may be held for ever, and connections are shared with the parent. So
    an object with a Home asks it before it takes any lock; in a child its methods raise, and ``close`` does nothing.
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
