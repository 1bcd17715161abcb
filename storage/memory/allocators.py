"""Which bytes of a pool are free: three ways to keep track, behind one interface.

slots      |  slot 0  |  slot 1  |  slot 2  |     one size, O(1), nothing to fragment
best_fit   | used |   free   | used | free  |     the smallest free run that fits; a freed block merges with both sides
auto       best_fit, but a freed block waits unmerged for the next request of its size, which gets it in O(1)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort

from lmcache.errors import ConfigError

PAGE = 4096


class Allocator(ABC):
    """Free and used bytes of ``[0, capacity)``. Not thread-safe: its pool calls it under a lock."""

    largest: int
    """Bytes of the largest buffer that an empty pool can serve."""

    @abstractmethod
    def rounded(self, nbytes: int) -> int:
        """Bytes that a buffer of ``nbytes`` takes up."""

    @abstractmethod
    def take(self, size: int) -> int | None:
        """Start of a free block of ``size`` (as ``rounded`` gives it), which is used from now on; None: no room."""

    @abstractmethod
    def give(self, start: int, size: int) -> None:
        """The block is free again."""


class Slots(Allocator):
    """Blocks of one size. A smaller buffer wastes the rest of its slot, a larger one has no room."""

    def __init__(self, capacity: int, slot: int) -> None:
        self._slot = -(-slot // PAGE) * PAGE
        if self._slot > capacity:
            raise ConfigError(f"memory.slot is {slot} bytes, more than memory.capacity ({capacity})")
        self.largest = self._slot
        # Last first, so that the lowest addresses are used first.
        self._free = list(range(capacity // self._slot * self._slot - self._slot, -1, -self._slot))

    def rounded(self, nbytes: int) -> int:
        return max(self._slot, -(-nbytes // PAGE) * PAGE)

    def take(self, size: int) -> int | None:
        return self._free.pop() if self._free and size <= self._slot else None

    def give(self, start: int, size: int) -> None:
        self._free.append(start)


class BestFit(Allocator):
    """The smallest free run that is long enough; free neighbours always merge."""

    def __init__(self, capacity: int) -> None:
        self.largest = capacity
        self._by_start: dict[int, int] = {}  # start of a free run -> its length
        self._by_end: dict[int, int] = {}  # its end -> its start
        self._sizes: list[tuple[int, int]] = []  # (length, start), sorted
        self._add(0, capacity)

    def rounded(self, nbytes: int) -> int:
        return -(-nbytes // PAGE) * PAGE

    def runs(self) -> list[tuple[int, int]]:
        """(start, length) of the free runs, by address."""
        return sorted(self._by_start.items())

    def take(self, size: int) -> int | None:
        index = bisect_left(self._sizes, (size, -1))
        if index == len(self._sizes):
            return None
        length, start = self._sizes[index]
        self._drop(start, length)
        if length > size:
            self._add(start + size, length - size)
        return start

    def give(self, start: int, size: int) -> None:
        begin, length = start, size
        if (before := self._by_end.get(start)) is not None:
            self._drop(before, start - before)
            begin, length = before, size + start - before
        if (after := self._by_start.get(start + size)) is not None:
            self._drop(start + size, after)
            length += after
        self._add(begin, length)

    def _drop(self, start: int, length: int) -> None:
        del self._by_start[start], self._by_end[start + length]
        del self._sizes[bisect_left(self._sizes, (length, start))]

    def _add(self, start: int, length: int) -> None:
        self._by_start[start] = length
        self._by_end[start + length] = start
        insort(self._sizes, (length, start))


class Recycling(BestFit):
    """Reuses a freed block of exactly the wanted size where there is one, and is best fit otherwise.

    Full chunks all have one size, so they come from the waiting blocks; packed chunks vary, and for them the waiting
    blocks merge as soon as no free run is long enough. What best fit can serve, this serves.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._waiting: dict[int, list[int]] = {}  # size -> starts

    def runs(self) -> list[tuple[int, int]]:
        self._merge()
        return super().runs()

    def take(self, size: int) -> int | None:
        if starts := self._waiting.get(size):
            return starts.pop()
        start = super().take(size)
        if start is None and self._waiting:
            self._merge()
            start = super().take(size)
        return start

    def give(self, start: int, size: int) -> None:
        self._waiting.setdefault(size, []).append(start)

    def _merge(self) -> None:
        for size, starts in self._waiting.items():
            for start in starts:
                super().give(start, size)
        self._waiting.clear()


def build_allocator(name: str, capacity: int, slot: int | None) -> Allocator:
    """``auto``, ``best_fit`` or ``slots`` (of ``slot`` bytes)."""
    if name == "slots":
        if slot is None:
            raise ConfigError("memory.allocator slots needs memory.slot, the bytes of one slot (a full chunk's size)")
        return Slots(capacity, slot)
    return BestFit(capacity) if name == "best_fit" else Recycling(capacity)
