"""A limit on the bytes that are in flight at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """Keeps the bytes that are in flight below ``limit``; one call that moves more than that goes alone. Thread-safe.

    Callers are served in the order in which they came: otherwise small chunks could overtake a large one for ever.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        """Wait until ``nbytes`` more may be in flight. No deadline: the calls of the others have theirs."""
        me = object()
        with self._changed:
            self._waiting.append(me)
            self._changed.wait_for(lambda: self._waiting[0] is me and self._fits(nbytes))
            self._waiting.popleft()
            self._used += nbytes
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()

    def _fits(self, nbytes: int) -> bool:
        return not self._used or self._used + nbytes <= self._limit
