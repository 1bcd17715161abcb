"""What other policies would hold by now: ghosts, caches of names only, each as large as the tier that is ruled.

Chunks that came in together and hang on one another are one segment, until a request goes another way in the middle of
them. They are used together, and go from the end, so what a ghost holds of a segment is one number, ``kept``:

    segment  [ c0 c1 c2 c3 c4 c5 ]        kept = 4: c0 to c3 are held, c4 and c5 are gone
    a request for c0 c1 x y        ──▶    [ c0 c1 ] ── [ c2 c3 c4 c5 ]
                                             └────── [ x y ]

So a ghost's work is for each segment of a request, not for each chunk, and several ghosts take less time than the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from lmcache.keys import ChunkKey

# How the part of a chain that is used now follows what was used before: its parents, its children, or neither.
DOWN, UP, START = 0, 1, 2
# A chunk's place in ``Segments.places``: segment << PLACE_BITS | index.
PLACE_BITS = 16
INDEX = (1 << PLACE_BITS) - 1
NOTHING = -1
# The place of a chunk that came in, and has no segment yet.
PENDING = -1
# Segments that one use looks at; the next one goes then, whether it was used or not.
MOST_STEPS = 100
GROWTH = 256  # segments


class Segments:
    """The chunks that somebody holds or remembers, by segment. A list here has an entry for every segment."""

    def __init__(self) -> None:
        self.places: dict[ChunkKey, int] = {}
        self.keys: list[list[ChunkKey]] = []
        """From the first to the last; empty: free."""
        self.size: list[int] = []
        self.above: list[int] = []
        """The segment on whose end it hangs, or -1; ``children``: segments that hang on its own."""
        self.children: list[int] = []
        self.held: list[int] = []
        """Bit n: the tier holds chunk n."""
        self.users: list[int] = []
        """Bits of the ghosts that hold it, or some of it, or remember it."""
        self.uses: list[int] = []
        """How often it was used, from wherever its number counts; ghosts note from where they count (``_base``)."""
        self._columns: list[tuple[list[int], int]] = []
        self._free: list[int] = []
        self._hand = 0

    def column(self, initial: int = 0) -> list[int]:
        """One more list. It is ``initial`` for new numbers; who writes to it sees to it that it is for freed ones, or
        sets it at first."""
        column: list[int] = []
        self._columns.append((column, initial))
        return column

    def new(self, keys: list[ChunkKey], above: int) -> int:
        """A segment of ``keys`` that hangs on ``above``."""
        if not self._free:
            self._grow()
        segment = self._free.pop()
        self.keys[segment] = keys
        place = segment << PLACE_BITS
        self.places.update(zip(keys, range(place, place + len(keys)), strict=True))
        self.size[segment] = len(keys)
        self.above[segment] = above
        if above >= 0:
            self.children[above] += 1
        return segment

    def split(self, segment: int, index: int) -> int:
        """Cut off the chunks before ``index``; returns their segment. The rest hangs on it, and keeps its number."""
        keys, held, above = self.keys[segment], self.held[segment], self.above[segment]
        head = self.new(keys[:index], NOTHING)
        self.above[head] = above
        self.above[segment], self.children[head] = head, 1
        self.users[head], self.uses[head] = self.users[segment], self.uses[segment]
        self.held[head], self.held[segment] = held & ((1 << index) - 1), held >> index
        self.keys[segment] = rest = keys[index:]
        self.size[segment] = len(rest)
        place = segment << PLACE_BITS
        self.places.update(zip(rest, range(place, place + len(rest)), strict=True))
        return head

    def sweep(self, count: int) -> None:
        """Forget those of the next ``count`` segments that nobody holds, remembers or hangs on."""
        hand, users, held = self._hand, self.users, self.held
        for segment in range(hand, min(hand + count, len(users))):
            if not users[segment] and not held[segment] and (keys := self.keys[segment]):
                if (above := self.above[segment]) >= 0:
                    self.children[above] -= 1
                    self.above[segment] = NOTHING
                if not self.children[segment]:
                    for key in keys:
                        del self.places[key]
                    self.keys[segment] = []
                    self._free.append(segment)
        self._hand = hand + count if hand + count < len(users) else 0

    def _grow(self) -> None:
        start = len(self.keys)
        self.keys += ([] for _ in range(GROWTH))
        for column in (self.size, self.children, self.held, self.users, self.uses):
            column += [0] * GROWTH
        self.above += [NOTHING] * GROWTH
        for column, initial in self._columns:
            column += [initial] * GROWTH
        self._free += range(start + GROWTH - 1, start - 1, -1)


class Ghost(ABC):
    """What one policy would hold, and how many hits it would have had.

    fell: when not None, the segments of which the tier holds more than this does.
    """

    def __init__(self, segments: Segments, bits: Iterator[int]) -> None:
        self.bit, self.full = next(bits), next(bits)
        """In ``Segments.users``: it holds some of a segment; it holds all of it."""
        self.fell: OrderedDict[int, None] | None = None
        self.hits = 0
        """Since somebody set it to 0: chunks in the longest prefix that it held, of each request."""
        self.kept = segments.column()
        self._size, self._held, self._users, self._uses = segments.size, segments.held, segments.users, segments.uses
        self._base = segments.column()
        self._both = self.bit | self.full
        self._count = 0
        self._run, self._whole = 0, True

    def use(self, part: Sequence[int], step: int, capacity: int, chunks: int) -> None:
        """``part`` is used, the last one first: segments of which each hangs on the one before.

        chunks: how many they have together, when it holds all of them; else 0.
        """
        hits, kept, size = chunks, self.kept, self._size
        if not chunks:
            for segment in part:
                hits += kept[segment]
                if kept[segment] < size[segment]:
                    break
        # Of a chain that comes from its end, the last run of hits counts; of one from its beginning, the first.
        if step == START:
            self.hits += self._run
            self._run, self._whole = hits, bool(chunks)
        elif step == DOWN:
            self._run = self._run + hits if chunks else hits
        elif self._whole:
            self._run += hits
            self._whole = bool(chunks)
        if chunks:
            self._hit(part)
            return
        for segment in reversed(part):
            if kept[segment] == size[segment]:
                self._hit((segment,))
            else:
                self._admit(segment, capacity)

    @abstractmethod
    def _hit(self, part: Sequence[int]) -> None:
        """``part``, of which it holds all, is used."""

    @abstractmethod
    def _admit(self, segment: int, capacity: int) -> None:
        """``segment``, of which it does not hold all, is used: hold all of it, and no more than ``capacity`` chunks."""

    @abstractmethod
    def divided(self, head: int, rest: int) -> None:
        """``rest`` was cut in two; ``head`` is about to be used. ``kept`` is right for both."""

    def divide(self, head: int, rest: int) -> None:
        kept, size = self.kept, self._size[head]
        kept[head], kept[rest] = min(kept[rest], size), max(kept[rest] - size, 0)
        users = self._users
        if not kept[rest]:
            users[rest] &= ~self.bit
        if kept[head] == size:
            users[head] |= self._both
        elif not kept[head]:
            users[head] &= ~self.bit
        self._base[head] = self._base[rest]
        if self.fell is not None and rest in self.fell:
            for segment in (head, rest):
                if self._held[segment] >> kept[segment]:
                    self.fell[segment] = None
                else:
                    self.fell.pop(segment, None)
        self.divided(head, rest)

    def _fill(self, segment: int) -> None:
        self._count += self._size[segment] - self.kept[segment]
        self.kept[segment] = self._size[segment]
        self._users[segment] |= self._both
        if self.fell is not None:
            self.fell.pop(segment, None)

    def _shrink(self, segment: int, kept: int) -> None:
        self._count += kept - self.kept[segment]
        self.kept[segment] = kept
        self._users[segment] &= ~(self.full if kept else self._both)
        if self.fell is not None and self._held[segment] >> kept:
            self.fell[segment] = None


class GhostLRU(Ghost):
    """Least recently used first."""

    def __init__(self, segments: Segments, bits: Iterator[int]) -> None:
        super().__init__(segments, bits)
        self.order: OrderedDict[int, None] = OrderedDict()

    def _hit(self, part: Sequence[int]) -> None:
        for segment in reversed(part):
            self.order.move_to_end(segment)

    def _admit(self, segment: int, capacity: int) -> None:
        order, kept = self.order, self.kept
        order[segment] = None
        order.move_to_end(segment)
        self._fill(segment)
        while (over := self._count - capacity) > 0:
            oldest = next(iter(order))
            if kept[oldest] <= over:
                del order[oldest]
            self._shrink(oldest, max(kept[oldest] - over, 0))

    def divided(self, head: int, rest: int) -> None:
        if self.kept[head]:
            self.order[head] = None
        if not self.kept[rest]:
            self.order.pop(rest, None)


class GhostS3FIFO(Ghost):
    """S3-FIFO, as in eviction_queues.py, with its ways to be set up.

    fill_main: when it is full for the first time, only what came first is in the small queue.
    """

    SMALL, MAIN = 1, 2

    def __init__(
        self, segments: Segments, bits: Iterator[int], promote_at: int, ghost_share: float, fill_main: bool
    ) -> None:
        super().__init__(segments, bits)
        self._memory = next(bits)
        self._promote_at, self._ghost_share, self._fill_main = promote_at, ghost_share, fill_main
        self._where, self._weight = segments.column(), segments.column()
        """``_weight``: chunks that were let go of what is remembered."""
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._remembered: deque[int] = deque()
        self._main_count = self._remembered_count = 0
        self._full = False

    def _hit(self, part: Sequence[int]) -> None:
        """That it was used is seen later."""

    def _admit(self, segment: int, capacity: int) -> None:
        kept, size = self.kept, self._size[segment]
        if self._count + size - kept[segment] > capacity:
            self._make_room(capacity, size - kept[segment])
        if not kept[segment]:
            self._base[segment] = self._uses[segment]
            if self._weight[segment] or (self._fill_main and not self._full):
                self._forget(segment)
                self._where[segment] = self.MAIN
                self._main.append(segment)
            else:
                self._where[segment] = self.SMALL
                self._small.append(segment)
        if self._where[segment] == self.MAIN:
            self._main_count += size - kept[segment]
        self._fill(segment)

    def divided(self, head: int, rest: int) -> None:
        where = self._where[head] = self._where[rest]
        if self.kept[head]:
            (self._main if where == self.MAIN else self._small).append(head)

    def _make_room(self, capacity: int, wanted: int) -> None:
        kept, uses, base, where, steps = self.kept, self._uses, self._base, self._where, 0
        most, most_main = max(capacity - wanted, 0), capacity - capacity // 10
        if self._count > most and not self._full:
            self._full = True
            self._demote(capacity // 10)
        small, main = self._small, self._main
        while self._count > most:
            steps += 1
            in_small = small and (self._main_count <= most_main or not main)
            queue = small if in_small else main
            oldest = queue[0]
            if not kept[oldest] or where[oldest] != (self.SMALL if in_small else self.MAIN):
                queue.popleft()
                continue
            left = max(kept[oldest] - self._count + most, 0)
            if in_small:
                if uses[oldest] - base[oldest] >= self._promote_at:
                    small.popleft()
                    self._promote(oldest)
                    continue
            elif uses[oldest] > base[oldest] and steps < MOST_STEPS:
                main.popleft()
                base[oldest] = max(base[oldest], uses[oldest] - 3) + 1
                main.append(oldest)
                continue
            else:
                self._main_count -= kept[oldest] - left
            if not left:
                queue.popleft()
                if in_small:
                    self._remember(oldest, int(capacity * self._ghost_share))
            self._shrink(oldest, left)

    def _promote(self, segment: int) -> None:
        self._base[segment] = self._uses[segment]
        self._where[segment] = self.MAIN
        self._main.append(segment)
        self._main_count += self.kept[segment]

    def _demote(self, count: int) -> None:
        """What came in first, before it was full, is in the small queue."""
        while self._main and count > 0:
            segment = self._main.popleft()
            self._where[segment] = self.SMALL
            self._small.append(segment)
            self._main_count -= self.kept[segment]
            count -= self.kept[segment]

    def _remember(self, segment: int, most: int) -> None:
        self._users[segment] |= self._memory
        self._weight[segment] = self._size[segment]
        self._remembered_count += self._size[segment]
        self._remembered.append(segment)
        while self._remembered_count > most:
            oldest = self._remembered.popleft()
            if self._weight[oldest]:
                self._forget(oldest)

    def _forget(self, segment: int) -> None:
        self._remembered_count -= self._weight[segment]
        self._weight[segment] = 0
        self._users[segment] &= ~self._memory
