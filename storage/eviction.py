"""Which chunk goes first when there is no room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from lmcache.keys import ChunkKey


class EvictionPolicy(ABC):
    """Order of eviction over the keys of one tier. The tier calls it under its own lock."""

    @abstractmethod
    def add(self, key: ChunkKey, nbytes: int) -> None:
        """``key`` came in."""

    @abstractmethod
    def touch(self, key: ChunkKey) -> None:
        """``key`` was used."""

    @abstractmethod
    def remove(self, key: ChunkKey) -> None:
        """``key`` is gone. Unknown keys are ignored."""

    @abstractmethod
    def victims(self) -> Iterator[ChunkKey]:
        """Keys in the order in which they should go. The policy must not change while it is iterated."""


class LRU(EvictionPolicy):
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey, nbytes: int) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: ChunkKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: ChunkKey) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[ChunkKey]:
        return iter(self._order)
