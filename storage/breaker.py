"""Circuit breaker: a tier that keeps failing is left alone for a while, then probed."""

from __future__ import annotations

import threading
import time

from lmcache.config import BreakerConfig


class CircuitBreaker:
    """closed -> (``failures`` in a row) -> open -> (``cooldown_s``) -> half open: one probe -> closed, or open again.

    Whoever is allowed reports ``succeeded`` or ``failed``; until the probe has reported, nobody else is allowed.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._open_until = 0.0
        self._probing: int | None = None  # the thread of the probe
        self.failures = 0
        """Failures in a row."""

    @property
    def is_open(self) -> bool:
        return self.failures >= self._config.failures

    @property
    def ready(self) -> bool:
        """Whether a call would be allowed now; takes no probe."""
        return not self.is_open or (self._probing is None and time.monotonic() >= self._open_until)

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half_open``: the next call is a probe, or one is under way."""
        if not self.is_open:
            return "closed"
        return "half_open" if self._probing is not None or self.ready else "open"

    def allows(self) -> bool:
        """Whether a call may go through now. While open this lets the probe through, and nobody beside it."""
        with self._lock:
            if not self.is_open:
                return True
            if self._probing is not None or time.monotonic() < self._open_until:
                return False
            self._probing = threading.get_ident()
            return True

    def succeeded(self) -> None:
        with self._lock:
            self.failures = 0
            self._probing = None

    def failed(self) -> None:
        with self._lock:
            self.failures += 1
            self._probing = None
            self._open_until = time.monotonic() + self._config.cooldown_s

    def undecided(self) -> None:
        """This thread's call says nothing of the tier: if it was the probe, another may fly."""
        with self._lock:
            if self._probing == threading.get_ident():
                self._probing = None
