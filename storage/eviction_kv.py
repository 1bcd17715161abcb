"""A policy that knows what a KV cache knows.

prefix      a chunk is worthless without its parents, so only chunks without cached children are candidates
reuse       from how long ago and how often a chunk was used, and whether it ends a prompt, its chances are learned
cost, size  a chunk far down its prompt costs more to compute again; what counts is cost saved for each byte of room
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import count
from math import inf, log2

from lmcache.keys import ChunkKey
from lmcache.storage.eviction import EvictionPolicy, Place
from lmcache.storage.reuse_model import LAST, STARTS, Kind, ReuseModel

# The position at which attention makes a token cost twice what the first one costs.
COST_DOUBLES_AT = 1 << 18
MOST_USES = 8  # uses beyond 128 are not told apart
FIRST_FIT, FIT_EVERY = 256, 2048  # uses; the time between doubles
TICK_EVERY = 16  # uses; below the end of the first level


class _Chunk:
    """What is remembered of a chunk: while it is held, and for some time after."""

    __slots__ = (
        "ends",
        "gap",
        "held",
        "key",
        "kids",
        "kind",
        "last",
        "level",
        "open",
        "parent",
        "queued",
        "uses",
        "weight",
    )

    def __init__(self, key: ChunkKey) -> None:
        self.key = key
        self.parent: _Chunk | None = None
        self.kids = 0  # held children
        self.held = False
        self.queued = False  # a candidate
        self.ends = False  # when it was used last, nothing hung on it
        self.open = False  # used last, and it may be that more comes to hang on it
        self.uses = 0
        self.gap = 0  # between its uses; the last ones weigh most
        self.last = -1  # when it was last used; -1: it is only known as a parent
        self.kind = 0
        self.level = -1  # of its age; -1: it has no kind yet
        self.weight = 0  # cost a byte, in octaves


class _Queue(OrderedDict[ChunkKey, _Chunk]):
    """Candidates of one kind, level and weight, which are worth the same: the longest unused first."""


class Reuse(EvictionPolicy):
    """Least expected saving for each byte and each unit of time first, never a chunk before its children.

    See reuse_model.py for how the expectation is learned, from what was let go too, and docs/storage/eviction.md.
    Whether a new chunk is an end shows when the chain ends that it came with; until then that chain goes last.
    """

    def __init__(self) -> None:
        self._model = ReuseModel()
        self._chunks: dict[ChunkKey, _Chunk] = {}
        self._now = 0
        self._next_fit = FIRST_FIT
        self._ages: list[deque[tuple[_Chunk, int]]] = [deque() for _ in STARTS]
        """By level: chunks and the time of the use since when they age; stale when used again."""
        self._queues: dict[tuple[int, int, int], _Queue] = {}
        self._order: list[tuple[float, int, int, int]] = []
        """Worth, kind, level, weight of every queue that has candidates, and of some that had; ascending."""
        self._newest: _Chunk | None = None
        """What was used last, and the parent that it has or had."""
        self._above: ChunkKey | None = None
        self._tokens = self._bytes = 0

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        chunk = self._chunks.get(key)
        if chunk is not None and chunk.held:
            self.touch(key)
            return
        self._tick()
        if chunk is None:
            chunk = self._chunks[key] = _Chunk(key)
        self._link(chunk, place)
        chunk.weight = self._weigh(nbytes, place)
        chunk.held = True
        self._use(chunk)

    def touch(self, key: ChunkKey) -> None:
        chunk = self._chunks.get(key)
        if chunk is None or not chunk.held:
            return
        self._tick()
        self._dequeue(chunk)
        self._use(chunk)

    def remove(self, key: ChunkKey) -> None:
        chunk = self._chunks.get(key)
        if chunk is None or not chunk.held:
            return
        chunk.held = False
        self._dequeue(chunk)
        parent, chunk.parent = chunk.parent, None
        if parent:
            parent.kids -= 1
            if not parent.kids:
                if parent.held:
                    self._enqueue(parent, first=True)
                self._forget(parent)
        self._forget(chunk)

    def victims(self) -> Iterator[ChunkKey]:
        left: dict[ChunkKey, int] = {}  # of parents: held children that did not go yet
        freed: list[tuple[float, int, _Chunk]] = []
        serial = count()
        for worth, queue in self._worths():
            while freed and freed[0][0] <= worth:
                yield from self._climb(heapq.heappop(freed), left, freed, serial)
            for chunk in queue.values():
                yield from self._climb((worth, 0, chunk), left, freed, serial)
                while freed and freed[0][0] <= worth:
                    yield from self._climb(heapq.heappop(freed), left, freed, serial)
        while freed:
            yield from self._climb(heapq.heappop(freed), left, freed, serial)
        if (newest := self._newest) and newest.open and newest.held:
            yield from self._climb((inf, 0, newest), left, freed, serial)

    def _worths(self) -> Iterator[tuple[float, _Queue]]:
        for worth, *name in self._order:
            kind, level, weight = name
            if queue := self._queues.get((kind, level, weight)):
                yield worth, queue

    def _climb(
        self,
        start: tuple[float, int, _Chunk],
        left: dict[ChunkKey, int],
        freed: list[tuple[float, int, _Chunk]],
        serial: Iterator[int],
    ) -> Iterator[ChunkKey]:
        """A victim, and its ancestors as long as they are left without children and are not worth more."""
        worth, _, chunk = start
        while True:
            yield chunk.key
            parent = self._childless(chunk, left)
            if parent is None:
                return
            of_parent = self._worth(parent)
            if of_parent > worth:
                heapq.heappush(freed, (of_parent, next(serial), parent))
                return
            chunk = parent

    @staticmethod
    def _childless(gone: _Chunk, left: dict[ChunkKey, int]) -> _Chunk | None:
        """The parent, when ``gone`` was the last of its children."""
        parent = gone.parent
        if parent is None or not parent.held:
            return None
        left[parent.key] = kids = left.get(parent.key, parent.kids) - 1
        return None if kids else parent

    def _worth(self, chunk: _Chunk) -> float:
        return float(self._model.value[chunk.kind][chunk.level] * 2.0**chunk.weight)

    def _link(self, chunk: _Chunk, place: Place | None) -> None:
        if place is None or place.parent is None or place.parent == chunk.key:
            chunk.parent = None
            return
        parent = self._chunks.get(place.parent)
        if parent is None:
            parent = self._chunks[place.parent] = _Chunk(place.parent)
        chunk.parent = parent
        parent.kids += 1
        self._dequeue(parent)

    def _weigh(self, nbytes: int, place: Place | None) -> int:
        """Cost a byte against what is usual, in octaves: finer differences matter less than chances do."""
        if place is None or place.stop <= place.start:
            return 0
        tokens = place.stop - place.start
        self._tokens += tokens
        self._bytes += nbytes
        dense = tokens * self._bytes / (max(nbytes, 1) * max(self._tokens, 1))
        return round(log2(max(dense, 1e-9) * (1 + place.start / COST_DOUBLES_AT)))

    def _use(self, chunk: _Chunk) -> None:
        if chunk.level >= 0:
            self._model.used[chunk.kind][chunk.level] += 1
        gap = self._now - chunk.last
        chunk.gap = (chunk.gap + gap) // 2 if chunk.uses > 1 else gap
        chunk.last, chunk.level = self._now, 0
        chunk.uses += 1
        newest, self._newest = self._newest, chunk
        if newest and newest.open:
            newest.open = False
            if newest is not chunk.parent and newest is not chunk:
                self._settle(newest)
        # Chains come from either end. What hangs on nothing or on what was used right before may grow; what was used
        # right before may have hung on this, and may be gone already.
        chunk.ends = not chunk.kids and chunk.key != self._above
        chunk.open = chunk.ends and (chunk.parent is None or chunk.parent is newest)
        self._above = chunk.parent.key if chunk.parent else None
        self._begin(chunk)
        if not chunk.kids and not chunk.open:
            self._enqueue(chunk)

    def _settle(self, chunk: _Chunk) -> None:
        """``chunk`` ends its prompt, as nothing came to hang on it."""
        if chunk.level == 0 and (kind := self._model.kind(self._kind_of(chunk))) != chunk.kind:
            self._model.entered[chunk.kind][0] -= 1
            self._model.entered[kind][0] += 1
            chunk.kind = kind
        if chunk.held and not chunk.kids:
            self._enqueue(chunk)

    @staticmethod
    def _kind_of(chunk: _Chunk) -> Kind:
        """Of a new chunk, whether it ends a prompt: few ask exactly the same again. Else how often, and how far apart.

        How long the request was, and what it hangs on, were tried too: many kinds of which little is known do worse.
        """
        if chunk.uses == 1:
            return (1, int(chunk.ends and not chunk.open))
        return (min(chunk.uses.bit_length(), MOST_USES), min(max(0, chunk.gap.bit_length() - 6) // 2, 4))

    def _begin(self, chunk: _Chunk) -> None:
        """``chunk`` begins to age."""
        chunk.kind = self._model.kind(self._kind_of(chunk))
        self._model.entered[chunk.kind][0] += 1
        self._ages[0].append((chunk, chunk.last))

    def _enqueue(self, chunk: _Chunk, first: bool = False) -> None:
        name = chunk.kind, chunk.level, chunk.weight
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue()
        if not queue:
            entry = (self._worth(chunk), *name)
            place = bisect_left(self._order, entry)
            if place == len(self._order) or self._order[place] != entry:
                self._order.insert(place, entry)
        queue[chunk.key] = chunk
        if first:
            queue.move_to_end(chunk.key, last=False)
        chunk.queued = True

    def _dequeue(self, chunk: _Chunk) -> None:
        if chunk.queued:
            del self._queues[chunk.kind, chunk.level, chunk.weight][chunk.key]
            chunk.queued = False

    def _tick(self) -> None:
        self._now += 1
        if self._now % TICK_EVERY:
            return
        for level in range(LAST):
            self._age(level)
        if self._now >= self._next_fit:
            self._next_fit = self._now + min(self._now, FIT_EVERY)
            self._model.fit(self._now)
            self._order = sorted(
                (self._model.value[kind][level] * 2.0**weight, kind, level, weight)
                for (kind, level, weight), queue in self._queues.items()
                if queue
            )

    def _age(self, level: int) -> None:
        """Move what is old enough from ``level`` to the next."""
        ages, due = self._ages[level], self._now - STARTS[level + 1]
        left, entered = self._model.left, self._model.entered
        while ages and ages[0][1] <= due:
            chunk, since = ages.popleft()
            if chunk.last != since:
                continue
            left[chunk.kind][level] += 1
            entered[chunk.kind][level + 1] += 1
            queued = chunk.queued
            self._dequeue(chunk)
            chunk.level = level + 1
            if queued:
                self._enqueue(chunk)
            if level + 1 < LAST:
                self._ages[level + 1].append((chunk, since))
            else:
                self._forget(chunk)

    def _forget(self, chunk: _Chunk) -> None:
        """Drop what is neither held nor young nor the parent of what is held."""
        if not chunk.held and not chunk.kids and chunk.level in (-1, LAST):
            self._chunks.pop(chunk.key, None)
