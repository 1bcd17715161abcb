"""What keeps the server within bounds: a budget of bytes, and complaints that are said once."""

from __future__ import annotations

import logging
import threading
import time

from lmcache import metrics

logger = logging.getLogger(__name__)

QUIET_S = 60.0


class Budget:
    """So many bytes that may be held at a time. Thread-safe."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._used = 0
        self._changed = threading.Condition()

    @property
    def used(self) -> int:
        return self._used

    def take(self, nbytes: int, timeout_s: float) -> bool:
        """Wait for room; False when there is none after ``timeout_s``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._used + nbytes <= self.nbytes, timeout_s):
                return False
            self._used += nbytes
        return True

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()


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
