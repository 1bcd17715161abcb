"""What keeps the server within bounds: a budget of bytes, and complaints that are said once."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from lmcache import metrics

logger = logging.getLogger(__name__)

QUIET_S = 60.0  # between two log lines of one kind
PATIENCE_S = 0.1  # how long a request waits before holders that crawl are cut off
SHARE = 4  # once half of a budget is used, a holder may have a quarter of it


class Holder(Protocol):
    """Who holds a part of a budget."""

    @property
    def crawls(self) -> bool:
        """Whether its client takes, or gives, so little that what it holds lies idle."""
        ...

    def cut_off(self) -> None:
        """End it; it gives back what it holds. May be called again until it has."""
        ...


@dataclass(frozen=True, eq=False)
class _Waiting:
    nbytes: int
    holder: Holder | None


class Budget:
    """So many bytes of memory that all requests together may hold. Thread-safe.

    The first half goes to whoever asks. Once it is used, a holder may take more only up to a ``SHARE``-th of the whole,
    so that one client cannot keep the others out; a holder that has nothing yet may take whatever is left.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._used = 0
        self._held: dict[Holder, int] = {}
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()

    @property
    def used(self) -> int:
        return self._used

    def take(self, nbytes: int, timeout_s: float, holder: Holder | None = None) -> bool:
        """Wait for room; False when there is none after ``timeout_s``.

        While somebody waits, holders that crawl are cut off. The newest request is served first: if the oldest were,
        a crowd of stuck clients at the head of the queue would make everybody behind them time out.
        """
        with self._changed:
            if not self._fits(nbytes, holder) and not self._wait(nbytes, timeout_s, holder):
                return False
            self._used += nbytes
            if holder is not None:
                self._held[holder] = self._held.get(holder, 0) + nbytes
        return True

    def give(self, nbytes: int, holder: Holder | None = None) -> None:
        with self._changed:
            self._used -= nbytes
            if holder is not None:
                self._held[holder] -= nbytes
                if not self._held[holder]:
                    del self._held[holder]
            self._changed.notify_all()

    def _wait(self, nbytes: int, timeout_s: float, holder: Holder | None) -> bool:
        ends_at = time.monotonic() + timeout_s
        me = _Waiting(nbytes, holder)
        self._waiting.append(me)

        def turn() -> bool:
            later = self._waiting[self._waiting.index(me) + 1 :]
            return not any(self._fits(other.nbytes, other.holder) for other in later) and self._fits(nbytes, holder)

        try:
            while (left := ends_at - time.monotonic()) > 0:
                if self._changed.wait_for(turn, min(left, PATIENCE_S)):
                    return True
                for other in [other for other in self._held if other is not holder and other.crawls]:
                    other.cut_off()
            return False
        finally:
            self._waiting.remove(me)
            self._changed.notify_all()  # it may have been in the way of others

    def _fits(self, nbytes: int, holder: Holder | None) -> bool:
        held = 0 if holder is None else self._held.get(holder, 0)
        used = self._used + nbytes
        return used <= self.nbytes and (not held or 2 * used <= self.nbytes or SHARE * (held + nbytes) <= self.nbytes)


class Complaints:
    """Log lines about clients: one a kind and minute, however many there are; all are counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, int]] = {}

    def add(self, kind: str, peer: str, what: object) -> None:
        """kind: one of a few fixed words."""
        metrics.SERVER_COMPLAINTS.labels(kind).inc()
        with self._lock:
            at, unsaid = self._said.get(kind, (-QUIET_S, 0))
            now = time.monotonic()
            if now - at < QUIET_S:
                self._said[kind] = (at, unsaid + 1)
                return
            self._said[kind] = (now, 0)
        more = f" (and {unsaid} more before it)" if unsaid else ""
        logger.warning("%s: client %s: %s%s", kind, peer, what, more)
