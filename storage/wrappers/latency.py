"""Delays around a backend, as if it were further away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from pydantic import ByteSize, Field

from lmcache.keys import ChunkKey
from lmcache.storage.registry import build_backend
from lmcache.storage.wrappers.base import Dice, Operation, Wrapper, WrapperConfig

T = TypeVar("T")


class LatencyConfig(WrapperConfig):
    """Options of ``{type: latency}``."""

    fixed_s: float = Field(0.0, ge=0, description="seconds that every call takes longer")
    bytes_per_s: ByteSize | None = Field(None, gt=0, description="rate of payload bytes, as 2GiB; null: no limit")
    jitter: float = Field(0.0, ge=0, le=1, description="share by which a delay varies, up or down")
    seed: int = Field(0, description="of the jitter")


class Latency(Wrapper):
    """A place that is further away. Calls wait side by side, so the rate is that of each, not of all together."""

    name: ClassVar[str] = "latency"
    Config = LatencyConfig

    def __init__(self, config: LatencyConfig) -> None:
        self._config = config
        self._dice = Dice(config.seed)
        self._closed = threading.Event()
        self.inner = build_backend(config.inner, "latency.inner")

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        delay = self._config.fixed_s
        if self._config.bytes_per_s is not None:
            delay += nbytes / self._config.bytes_per_s
        delay *= 1 + self._config.jitter * (2 * self._dice.roll() - 1)
        if delay > 0:
            self._closed.wait(delay)
        return call()
