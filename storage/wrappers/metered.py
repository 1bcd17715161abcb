"""Calls of a backend as metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from pydantic import Field

from lmcache import metrics
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer
from lmcache.storage.registry import build_backend
from lmcache.storage.wrappers.base import Operation, Wrapper, WrapperConfig

T = TypeVar("T")


class MeteredConfig(WrapperConfig):
    """Options of ``{type: metered}``."""

    label: str | None = Field(None, description="name in the metrics; null: that of the backend inside")


class Metered(Wrapper):
    """Histograms of the duration and the bytes of every call, and a count of those that raise."""

    name: ClassVar[str] = "metered"
    Config = MeteredConfig

    def __init__(self, config: MeteredConfig) -> None:
        self.inner = build_backend(config.inner, "metered.inner")
        self._label = config.label or self.inner.name

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        count = super().get(keys, into)
        self._moved("get", sum(buffer.nbytes for buffer in into[:count]))
        return count

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        count = super().put(keys, buffers)
        self._moved("put", sum(buffer.nbytes for buffer in buffers))
        return count

    def _moved(self, operation: Operation, nbytes: int) -> None:
        metrics.BACKEND_BYTES.labels(self._label, operation).observe(nbytes)

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        begun = time.perf_counter()
        try:
            return call()
        except BaseException:
            metrics.BACKEND_ERRORS.labels(self._label, operation).inc()
            raise
        finally:
            metrics.BACKEND_SECONDS.labels(self._label, operation).observe(time.perf_counter() - begun)
