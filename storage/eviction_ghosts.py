"""What other policies would hold by now: ghosts, caches of names only, each as large as the tier that is ruled.

Chunks are numbered, and what is known of a chunk stands in lists under its number: no object for each chunk, so Python's
garbage collector has nothing to walk through. ``mask`` says in bits who holds a chunk: the tier, and each ghost.

A ghost does little on a hit: how often a chunk was used is counted once for all of them (``uses``), and each notes from
where it counts (``_base``). No step looks at more than ``MOST_STEPS`` chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from itertools import islice

from lmcache.keys import ChunkKey

HELD = 1  # the bit of the tier itself; those of ghosts and of what they remember follow
MOST_STEPS = 500
# Chunks looked at for each use, whether somebody still needs to know them.
SWEEP = 3


class Known:
    """The chunks that somebody holds or remembers, by number."""

    def __init__(self) -> None:
        self.numbers: dict[ChunkKey, int] = {}
        self.keys: list[ChunkKey | None] = []
        self.mask: list[int] = []
        self.uses: list[int] = []
        self.parent: list[int] = []
        """Number of the chunk that it hangs on, or -1; ``children`` counts the known ones that hang on it."""
        self.children: list[int] = []
        self._columns: list[tuple[list[int], int]] = [
            (self.mask, 0),
            (self.uses, 0),
            (self.parent, -1),
            (self.children, 0),
        ]
        self._free: list[int] = []
        self._hand = 0

    def column(self, initial: int = 0) -> list[int]:
        """One more list of numbers, one for each chunk."""
        column: list[int] = []
        self._columns.append((column, initial))
        return column

    def number(self, key: ChunkKey) -> int:
        """That of ``key``, which is known from now on."""
        number = self.numbers.get(key)
        if number is not None:
            return number
        if self._free:
            number = self._free.pop()
            self.keys[number] = key
            for column, initial in self._columns:
                column[number] = initial
        else:
            number = len(self.keys)
            self.keys.append(key)
            for column, initial in self._columns:
                column.append(initial)
        self.numbers[key] = number
        return number

    def link(self, number: int, parent: int) -> None:
        self.parent[number] = parent
        self.children[parent] += 1

    def sweep(self) -> None:
        """Forget chunks that nobody holds, remembers or hangs on, of the next few."""
        mask, hand = self.mask, self._hand
        for number in range(hand, min(hand + SWEEP, len(mask))):
            if not mask[number] and (key := self.keys[number]) is not None:
                if (parent := self.parent[number]) >= 0:
                    self.children[parent] -= 1
                    self.parent[number] = -1
                if not self.children[number]:
                    del self.numbers[key]
                    self.keys[number] = None
                    self._free.append(number)
        self._hand = hand + SWEEP if hand + SWEEP < len(mask) else 0


class Ghost(ABC):
    """What one policy would hold. ``fell``: when not None, takes what the tier holds and this does no longer."""

    def __init__(self, known: Known, bit: int) -> None:
        self.bit = bit
        self.fell: OrderedDict[int, None] | None = None
        self._mask, self._uses = known.mask, known.uses

    @abstractmethod
    def admit(self, chunk: int, capacity: int) -> None:
        """``chunk``, which it does not hold, is used: make room and take it. Its bit is the caller's to set."""

    def _drop(self, chunk: int) -> None:
        self._mask[chunk] ^= self.bit
        if self.fell is not None and self._mask[chunk] & HELD:
            self.fell[chunk] = None


class GhostLRU(Ghost):
    """Least recently used first. The only one that wants to hear of every hit: ``order.move_to_end``."""

    def __init__(self, known: Known, bit: int) -> None:
        super().__init__(known, bit)
        self.order: OrderedDict[int, None] = OrderedDict()

    def admit(self, chunk: int, capacity: int) -> None:
        order = self.order
        order[chunk] = None
        while len(order) > capacity:
            self._drop(order.popitem(last=False)[0])


class GhostMRU(Ghost):
    """Most recently used first: that is what was used just before."""

    def __init__(self, known: Known, bit: int) -> None:
        super().__init__(known, bit)
        self._held: dict[int, None] = {}
        self.newest = -1

    def admit(self, chunk: int, capacity: int) -> None:
        held = self._held
        if len(held) >= capacity and self.newest in held:
            del held[self.newest]
            self._drop(self.newest)
        while len(held) >= capacity:
            self._drop(held.popitem()[0])
        held[chunk] = None


class GhostLFU(Ghost):
    """Least often used first. A chunk is moved to the group of its uses when it comes to the front of a lower one."""

    MOST_USES = 64

    def __init__(self, known: Known, bit: int) -> None:
        super().__init__(known, bit)
        self._base = known.column()
        self._groups: list[deque[int]] = [deque() for _ in range(self.MOST_USES + 1)]
        self._count = 0

    def admit(self, chunk: int, capacity: int) -> None:
        groups, uses, base, steps = self._groups, self._uses, self._base, 0
        while self._count >= capacity:
            low = next(low for low, group in enumerate(groups) if group)
            oldest = groups[low].popleft()
            now = min(uses[oldest] - base[oldest], self.MOST_USES)
            steps += 1
            if now > low and steps < MOST_STEPS:
                groups[now].append(oldest)
            else:
                self._count -= 1
                self._drop(oldest)
        base[chunk] = uses[chunk]
        groups[0].append(chunk)
        self._count += 1


class GhostSieve(Ghost):
    """SIEVE, as in eviction_queues.py."""

    def __init__(self, known: Known, bit: int) -> None:
        super().__init__(known, bit)
        self._base = known.column()
        self._behind: deque[int] = deque()
        self._ahead: deque[int] = deque()
        self._count = 0

    def admit(self, chunk: int, capacity: int) -> None:
        uses, base, steps = self._uses, self._base, 0
        while self._count >= capacity:
            oldest = self._ahead.popleft()
            steps += 1
            if uses[oldest] > base[oldest] and steps < MOST_STEPS:
                base[oldest] = uses[oldest]
                self._behind.append(oldest)
            else:
                self._count -= 1
                self._drop(oldest)
            if not self._ahead:
                self._ahead, self._behind = self._behind, self._ahead
        base[chunk] = uses[chunk]
        self._ahead.append(chunk)
        self._count += 1


class GhostS3FIFO(Ghost):
    """S3-FIFO, as in eviction_queues.py, with its two ways to be set up.

    memory: the bit of what it remembers beside what it holds.
    """

    def __init__(self, known: Known, bit: int, memory: int, promote_at: int, ghost_share: float, divide: bool) -> None:
        super().__init__(known, bit)
        self._memory, self._promote_at, self._ghost_share, self._divide = memory, promote_at, ghost_share, divide
        self._base = known.column()
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._remembered: OrderedDict[int, None] = OrderedDict()
        self._full = False

    def admit(self, chunk: int, capacity: int) -> None:
        small, main = self._small, self._main
        if len(small) + len(main) >= capacity:
            self._make_room(capacity)
        self._base[chunk] = self._uses[chunk]
        if self._mask[chunk] & self._memory:
            self._mask[chunk] ^= self._memory
            del self._remembered[chunk]
            self._main.append(chunk)
        else:
            self._small.append(chunk)

    def _make_room(self, capacity: int) -> None:
        small, main, uses, base, steps = self._small, self._main, self._uses, self._base, 0
        if not self._full:
            self._full = True
            if self._divide:
                first = capacity // 10
                main.extend(islice(small, first, None))
                small = self._small = deque(islice(small, first))
        most_main = capacity - capacity // 10
        while len(small) + len(main) >= capacity:
            steps += 1
            if small and len(main) <= most_main:
                oldest = small.popleft()
                if uses[oldest] - base[oldest] >= self._promote_at:
                    base[oldest] = uses[oldest]
                    main.append(oldest)
                else:
                    self._remember(oldest, int(capacity * self._ghost_share))
                    self._drop(oldest)
                continue
            oldest = main.popleft()
            if (used := uses[oldest] - base[oldest]) and steps < MOST_STEPS:
                base[oldest] = uses[oldest] - min(used, 3) + 1
                main.append(oldest)
            else:
                self._drop(oldest)

    def _remember(self, chunk: int, most: int) -> None:
        self._mask[chunk] |= self._memory
        self._remembered[chunk] = None
        while len(self._remembered) > most:
            self._mask[self._remembered.popitem(last=False)[0]] ^= self._memory
