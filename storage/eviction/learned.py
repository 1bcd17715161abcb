"""The ghost that learns: least expected use for each unit of time first, and never a chunk before its children.

Candidates are the segments on which no other hangs that is held. Those of one kind and age share a queue, oldest first;
queues are sorted by what their chunks are worth (reuse_model.py). A new segment is told apart by whether it ends a
prompt, others by how often they were used and at what intervals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from lmcache.storage.eviction.ghosts import NOTHING, Ghost, Segments
from lmcache.storage.eviction.reuse_model import LAST, STARTS, ReuseModel

MOST_USES = 8  # uses beyond 128 are not told apart
INTERVALS = 5
FIRST_FIT, FIT_EVERY = 256, 8192  # uses; the time between doubles
# Segments that are remembered after they are gone, for each that is held.
MEMORY = 4
# Segments whose next use is waited for and counted: all at first; when there are more, half of them, and so on.
MOST_COUNTED = 8192
# Ages of queues, in shares of the capacity: finer ones for what may soon be evicted than the model's are not needed.
AGES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
LAST_AGE = len(AGES) - 1
MIXER = 0x9E3779B1
SEGMENT_BITS = 32
SEGMENT = (1 << SEGMENT_BITS) - 1
# What a segment counts that was used once, of what such were worth before: a scan looks like all others at first.
DISCOUNT = 0.15
LEAST_CAPACITY = 256


class GhostLearned(Ghost):
    """See above."""

    def __init__(self, segments: Segments, bits: Iterator[int]) -> None:
        super().__init__(segments, bits)
        self._memory, self._counted = next(bits), next(bits)
        """The bits of what was let go and is remembered; of that whose next use the model waits for."""
        self._known = self._memory | self._counted | self.bit
        self._above, self._children = segments.above, segments.children
        self._uses, self._last, self._gap, self._kids, self._since = (segments.column() for _ in range(5))
        """``_uses``: since it was unknown; ``_since``: its last use, as ``_aging`` knows it."""
        self._kind = segments.column()
        """Of those that are counted, since when they were used last."""
        self._queue = segments.column(NOTHING)
        self._model = model = ReuseModel()
        self._inner, self._end, self._short = (model.kind((1, which)) for which in range(3))
        again = [[model.kind((bits, gap)) for gap in range(INTERVALS)] for bits in range(2, MOST_USES + 1)]
        # By the bit lengths of uses and of the interval.
        self._again = [
            [
                again[min(max(bits - 2, 0), MOST_USES - 2)][min(max((gap - 6) // 2, 0), INTERVALS - 1)]
                for gap in range(64)
            ]
            for bits in range(64)
        ]
        queues = len(model) * len(AGES)
        self._queues: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(queues)]
        self._rank = list(range(queues))
        self._sorted = list(range(queues))
        self._lowest = 0
        """No queue before this place in ``_sorted`` has a segment."""
        self._starts = [0] * len(AGES)
        self._aging = [deque[int](maxlen=None if start < AGES[-1] else 0) for start in AGES]
        """When a segment of the queues of an age was used last, and the segment, in one number."""
        self._remembered: deque[int] = deque()
        self._waiting: dict[int, None] = {}
        self._stride, self._fresh = 1, 0
        self._now = self._capacity = self._segments = 0
        self._next_fit = FIRST_FIT
        self._steps: list[Callable[[], None]] = []
        """What is left to do of learning, the last one first."""
        self._seen: list[npt.NDArray[np.int64]] = []
        """Kinds, times of last use and sizes of what waits, ``_looked``."""
        self._looked: list[int] = []

    def _hit(self, part: Sequence[int]) -> None:
        queue, size, last, gaps, uses, now = self._queue, self._size, self._last, self._gap, self._uses, self._now
        users, counted, kinds, stride = self._users, self._counted, self._kind, self._stride
        for segment in reversed(part):
            now += size[segment]
            gap = now - last[segment]
            mean = gaps[segment] = gaps[segment] + gap >> 1
            count = uses[segment] = uses[segment] + 1
            last[segment] = now
            if users[segment] & counted:  # ``_count_use``, without a call
                self._model.used[kinds[segment]][bisect_right(STARTS, gap) - 1] += stride * size[segment]
                kinds[segment] = self._again[count.bit_length()][mean.bit_length()]
            if (place := queue[segment]) >= 0:
                if place % len(AGES):
                    del self._queues[place][segment]
                    self._enqueue(segment, 0)
                else:
                    # Its kind and age are looked at again when it is about to go.
                    self._queues[place].move_to_end(segment)
        self._now = now

    def _admit(self, segment: int, capacity: int) -> None:
        self._capacity = capacity
        kept, kids, queue, size = self.kept, self._kids, self._queue, self._size[segment]
        self._now += size
        self._observe(segment, self._now)
        # Not a candidate while room is made for it, nor is what it hangs on: a chain is not cut where it grows.
        if queue[segment] >= 0:
            self._dequeue(segment)
        if not kept[segment] and (parent := self._above[segment]) >= 0:
            kids[parent] += 1
            if queue[parent] >= 0:
                self._dequeue(parent)
        if not kept[segment]:
            self._segments += 1
        most = max(capacity - size + kept[segment], 0)
        kids[segment] += 1
        while self._count > most and self._evict(most):
            pass
        kids[segment] -= 1
        self._fill(segment)
        if not kids[segment]:
            self._enqueue(segment, 0)

    def divided(self, head: int, rest: int) -> None:
        for column in (self._uses, self._last, self._gap, self._kind):
            column[head] = column[rest]
        if self._users[rest] & self._counted:
            self._waiting[head] = None
        if self.kept[rest]:
            self._kids[head] = 1
            self._segments += 1
            return
        age = 0
        if (queue := self._queue[rest]) >= 0:
            age = queue % len(AGES)
            self._dequeue(rest)
        if self.kept[head]:
            self._enqueue(head, age)

    def linked(self, segment: int, parent: int) -> None:
        """``segment`` was found to hang on ``parent``."""
        if self.kept[segment]:
            self._kids[parent] += 1
            if self._queue[parent] >= 0:
                self._dequeue(parent)

    def learn(self) -> None:
        """Let segments grow older, and look at what was counted, when it is time: one step at each call."""
        self._age()
        if self._steps:
            self._steps.pop()()
        elif self._now >= self._next_fit:
            self._next_fit = self._now + min(self._now, FIT_EVERY)
            self._steps = [self._sort, self._model.price, self._fit]
            self._steps += [partial(self._look, column) for column in (self._size, self._last, self._kind)]
            self._steps += [self._correct, self._forget, self._thin]

    def _observe(self, segment: int, now: int) -> None:
        users, last = self._users, self._last
        if users[segment] & self._known:
            gap = now - last[segment]
            self._gap[segment] = self._gap[segment] + gap >> 1
            self._uses[segment] += 1
            if users[segment] & self._counted:
                self._count_use(segment, gap)
        else:
            self._uses[segment] = 1
            self._gap[segment] = 0
            self._fresh += 1
            if not (self._fresh * MIXER >> 12) & (self._stride - 1):
                users[segment] |= self._counted
                self._waiting[segment] = None
                self._kind[segment] = self._kind_of(segment)
        last[segment] = now

    def _count_use(self, segment: int, gap: int) -> None:
        weight = self._stride * self._size[segment]
        self._model.used[self._kind[segment]][bisect_right(STARTS, gap) - 1] += weight
        self._kind[segment] = self._kind_of(segment)

    def _evict(self, most: int) -> bool:
        """Let go of chunks of what is worth least, until there are ``most``; False: there is no candidate."""
        queues, order, lowest = self._queues, self._sorted, self._lowest
        while not queues[order[lowest]]:
            lowest += 1
            if lowest == len(order):
                self._lowest = 0
                return False
        self._lowest = lowest
        segment = next(iter(queues[order[lowest]]))
        if self._kind_of(segment) != order[lowest] // len(AGES):
            del queues[order[lowest]][segment]
            self._enqueue(segment, order[lowest] % len(AGES))
            return True
        left = self.kept[segment] - self._count + most
        if left > 0:
            self._shrink(segment, left)
            return True
        self._dequeue(segment)
        parent = self._above[segment]
        if parent >= 0:
            kids = self._kids[parent] = self._kids[parent] - 1
            if not kids and self.kept[parent]:
                # As old as the child or younger; which is found out later.
                self._enqueue(parent, order[lowest] % len(AGES), first=True)
        self._shrink(segment, 0)
        self._segments -= 1
        self._users[segment] |= self._memory
        self._remembered.append(segment)
        if len(self._remembered) > MEMORY * self._segments + 64:
            self._users[self._remembered.popleft()] &= ~self._memory
        return True

    def _kind_of(self, segment: int) -> int:
        uses = self._uses[segment]
        if uses == 1:
            return self._inner if self._children[segment] else self._short if self._size[segment] > 1 else self._end
        return self._again[uses.bit_length()][self._gap[segment].bit_length()]

    def _enqueue(self, segment: int, age: int, first: bool = False) -> None:
        queue = self._queue[segment] = self._kind_of(segment) * len(AGES) + age
        self._queues[queue][segment] = None
        if first:
            self._queues[queue].move_to_end(segment, last=False)
        if (rank := self._rank[queue]) < self._lowest:
            self._lowest = rank
        since = self._since[segment] = self._last[segment]
        self._aging[age].append(since << SEGMENT_BITS | segment)

    def _dequeue(self, segment: int) -> None:
        del self._queues[self._queue[segment]][segment]
        self._queue[segment] = NOTHING

    def _age(self) -> None:
        """Move what is old enough to the next queues."""
        last, places, queues, rank, stamps = self._last, self._queue, self._queues, self._rank, self._since
        lowest = self._lowest
        for age in range(LAST_AGE):
            aging, following = self._aging[age], self._aging[age + 1]
            due = self._now - self._starts[age + 1] + 1 << SEGMENT_BITS
            while aging and (entry := aging[0]) < due:
                aging.popleft()
                segment, since = entry & SEGMENT, entry >> SEGMENT_BITS
                queue = places[segment]
                if stamps[segment] != since or queue < 0 or queue % len(AGES) != age:
                    continue
                del queues[queue][segment]
                if last[segment] > since:  # used meanwhile
                    self._enqueue(segment, 0)
                    continue
                places[segment] = queue = queue + 1
                queues[queue][segment] = None
                following.append(entry)
                if rank[queue] < lowest:
                    lowest = rank[queue]
        self._lowest = min(lowest, self._lowest)

    def _forget(self) -> None:
        """Wait no longer for what is very old."""
        kind, last, oldest = self._kind, self._last, self._now - STARTS[LAST]
        for segment in [segment for segment in self._waiting if last[segment] <= oldest]:
            self._model.used[kind[segment]][LAST] += self._stride * self._size[segment]
            self._ignore(segment)

    def _thin(self) -> None:
        """Wait for no more than a few thousand."""
        if len(self._waiting) > MOST_COUNTED:
            self._stride *= 2
            for segment in list(self._waiting)[::2]:
                self._ignore(segment)

    def _correct(self) -> None:
        """What something came to hang on did not end its prompt."""
        kind, children, new = self._kind, self._children, (self._end, self._short)
        for segment in [segment for segment in self._waiting if children[segment] and kind[segment] in new]:
            kind[segment] = self._inner

    def _look(self, column: list[int]) -> None:
        if column is self._kind:
            self._seen = []
            self._looked = list(self._waiting)
        self._seen.append(np.fromiter(map(column.__getitem__, self._looked), np.int64, len(self._looked)))

    def _fit(self) -> None:
        kinds, last, sizes = self._seen
        self._model.fit(self._now, kinds, self._now - last, sizes * self._stride)

    def _sort(self) -> None:
        """Put the queues in order by what their chunks are worth now."""
        capacity = max(min(self._capacity, self._count) or self._count, LEAST_CAPACITY)
        self._starts = [int(capacity * share) for share in AGES]
        ends = [*self._starts[1:], 2 * self._starts[-1]]
        levels = [bisect_right(STARTS, (start + end) // 2) - 1 for start, end in zip(self._starts, ends, strict=True)]
        new = (self._inner, self._end, self._short)
        worths = [
            values[level] * (DISCOUNT if kind in new else 1)
            for kind, values in enumerate(self._model.value)
            for level in levels
        ]
        self._sorted = sorted(range(len(worths)), key=worths.__getitem__)
        for rank, queue in enumerate(self._sorted):
            self._rank[queue] = rank
        self._lowest = 0

    def _ignore(self, segment: int) -> None:
        del self._waiting[segment]
        self._users[segment] &= ~self._counted
