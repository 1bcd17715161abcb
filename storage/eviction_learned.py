"""The ghost that learns: least expected use for each unit of time first, and never a chunk before its children.

Candidates are the chunks that have no child in the cache. Those of one kind and age share a queue, oldest first; queues
are sorted by what their chunks are worth (reuse_model.py). A new chunk is told apart by whether it ends a prompt, others
by how often they were used and at what intervals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque

from lmcache.storage.eviction_ghosts import Ghost, Known
from lmcache.storage.reuse_model import LAST, SAMPLED, STARTS, ReuseModel

MOST_USES = 8  # uses beyond 128 are not told apart
INTERVALS = 5
FIRST_FIT, FIT_EVERY = 256, 2048  # uses; the time between doubles
TICK_EVERY = 16
# Ages of queues, in shares of the capacity: finer ones for what may soon be evicted than the model's are not needed.
AGES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
NOWHERE = -1
NEVER = 1 << 62


class GhostLearned(Ghost):
    """See above. memory: the bit of what was let go and is remembered; counted: of what is in the model's counts."""

    def __init__(self, known: Known, bit: int, memory: int, counted: int) -> None:
        super().__init__(known, bit)
        self._memory, self._counted = memory, counted
        self._parent, self._children = known.parent, known.children
        self._last, self._gap, self._kind, self._kids = (known.column() for _ in range(4))
        self._level = known.column(NOWHERE)
        """Of the counted ones, in the model's levels."""
        self._queue = known.column(NOWHERE)
        self._model = ReuseModel()
        self._inner, self._end = (self._model.kind((1, ends)) for ends in (0, 1))
        self._again = [[self._model.kind((bits, gap)) for gap in range(INTERVALS)] for bits in range(2, MOST_USES + 1)]
        self._queues: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(len(self._model) * len(AGES))]
        self._rank = list(range(len(self._queues)))
        self._sorted = list(range(len(self._queues)))
        self._lowest = 0
        """No queue before this place in ``_sorted`` has a chunk."""
        self._starts = [0] * len(AGES)
        self._remembered: OrderedDict[int, None] = OrderedDict()
        self._counting: list[deque[tuple[int, int]]] = [deque() for _ in STARTS]
        self._aging: list[deque[tuple[int, int]]] = [deque() for _ in AGES]
        self._count = self._now = self._seen = 0
        self._next_fit = FIRST_FIT
        self._capacity = 0

    def use(self, chunk: int) -> None:
        """``chunk`` is used, whether it is held or not; ``admit`` comes after, if it comes."""
        now = self._now = self._now + 1
        if not now % TICK_EVERY:
            self._tick()
        uses, kind = self._uses[chunk], self._kind[chunk]
        if uses > 1:
            if (level := self._level[chunk]) >= 0:
                self._model.used[kind][level] += 1
            gap = now - self._last[chunk]
            self._gap[chunk] = gap = (self._gap[chunk] + gap) // 2 if uses > 2 else gap
            bits, apart = uses.bit_length(), (gap.bit_length() - 6) // 2
            kind = self._again[min(bits, MOST_USES) - 2][min(max(apart, 0), INTERVALS - 1)]
            counted = level >= 0 or self._mask[chunk] & self._counted
        else:
            kind = self._inner if self._children[chunk] else self._end
            self._seen += 1
            counted = not (self._seen * 0x9E3779B1 >> 12) % SAMPLED
        self._last[chunk] = now
        self._kind[chunk] = kind
        if counted:
            self._model.entered[kind][0] += 1
            self._mask[chunk] |= self._counted
            self._level[chunk] = 0
            self._counting[0].append((chunk, now))
        if self._mask[chunk] & self.bit and not self._kids[chunk]:
            if self._queue[chunk] >= 0:
                self._dequeue(chunk)
            self._enqueue(chunk, 0)

    def admit(self, chunk: int, capacity: int) -> None:
        self._capacity = capacity
        parent = self._parent[chunk]
        if parent >= 0:
            # Before room is made: the chain that grows is not cut off where it grows.
            self._kids[parent] += 1
            if self._queue[parent] >= 0:
                self._dequeue(parent)
        if self._mask[chunk] & self._memory:
            self._mask[chunk] ^= self._memory
            del self._remembered[chunk]
        while self._count >= capacity:
            self._evict()
        self._count += 1
        if not self._kids[chunk]:
            self._enqueue(chunk, 0)

    def linked(self, chunk: int, parent: int) -> None:
        """``chunk`` was found to hang on ``parent``, which so does not end its prompt."""
        if self._kind[parent] == self._end and self._uses[parent] == 1:
            if not self._level[parent]:
                self._model.entered[self._end][0] -= 1
                self._model.entered[self._inner][0] += 1
            self._kind[parent] = self._inner
        if self._mask[chunk] & self.bit:
            self._kids[parent] += 1
            if self._queue[parent] >= 0:
                self._dequeue(parent)

    def _evict(self) -> None:
        queues, order = self._queues, self._sorted
        lowest = self._lowest
        while not queues[order[lowest]]:
            lowest += 1
        self._lowest = lowest
        chunk = queues[order[lowest]].popitem(last=False)[0]
        self._queue[chunk] = NOWHERE
        self._count -= 1
        parent = self._parent[chunk]
        if parent >= 0:
            kids = self._kids[parent] = self._kids[parent] - 1
            if not kids and self._mask[parent] & self.bit:
                age = bisect_right(self._starts, self._now - self._last[parent]) - 1
                self._queues[self._enqueue(parent, age)].move_to_end(parent, last=False)
        self._mask[chunk] |= self._memory
        self._remembered[chunk] = None
        self._drop(chunk)
        if len(self._remembered) > 2 * self._capacity:
            self._mask[self._remembered.popitem(last=False)[0]] ^= self._memory

    def _enqueue(self, chunk: int, age: int) -> int:
        queue = self._queue[chunk] = self._kind[chunk] * len(AGES) + age
        self._queues[queue][chunk] = None
        if (rank := self._rank[queue]) < self._lowest:
            self._lowest = rank
        self._aging[age].append((chunk, self._last[chunk]))
        return queue

    def _dequeue(self, chunk: int) -> None:
        del self._queues[self._queue[chunk]][chunk]
        self._queue[chunk] = NOWHERE

    def _tick(self) -> None:
        now, last = self._now, self._last
        for age in range(len(AGES) - 1):
            aging, due = self._aging[age], now - self._starts[age + 1]
            while aging and aging[0][1] <= due:
                chunk, since = aging.popleft()
                queue = self._queue[chunk]
                if last[chunk] == since and queue >= 0 and queue % len(AGES) == age:
                    self._dequeue(chunk)
                    self._enqueue(chunk, age + 1)
        model = self._model
        for level in range(LAST):
            counting, due = self._counting[level], now - STARTS[level + 1]
            while counting and counting[0][1] <= due:
                chunk, since = counting.popleft()
                if last[chunk] != since or self._level[chunk] != level:
                    continue
                kind = self._kind[chunk]
                model.left[kind][level] += 1
                model.entered[kind][level + 1] += 1
                self._level[chunk] = level + 1
                if level + 1 < LAST:
                    self._counting[level + 1].append((chunk, since))
                else:
                    self._mask[chunk] ^= self._counted
        if now >= self._next_fit:
            self._next_fit = now + min(now, FIT_EVERY)
            self._fit()

    def _fit(self) -> None:
        capacity = min(self._capacity, self._count) or self._count
        self._starts = [int(max(capacity, 256) * share) for share in AGES]
        self._model.fit(self._now)
        ends = [*self._starts[1:], 2 * self._starts[-1]]
        levels = [bisect_right(STARTS, (start + end) // 2) - 1 for start, end in zip(self._starts, ends, strict=True)]
        worths = [values[level] for values in self._model.value for level in levels]
        self._sorted = sorted(range(len(worths)), key=worths.__getitem__)
        for rank, queue in enumerate(self._sorted):
            self._rank[queue] = rank
        self._lowest = 0
