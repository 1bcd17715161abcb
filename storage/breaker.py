"""Circuit breaker: a tier that keeps failing is left alone for a while, then probed."""

from __future__ import annotations

import threading
import time

from lmcache.config import BreakerConfig


class CircuitBreaker:
    """closed -> (``failures`` in a row) -> open -> (``cooldown_s``) -> one probe -> closed, or open again."""

    def __init__(self, config: BreakerConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._failures = 0
        self._open_until = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self._config.failures

    def allows(self) -> bool:
        """Whether a call may go through now. While open this lets one call a cooldown through, the probe."""
        with self._lock:
            if not self.is_open:
                return True
            now = time.monotonic()
            if now < self._open_until:
                return False
            self._open_until = now + self._config.cooldown_s
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            self._open_until = time.monotonic() + self._config.cooldown_s
