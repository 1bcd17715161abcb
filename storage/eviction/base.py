"""Which chunk goes first when there is no room: the contract, and the policies that need one order.

Others: queues.py (S3-FIFO, SIEVE), reuse.py (ours).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from lmcache.keys import ChunkKey


class Place(NamedTuple):
    """Where a chunk stands in its chain: token positions ``[start, stop)`` behind ``parent``, None for the first.

    ``stop`` is ``start`` where the positions are not known.
    """

    parent: ChunkKey | None
    start: int
    stop: int


class EvictionPolicy(ABC):
    """Order of eviction over the keys of one tier. The tier calls it under its own lock.

    A tier that needs room takes keys from ``victims()`` until it has enough, leaves out those that are leased, and
    calls ``remove`` for the ones it lets go of. A policy that tells eviction from other removals does it by that: a
    key that is removed after ``victims()`` yielded it, with no ``add`` or ``touch`` in between, was evicted.

    Costs: ``add``, ``touch`` and ``remove`` are O(1) amortised, and so is each key of ``victims()`` up to the last one
    that is taken, beside the leased ones that are passed over.
    """

    @abstractmethod
    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        """``key`` came in. One that is known already counts as touched.

        place: where it stands among others; None when nobody knows.
        """

    @abstractmethod
    def touch(self, key: ChunkKey) -> None:
        """``key`` was used. Unknown keys are ignored."""

    @abstractmethod
    def remove(self, key: ChunkKey) -> None:
        """``key`` is gone. Unknown keys are ignored."""

    @abstractmethod
    def victims(self) -> Iterator[ChunkKey]:
        """Every key once, in the order in which they should go.

        The policy must not change while it is iterated; iterating does not change the order.
        """


class LRU(EvictionPolicy):
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: ChunkKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: ChunkKey) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[ChunkKey]:
        return iter(self._order)


class MRU(LRU):
    """Most recently used first: for scans that come around again and are longer than the cache."""

    def victims(self) -> Iterator[ChunkKey]:
        return reversed(self._order)


class FIFO(EvictionPolicy):
    """First in, first out."""

    def __init__(self) -> None:
        self._order: dict[ChunkKey, None] = {}

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        self._order.setdefault(key, None)

    def touch(self, key: ChunkKey) -> None:
        pass

    def remove(self, key: ChunkKey) -> None:
        self._order.pop(key, None)

    def victims(self) -> Iterator[ChunkKey]:
        return iter(self._order)


class LFU(EvictionPolicy):
    """Least often used first, and among those the least recently used. What is gone starts from one again."""

    def __init__(self) -> None:
        self._uses: dict[ChunkKey, int] = {}
        self._groups: dict[int, OrderedDict[ChunkKey, None]] = {}
        self._counts: list[int] = []
        """The keys of ``_groups``, ascending; none of them is empty."""

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        if key in self._uses:
            self.touch(key)
        else:
            self._enter(key, 1)

    def touch(self, key: ChunkKey) -> None:
        if uses := self._uses.get(key):
            self._leave(key, uses)
            self._enter(key, uses + 1)

    def remove(self, key: ChunkKey) -> None:
        if uses := self._uses.pop(key, None):
            self._leave(key, uses)

    def victims(self) -> Iterator[ChunkKey]:
        return (key for count in self._counts for key in self._groups[count])

    def _enter(self, key: ChunkKey, uses: int) -> None:
        self._uses[key] = uses
        if (group := self._groups.get(uses)) is None:
            group = self._groups[uses] = OrderedDict()
            insort(self._counts, uses)
        group[key] = None

    def _leave(self, key: ChunkKey, uses: int) -> None:
        group = self._groups[uses]
        del group[key]
        if not group:
            del self._groups[uses]
            del self._counts[bisect_left(self._counts, uses)]
