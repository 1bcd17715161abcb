"""The ghost that learns: least expected use for each unit of time first, and never a chunk before its children.

Candidates are the chunks that have no child in the cache. Those of one kind and age share a queue, oldest first; queues
are sorted by what their chunks are worth (reuse_model.py). A new chunk is told apart by whether it ends a prompt, others
by how often they were used and at what intervals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence

from lmcache.storage.eviction_ghosts import Ghost, Known
from lmcache.storage.reuse_model import LAST, STARTS, ReuseModel

MOST_USES = 8  # uses beyond 128 are not told apart
INTERVALS = 5
FIRST_FIT, FIT_EVERY = 256, 4096  # uses; the time between doubles
AGE_EVERY = 64  # uses
# Chunks whose next use is waited for and counted: all at first; when there are more, half of them, and so on.
MOST_COUNTED = 8192
# Ages of queues, in shares of the capacity: finer ones for what may soon be evicted than the model's are not needed.
AGES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
LAST_AGE = len(AGES) - 1
NOWHERE = -1
MIXER = 0x9E3779B1


class GhostLearned(Ghost):
    """See above. memory: the bit of what was let go and is remembered; counted: of what the model waits for."""

    def __init__(self, known: Known, bit: int, memory: int, counted: int) -> None:
        super().__init__(known, bit)
        self._memory, self._counted = memory, counted
        self._above, self._children = known.parent, known.children
        self._uses, self._last, self._gap, self._kids = (known.column() for _ in range(4))
        self._parent = known.column(NOWHERE)
        """The chunk of whose held children it is one."""
        self._kind = known.column()
        """Of those that are counted, since when they were used last."""
        self._queue = known.column(NOWHERE)
        self._model = model = ReuseModel()
        self._inner, self._end = (model.kind((1, ends)) for ends in (0, 1))
        again = [[model.kind((bits, gap)) for gap in range(INTERVALS)] for bits in range(2, MOST_USES + 1)]
        # By the bit lengths of uses and of the interval.
        self._again = [
            [again[min(max(bits - 2, 0), MOST_USES - 2)][min(max((gap - 6) // 2, 0), INTERVALS - 1)] for gap in range(64)]
            for bits in range(64)
        ]
        queues = len(model) * len(AGES)
        self._queues: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(queues)]
        self._rank = list(range(queues))
        self._sorted = list(range(queues))
        self._lowest = 0
        """No queue before this place in ``_sorted`` has a chunk."""
        self._starts = [0] * len(AGES)
        self._aging: list[deque[tuple[int, int]]] = [deque() for _ in AGES]
        self._remembered: deque[int] = deque()
        self._waiting: dict[int, None] = {}
        self._stride, self._fresh = 1, 0
        self._count = self._now = self._aged = self._capacity = 0
        self._next_fit = FIRST_FIT

    def _play(self, chunks: Sequence[int], capacity: int) -> list[int]:
        mask, bit, uses, last, gaps, kids = self._mask, self.bit, self._uses, self._last, self._gap, self._kids
        queue, counted, now, above = self._queue, self._counted, self._now, self._above
        self._capacity = capacity
        found = []
        for chunk in chunks:
            now += 1
            found.append(hit := mask[chunk] & bit)
            if not mask[chunk] & (bit | self._memory):
                uses[chunk] = 0
            uses[chunk] += 1
            if uses[chunk] > 1:
                gap = now - last[chunk]
                gaps[chunk] = gaps[chunk] + gap >> 1
            else:
                gap = gaps[chunk] = 0
            last[chunk] = now
            if mask[chunk] & counted or not gap:
                self._observe(chunk, gap)
            if hit:
                if queue[chunk] >= 0:
                    del self._queues[queue[chunk]][chunk]
                    self._enqueue(chunk, 0)
                continue
            mask[chunk] &= ~self._memory
            parent = self._parent[chunk] = above[chunk]
            if parent >= 0:
                # Before room is made: the chain that grows is not cut off where it grows.
                kids[parent] += 1
                if queue[parent] >= 0:
                    del self._queues[queue[parent]][parent]
                    queue[parent] = NOWHERE
            while self._count >= capacity:
                self._evict()
            self._count += 1
            self._take(chunk)
            if not kids[chunk]:
                self._enqueue(chunk, 0)
        self._now = now
        if now >= self._aged + AGE_EVERY:
            self._aged = now
            self._age()
        return found

    def learn(self) -> None:
        """Look at what was counted, when it is time."""
        if self._now >= self._next_fit:
            self._next_fit = self._now + min(self._now, FIT_EVERY)
            self._fit()

    def _observe(self, chunk: int, gap: int) -> None:
        """A use after ``gap``, or the first use (0), of a chunk that the model counts, or may."""
        if gap:
            self._model.used[self._kind[chunk]][bisect_right(STARTS, gap) - 1] += self._stride
        elif not self._mask[chunk] & self._counted:
            self._fresh += 1
            if (self._fresh * MIXER >> 12) & (self._stride - 1):
                return
            self._mask[chunk] |= self._counted
            self._waiting[chunk] = None
        self._kind[chunk] = self._kind_of(chunk)

    def _evict(self) -> None:
        queues, order, lowest = self._queues, self._sorted, self._lowest
        while not queues[order[lowest]]:
            lowest += 1
        self._lowest = lowest
        chunk = queues[order[lowest]].popitem(last=False)[0]
        self._queue[chunk] = NOWHERE
        self._count -= 1
        mask, parent = self._mask, self._parent[chunk]
        if parent >= 0:
            self._parent[chunk] = NOWHERE
            kids = self._kids[parent] = self._kids[parent] - 1
            if not kids and mask[parent] & self.bit:
                # As old as the child or younger; which is found out later.
                self._enqueue(parent, order[lowest] % len(AGES), first=True)
        mask[chunk] |= self._memory
        self._remembered.append(chunk)
        self._drop(chunk)
        if len(self._remembered) > 2 * self._capacity:
            mask[self._remembered.popleft()] &= ~self._memory

    def _kind_of(self, chunk: int) -> int:
        uses = self._uses[chunk]
        if uses == 1:
            return self._inner if self._children[chunk] else self._end
        return self._again[uses.bit_length()][self._gap[chunk].bit_length()]

    def _enqueue(self, chunk: int, age: int, first: bool = False) -> None:
        queue = self._queue[chunk] = self._kind_of(chunk) * len(AGES) + age
        self._queues[queue][chunk] = None
        if first:
            self._queues[queue].move_to_end(chunk, last=False)
        if (rank := self._rank[queue]) < self._lowest:
            self._lowest = rank
        self._aging[age].append((chunk, self._last[chunk]))

    def _age(self) -> None:
        """Move what is old enough to the next queues."""
        last, queues = self._last, self._queue
        for age in range(LAST_AGE):
            aging, due = self._aging[age], self._now - self._starts[age + 1]
            while aging and aging[0][1] <= due:
                chunk, since = aging.popleft()
                queue = queues[chunk]
                if last[chunk] == since and queue >= 0 and queue % len(AGES) == age:
                    del self._queues[queue][chunk]
                    self._enqueue(chunk, age + 1)

    def _fit(self) -> None:
        model, kind, last, now = self._model, self._kind, self._last, self._now
        for chunk in [chunk for chunk in self._waiting if now - last[chunk] >= STARTS[LAST]]:
            model.used[kind[chunk]][LAST] += self._stride
            self._ignore(chunk)
        if len(self._waiting) > MOST_COUNTED:
            self._stride *= 2
            for chunk in list(self._waiting)[::2]:
                self._ignore(chunk)
        for chunk in self._waiting:
            if kind[chunk] == self._end and self._children[chunk]:
                kind[chunk] = self._inner
        kinds, ages = [kind[chunk] for chunk in self._waiting], [now - last[chunk] for chunk in self._waiting]
        model.fit(now, kinds, ages, self._stride)
        capacity = max(min(self._capacity, self._count) or self._count, 256)
        self._starts = [int(capacity * share) for share in AGES]
        ends = [*self._starts[1:], 2 * self._starts[-1]]
        levels = [bisect_right(STARTS, (start + end) // 2) - 1 for start, end in zip(self._starts, ends, strict=True)]
        worths = [values[level] for values in model.value for level in levels]
        self._sorted = sorted(range(len(worths)), key=worths.__getitem__)
        for rank, queue in enumerate(self._sorted):
            self._rank[queue] = rank
        self._lowest = 0

    def _ignore(self, chunk: int) -> None:
        del self._waiting[chunk]
        self._mask[chunk] &= ~self._counted
