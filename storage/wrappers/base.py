"""What backends share that stand around another one: metered, latency, faults, audit.

{type: metered, inner: {type: latency, fixed_s: 0.002, inner: {type: disk, path: ...}}}
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field

from lmcache.config import Config
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend

T = TypeVar("T")
Operation = Literal["sizes", "contains", "get", "put", "remove", "clear"]


class WrapperConfig(Config):
    """What every wrapper takes."""

    inner: dict[str, Any] = Field(description="the backend inside: {type: disk, ...}")


class Wrapper(StorageBackend):
    """Passes every call on; a subclass says what happens around it in ``_around``."""

    inner: StorageBackend

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        """``call()``, and what this wrapper is for. nbytes: of the payload that is to be read or written."""
        raise NotImplementedError

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        return self._around("sizes", keys, 0, lambda: self.inner.sizes(keys))

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        return self._around("contains", keys, 0, lambda: self.inner.contains(keys))

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        return self._around("get", keys, sum(b.nbytes for b in into), lambda: self.inner.get(keys, into))

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return self._around("put", keys, sum(b.nbytes for b in buffers), lambda: self.inner.put(keys, buffers))

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return self._around("remove", keys, 0, lambda: self.inner.remove(keys))

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self._around("clear", (), 0, lambda: self.inner.clear(fingerprint))

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        return self._around("clear", (), 0, lambda: self.inner.clear_tenant(tenant, fingerprint))

    def keys(self) -> list[ChunkKey] | None:
        return self.inner.keys()

    def close(self) -> None:
        self.inner.close()


class Dice:
    """Random numbers from 0 to 1, the same sequence for the same seed. Thread-safe."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def roll(self) -> float:
        with self._lock:
            return self._random.random()
