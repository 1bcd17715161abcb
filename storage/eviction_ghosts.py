"""What other policies would hold by now: ghosts, caches of names only, each as large as the tier that is ruled.

Chunks are numbered, and what is known of a chunk stands in lists under its number: no object for each chunk, so Python's
garbage collector has nothing to walk through. ``mask`` says in bits who holds or remembers a chunk: the tier, the ghosts.

What is used is written to a log, which each ghost plays later in one go: one loop with everything at hand takes half
the time of a call for each use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice

from lmcache.keys import ChunkKey

HELD = 1  # the bit of the tier itself; those of ghosts and of what they remember follow
# How a use follows the one before: on to the parent, on to a child, or neither.
DOWN, UP, START = 0, 1, 2
# Chunks that one admission looks at; the next one goes then, whether it was used or not.
MOST_STEPS = 500
GROWTH = 1024  # numbers


class Known:
    """The chunks that somebody holds or remembers, by number. A list here has an entry for every number."""

    def __init__(self) -> None:
        self.numbers: dict[ChunkKey, int] = {}
        self.keys: list[ChunkKey | None] = []
        self.mask: list[int] = []
        self.parent: list[int] = []
        """Number of the chunk that it hangs on, or -1; ``children`` counts the known ones that hang on it."""
        self.children: list[int] = []
        self._columns: list[tuple[list[int], int]] = [
            (self.mask, 0),
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
                    self._free.append(number)
        self._hand = hand + count if hand + count < len(keys) else 0

    def _grow(self) -> None:
        size = len(self.keys)
        self.keys += [None] * GROWTH
        for column, initial in self._columns:
            column += [initial] * GROWTH
        self._free += range(size + GROWTH - 1, size - 1, -1)


class Log:
    """Uses that not all ghosts have played: the chunks, and how each follows the one before."""

    def __init__(self) -> None:
        self.chunks: list[int] = []
        self.steps: list[int] = []


class Ghost(ABC):
    """What one policy would hold, and how many hits it would have had.

    fell: when not None, gets what the tier holds and this does not hold any longer.
    """

    def __init__(self, known: Known, bit: int) -> None:
        self.bit = bit
        self.fell: OrderedDict[int, None] | None = None
        self.hits = 0
        """Since somebody set it to 0: blocks in the longest prefix that it held, of each request."""
        self.played = 0
        """Uses of the log that it has played."""
        self._mask = known.mask
        self._run, self._whole = 0, True

    def play(self, log: Log, capacity: int) -> None:
        """Use what it has not played yet, in order."""
        chunks, steps = log.chunks[self.played :], log.steps[self.played :]
        self.played = len(log.chunks)
        if chunks:
            self._score(self._play(chunks, capacity), steps)

    @abstractmethod
    def _play(self, chunks: Sequence[int], capacity: int) -> list[int]:
        """Use ``chunks``; returns for each whether it was held, as its bit or 0."""

    def _drop(self, chunk: int) -> None:
        self._mask[chunk] ^= self.bit
        if self.fell is not None and self._mask[chunk] & HELD:
            self.fell[chunk] = None

    def _take(self, chunk: int) -> None:
        self._mask[chunk] |= self.bit
        if self.fell is not None:
            self.fell.pop(chunk, None)

    def _score(self, found: Sequence[int], steps: Sequence[int]) -> None:
        """Of a chain that comes from its end, the last run of hits counts; of one from its beginning, the first."""
        if not any(found):
            self.hits += self._run
            self._run, self._whole = 0, False
            return
        hits, run, whole = self.hits, self._run, self._whole
        for hit, step in zip(found, steps, strict=True):
            if step == DOWN:
                run = run + 1 if hit else 0
            elif step == START:
                hits += run
                run, whole = (1, True) if hit else (0, False)
            elif whole and hit:
                run += 1
            else:
                whole = False
        self.hits, self._run, self._whole = hits, run, whole


class GhostLRU(Ghost):
    """Least recently used first."""

    def __init__(self, known: Known, bit: int) -> None:
        super().__init__(known, bit)
        self.order: OrderedDict[int, None] = OrderedDict()

    def _play(self, chunks: Sequence[int], capacity: int) -> list[int]:
        order, mask, bit, fell = self.order, self._mask, self.bit, self.fell
        found = []
        for chunk in chunks:
            found.append(hit := mask[chunk] & bit)
            if hit:
                order.move_to_end(chunk)
                continue
            mask[chunk] |= bit
            order[chunk] = None
            if fell is not None:
                fell.pop(chunk, None)
            while len(order) > capacity:
                oldest = order.popitem(last=False)[0]
                mask[oldest] ^= bit
                if fell is not None and mask[oldest] & HELD:
                    fell[oldest] = None
        return found


class GhostLFU(Ghost):
    """Least often used first. A chunk is moved to the group of its uses when it comes to the front of a lower one."""

    MOST_USES = 64

    def __init__(self, known: Known, bit: int) -> None:
        super().__init__(known, bit)
        self._uses = known.column()
        self._groups: list[deque[int]] = [deque() for _ in range(self.MOST_USES + 1)]
        self._count = 0

    def _play(self, chunks: Sequence[int], capacity: int) -> list[int]:
        mask, bit, uses, first = self._mask, self.bit, self._uses, self._groups[0]
        found = []
        for chunk in chunks:
            found.append(hit := mask[chunk] & bit)
            if hit:
                uses[chunk] += 1
                continue
            if self._count >= capacity:
                self._make_room(capacity)
            self._take(chunk)
            uses[chunk] = 0
            first.append(chunk)
            self._count += 1
        return found

    def _make_room(self, capacity: int) -> None:
        groups, uses, steps = self._groups, self._uses, 0
        while self._count >= capacity:
            low = 0 if groups[0] else next(low for low, group in enumerate(groups) if group)
            oldest = groups[low].popleft()
            now = min(uses[oldest], self.MOST_USES)
            steps += 1
            if now > low and steps < MOST_STEPS:
                groups[now].append(oldest)
            else:
                self._count -= 1
                self._drop(oldest)


class GhostS3FIFO(Ghost):
    """S3-FIFO, as in eviction_queues.py, with its ways to be set up.

    memory: the bit of what it remembers beside what it holds. divide: when it is full for the first time, what came
    in later is in the main queue.
    """

    def __init__(self, known: Known, bit: int, memory: int, promote_at: int, ghost_share: float, divide: bool) -> None:
        super().__init__(known, bit)
        self._memory, self._promote_at, self._ghost_share, self._divide = memory, promote_at, ghost_share, divide
        self._uses = known.column()
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._remembered: deque[int] = deque()
        self._taken = 0
        """Of those: were taken again, and stand there for nothing."""
        self._full = False

    def _play(self, chunks: Sequence[int], capacity: int) -> list[int]:
        mask, bit, uses, memory, fell = self._mask, self.bit, self._uses, self._memory, self.fell
        found = []
        for chunk in chunks:
            found.append(hit := mask[chunk] & bit)
            if hit:
                uses[chunk] += 1
                continue
            if len(self._small) + len(self._main) >= capacity:
                self._make_room(capacity)
            uses[chunk] = 0
            if mask[chunk] & memory:
                mask[chunk] ^= memory
                self._taken += 1
                self._main.append(chunk)
            else:
                self._small.append(chunk)
            mask[chunk] |= bit
            if fell is not None:
                fell.pop(chunk, None)
        return found

    def _make_room(self, capacity: int) -> None:
        small, main, uses, steps = self._small, self._main, self._uses, 0
        if not self._full:
            self._full = True
            if self._divide:
                first = capacity // 10
                main.extend(islice(small, first, None))
                small = self._small = deque(islice(small, first))
        most_main = capacity - capacity // 10
        while len(small) + len(main) >= capacity:
            if small and len(main) <= most_main:
                oldest = small.popleft()
                if uses[oldest] >= self._promote_at:
                    uses[oldest] = 0
                    main.append(oldest)
                else:
                    self._remember(oldest, int(capacity * self._ghost_share))
                    self._drop(oldest)
                continue
            oldest = main.popleft()
            steps += 1
            if uses[oldest] and steps < MOST_STEPS:
                uses[oldest] = min(uses[oldest], 3) - 1
                main.append(oldest)
            else:
                self._drop(oldest)

    def _remember(self, chunk: int, most: int) -> None:
        remembered, mask = self._remembered, self._mask
        mask[chunk] |= self._memory
        remembered.append(chunk)
        while len(remembered) - self._taken > most:
            oldest = remembered.popleft()
            if mask[oldest] & self._memory:
                mask[oldest] ^= self._memory
            else:
                self._taken -= 1
