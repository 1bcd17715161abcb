"""A place that takes every write and has nothing: what an experiment puts where a tier would be, to see its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lmcache.config import Config
from lmcache.errors import ClosedError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend


class BlackholeConfig(Config):
    """Options of ``{type: remote, url: "blackhole://"}``."""

    url: str = Field("blackhole://", description="blackhole://")


class BlackholeBackend(StorageBackend):
    """Every write succeeds and none is held, as its answer says; every read is a miss."""

    name: ClassVar[str] = "blackhole"
    Config = BlackholeConfig

    def __init__(self, config: BlackholeConfig) -> None:
        self._closed = False

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._check_open()
        return []

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        self._check_open()
        return 0

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._check_open()
        return 0

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self._check_open()
        return 0

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._check_open()
        return 0

    def keys(self) -> list[ChunkKey]:
        self._check_open()
        return []

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the blackhole is closed")
