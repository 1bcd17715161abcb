"""Bounded retries with full jitter, inside one deadline: while a server restarts, or another takes its place."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from pydantic import Field

from lmcache.config import Config

T = TypeVar("T")


class RetryConfig(Config):
    """How often, and how far apart, something that failed is tried again."""

    attempts: int = Field(3, ge=1, description="tries in all, the first included")
    base_s: float = Field(0.05, ge=0, description="seconds that the first pause is at most; it doubles each time")
    cap_s: float = Field(0.5, ge=0, description="seconds that no pause exceeds")


def retrying(
    call: Callable[[], T],
    config: RetryConfig,
    *,
    deadline: float,
    on: tuple[type[Exception], ...],
    between: Callable[[], object] = lambda: None,
    sleep: Callable[[float], object] = time.sleep,
    jitter: Callable[[float, float], float] = random.uniform,
) -> T:
    """``call()``, again after a pause when it raises one of ``on``; the last error is raised.

    Pauses are uniform between 0 and ``base_s * 2**n``, so that clients that failed together do not come back together.
    deadline: on time.monotonic(); no try starts after it, and no pause is begun that would pass it. ``call`` has to
        keep to it itself. between: runs before each further try.
    """
    for attempt in range(1, config.attempts + 1):
        try:
            return call()
        except on:
            pause = jitter(0.0, min(config.cap_s, config.base_s * 2.0 ** (attempt - 1)))
            if attempt == config.attempts or time.monotonic() + pause >= deadline:
                raise
        sleep(pause)
        between()
    raise AssertionError("attempts is at least 1")
