"""A backend that fails, hangs and damages what is read, at given rates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from pydantic import Field

from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer
from lmcache.storage.registry import build_backend
from lmcache.storage.wrappers.base import Dice, Operation, Wrapper, WrapperConfig

T = TypeVar("T")


class FaultsConfig(WrapperConfig):
    """Options of ``{type: faults}``. Each rate is a probability per call, 0 to 1."""

    operations: tuple[Operation, ...] = Field(
        ("sizes", "contains", "get", "put", "remove", "clear"), description="calls that may go wrong"
    )
    error_rate: float = Field(0.0, ge=0, le=1, description="calls that raise StorageError, before anything is done")
    hang_rate: float = Field(0.0, ge=0, le=1, description="calls that hang for hang_s and then go on")
    hang_s: float = Field(5.0, ge=0, le=600, description="seconds of a hang; close() ends it")
    corrupt_rate: float = Field(0.0, ge=0, le=1, description="reads of which one bit of one payload is wrong")
    short_rate: float = Field(0.0, ge=0, le=1, description="reads of which one payload comes only half")
    seed: int = Field(0, description="of all dice")


class Faults(Wrapper):
    """A place that fails. Wrong payloads are handed on as right: what is around this must find them."""

    name: ClassVar[str] = "faults"
    Config = FaultsConfig

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self._dice = Dice(config.seed)
        self._closed = threading.Event()
        self.inner = build_backend(config.inner, "faults.inner")

    def close(self) -> None:
        self._closed.set()
        super().close()

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        affected = "get" in self._config.operations and len(into) > 0
        short = affected and self._dice.roll() < self._config.short_rate
        corrupt = affected and self._dice.roll() < self._config.corrupt_rate
        victim = into[int(self._dice.roll() * len(into))] if short or corrupt else None
        rest = bytes(victim.view[victim.nbytes // 2 :]) if victim is not None and short else b""
        count = super().get(keys, into)
        if victim is not None:
            view = victim.view
            if short:
                view[victim.nbytes // 2 :] = rest  # what was there before
            if corrupt:
                view[int(self._dice.roll() * victim.nbytes)] ^= 1 << int(self._dice.roll() * 8)
        return count

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        if operation in self._config.operations:
            if self._dice.roll() < self._config.hang_rate:
                self._closed.wait(self._config.hang_s)
            if self._dice.roll() < self._config.error_rate:
                raise StorageError(f"{operation}: an injected fault")
        return call()
