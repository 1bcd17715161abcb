"""What other policies would hold by now: ghosts, caches of names only, each as large as the tier that is ruled.

Chunks that came in together and hang on one another are one segment, until a request goes another way in the middle of
them. They are used together, and go from the end, so what a ghost holds of a segment is one number, ``kept``:

    segment  [ c0 c1 c2 c3 c4 c5 ]        kept = 4: c0 to c3 are held, c4 and c5 are gone
    a request for c0 c1 x y        ──▶    [ c0 c1 ] ── [ c2 c3 c4 c5 ]
                                             └────── [ x y ]

So a ghost's work is for each segment of a request, not for each chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
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
        self.users[head] = self.users[segment]
        self.held[head], self.held[segment] = held & ((1 << index) - 1), held >> index
        self.keys[segment] = rest = keys[index:]
        self.size[segment] = len(rest)
        place = segment << PLACE_BITS
        self.places.update(zip(rest, range(place, place + len(rest)), strict=True))
        return head

    def sweep(self, count: int) -> None:
        """Forget those of the next ``count`` segments that nobody holds or remembers and nothing hangs on.

        And what they hang on, if that is so of it then. Others keep what they hang on: a chain stays one run.
        """
        hand, users, held, children, above = self._hand, self.users, self.held, self.children, self.above
        end = min(hand + count, len(users))
        for segment in range(hand, end):
            while not (users[segment] or held[segment] or children[segment]) and (keys := self.keys[segment]):
                for key in keys:
                    del self.places[key]
                self.keys[segment] = []
                self._free.append(segment)
                if (parent := above[segment]) < 0:
                    break
                above[segment] = NOTHING
                children[parent] -= 1
                segment = parent
        self._hand = end if end < len(users) else 0

    def _grow(self) -> None:
        start = len(self.keys)
        self.keys += ([] for _ in range(GROWTH))
        for column in (self.size, self.children, self.held, self.users):
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
        self._size, self._held, self._users = segments.size, segments.held, segments.users
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
        move = self.order.move_to_end
        for segment in reversed(part):
            move(segment)

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
