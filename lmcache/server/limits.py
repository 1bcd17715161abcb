"""What keeps the server within bounds: a budget of bytes, and complaints that are said once."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from lmcache import metrics

logger = logging.getLogger(__name__)

QUIET_S = 60.0


PATIENCE_S = 0.1  # before those that crawl are cut off
SHARE = 4  # what one holder may have of a budget that is half used, as a fraction


class Holder(Protocol):
    """Who holds a part of a budget."""

    @property
    def crawls(self) -> bool:
        """Whether it hardly makes use of what it holds, for the fault of its client."""
        ...

    def cut_off(self) -> None:
        """End it; it gives back what it holds. May be called again until it has."""
        ...


@dataclass(frozen=True, eq=False)
class _Waiting:
    nbytes: int
    holder: Holder | None


class Budget:
    """So many bytes that may be held at a time, the second half of them by nobody beyond its share. Thread-safe."""

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

        Who has nothing may have as much as there is. While somebody waits, holders that crawl are cut off. Who came
        last is served first: behind a crowd that is stuck nobody would be served in time.
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
