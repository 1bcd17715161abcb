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
GROWTH = 1024  # numbers


class Known:
    """The chunks that somebody holds or remembers, by number. A list here has an entry for every number."""

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
        """One more list. Whoever writes to it restores ``initial`` before it lets a chunk go, or sets it at first."""
        column: list[int] = []
        self._columns.append((column, initial))
        return column

    def number(self, key: ChunkKey) -> int:
        """That of ``key``, which is known from now on."""
        number = self.numbers.get(key)
        if number is None:
            if not self._free:
                self._grow()
            number = self._free.pop()
            self.keys[number] = key
            self.numbers[key] = number
        return number

    def sweep(self, count: int) -> None:
        """Forget those of the next ``count`` numbers that nobody holds, remembers or hangs on."""
        hand, keys = self._hand, self.keys
        for number, mask in enumerate(self.mask[hand : hand + count], hand):
            if not mask and (key := keys[number]) is not None:
                if (parent := self.parent[number]) >= 0:
                    self.children[parent] -= 1
                    self.parent[number] = -1
                if not self.children[number]:
                    del self.numbers[key]
                    keys[number] = None
                    self.uses[number] = 0
                    self._free.append(number)
        self._hand = hand + count if hand + count < len(keys) else 0

    def _grow(self) -> None:
        size = len(self.keys)
        self.keys += [None] * GROWTH
        for column, initial in self._columns:
            column += [initial] * GROWTH
        self._free += range(size + GROWTH - 1, size - 1, -1)


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
            low = 0 if groups[0] else next(low for low, group in enumerate(groups) if group)
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
        self._remembered: deque[int] = deque()
        self._forgotten = 0  # of those: were taken again, and stand there for nothing
        self._full = False

    def admit(self, chunk: int, capacity: int) -> None:
        small, main = self._small, self._main
        if len(small) + len(main) >= capacity:
            self._make_room(capacity)
        self._base[chunk] = self._uses[chunk]
        if self._mask[chunk] & self._memory:
            self._mask[chunk] ^= self._memory
            self._forgotten += 1
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
        remembered, mask = self._remembered, self._mask
        mask[chunk] |= self._memory
        remembered.append(chunk)
        while len(remembered) - self._forgotten > most:
            oldest = remembered.popleft()
            if mask[oldest] & self._memory:
                mask[oldest] ^= self._memory
            else:
                self._forgotten -= 1
