"""Circuit breaker: a tier that keeps failing is left alone for a while, then probed. Reads and writes each have one."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Literal

from lmcache import metrics
from lmcache.config import BreakerConfig

logger = logging.getLogger(__name__)


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
        """The call of this thread proved nothing about the tier; if it was the probe, another call may be it."""
        with self._lock:
            if self._probing == threading.get_ident():
                self._probing = None


@dataclass(frozen=True)
class SideHealth:
    """How the reads, or the writes, of a tier fare."""

    breaker: str
    """``closed``, ``open`` or ``half_open``."""
    failures: int
    """Failures in a row."""
    last_error: str | None
    last_error_age_s: float | None


class Side:
    """The reads of a tier, or its writes (and removals): one can fail where the other works, as on a full disk."""

    def __init__(self, tier: str, operation: Literal["read", "write"], config: BreakerConfig) -> None:
        self.breaker = CircuitBreaker(config)
        self._tier = tier
        self._operation = operation
        self._last_error: tuple[str, float] | None = None
        metrics.TIER_BREAKER_OPEN.labels(tier, operation).set(0)

    def failed(self, why: str) -> None:
        """Count a failure; the breaker opens after some."""
        metrics.TIER_ERRORS.labels(self._tier, self._operation).inc()
        self._last_error = why, time.monotonic()
        was_open = self.breaker.is_open
        self.breaker.failed()
        metrics.TIER_BREAKER_OPEN.labels(self._tier, self._operation).set(self.breaker.is_open)
        if not was_open:
            then = f"; no {self._operation}s for a while" if self.breaker.is_open else ""
            logger.warning("tier %s: a %s failed: %s%s", self._tier, self._operation, why, then)

    def succeeded(self) -> None:
        was_open = self.breaker.is_open
        self.breaker.succeeded()
        if was_open:
            metrics.TIER_BREAKER_OPEN.labels(self._tier, self._operation).set(0)
            logger.warning("tier %s: %ss work again", self._tier, self._operation)

    def health(self) -> SideHealth:
        message, at = self._last_error or (None, None)
        age_s = None if at is None else time.monotonic() - at
        return SideHealth(self.breaker.state, self.breaker.failures, message, age_s)
