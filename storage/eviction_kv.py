"""`reuse`: does as the policy does that would have had the most hits so far.

See docs/storage/eviction.md. Eight ghosts (eviction_ghosts.py, eviction_learned.py) each hold what one policy would hold;
the tier lets go of what the best of them does not hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lmcache.keys import ChunkKey
from lmcache.storage.eviction import EvictionPolicy, Place
from lmcache.storage.eviction_ghosts import (
    HELD,
    Ghost,
    GhostLFU,
    GhostLRU,
    GhostMRU,
    GhostS3FIFO,
    GhostSieve,
    Known,
)
from lmcache.storage.eviction_learned import GhostLearned

COUNT_EVERY = 64  # uses
# Uses after which a hit counts half.
HALF_LIFE = 20000
# Of the hits that still count, how many more another ghost must have to be followed.
MARGIN = 0.0
# Chunks looked at for each use after another ghost is followed.
SEARCH = 8192
TICK_EVERY = 32
LRU_BIT = 2
FIELD_BITS = 40
FIELD = (1 << FIELD_BITS) - 1


class Reuse(EvictionPolicy):
    """Follows the ghost that had most hits of late."""

    def __init__(self) -> None:
        known = self._known = Known()
        bits = iter(1 << n for n in range(1, 64))
        self._lru, self._mru = GhostLRU(known, next(bits)), GhostMRU(known, next(bits))
        lfu, sieve = GhostLFU(known, next(bits)), GhostSieve(known, next(bits))
        two, one, learned = next(bits), next(bits), next(bits)
        self._learned = GhostLearned(known, learned, next(bits), next(bits))
        self._ghosts: list[Ghost] = [
            self._lru, self._mru, lfu, sieve,
            GhostS3FIFO(known, two, next(bits), 2, 0.9, True),
            GhostS3FIFO(known, one, next(bits), 1, 1.0, False),
            self._learned,
        ]
        self.names = ["lru", "mru", "lfu", "sieve", "s3fifo", "s3p", "learned"]
        # By which of them: the ghosts; and fields of a wide number, one for the tier and one for each ghost.
        self._all = sum(ghost.bit for ghost in self._ghosts)
        counted = self._all | HELD
        self._absent = [[g for g in self._ghosts if mask & g.bit] for mask in range(counted + 1)]
        fields = range(len(self._ghosts) + 1)
        self._ones = [sum(1 << FIELD_BITS * n for n in fields if mask >> n & 1) for mask in range(counted + 1)]
        self._fields = [ones * FIELD for ones in self._ones]
        self._counted = counted
        self._hits = self._run = self._led = 0
        self._previous = known.number(ChunkKey(b'', b''))
        self._one = self._ones[counted]
        self._scores = [0.0 for _ in fields]
        self._leader: Ghost = self._learned
        self._fell: OrderedDict[int, None] = OrderedDict()
        self._learned.fell = self._fell
        self._search: list[int] = []
        self._held: dict[int, None] = {}
        self._capacity = 1 << 62
        self._asked = self._evicted = False
        self._now = 0
        self.log = []; self.grand = 0

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        known = self._known
        chunk = known.number(key)
        if known.mask[chunk] & HELD:
            self._use(chunk, known.mask[chunk])
            return
        self._asked = False
        if self._evicted:
            self._evicted = False
            self._resize(len(self._held))
        if place is not None and place.parent is not None and known.parent[chunk] < 0 and place.parent != key:
            parent = known.number(place.parent)
            known.parent[chunk] = parent
            known.children[parent] += 1
            self._learned.linked(chunk, parent)
        self._use(chunk, known.mask[chunk])
        known.mask[chunk] |= HELD
        self._held[chunk] = None
        if not known.mask[chunk] & self._leader.bit:
            self._fell[chunk] = None

    def touch(self, key: ChunkKey) -> None:
        chunk = self._known.numbers.get(key)
        if chunk is not None and (mask := self._known.mask[chunk]) & HELD:
            self._asked = False
            self._use(chunk, mask)

    def remove(self, key: ChunkKey) -> None:
        chunk = self._known.numbers.get(key)
        if chunk is not None and self._known.mask[chunk] & HELD:
            self._known.mask[chunk] ^= HELD
            del self._held[chunk]
            self._fell.pop(chunk, None)
            self._evicted = self._asked

    def victims(self) -> Iterator[ChunkKey]:
        self._asked = True
        keys, fell = self._known.keys, self._fell
        for chunk in fell:
            yield keys[chunk]
        mask, order = self._known.mask, self._lru.order
        for chunk in order:
            if mask[chunk] & HELD and chunk not in fell:
                yield keys[chunk]
        for chunk in self._held:
            if chunk not in fell and chunk not in order:
                yield keys[chunk]

    def _resize(self, held: int) -> None:
        if held >= self._capacity or self._capacity == 1 << 62:
            self._capacity = held
        else:
            self._capacity -= (self._capacity - held + 63) // 64

    def _use(self, chunk: int, mask: int) -> None:
        known = self._known
        self._now = now = self._now + 1
        # Hits are those in the longest prefix that one holds; chains come from either end.
        counted, previous, parent = mask & self._counted, self._previous, known.parent
        if parent[previous] == chunk:
            self._run = self._run + self._one & self._fields[counted]
        elif parent[chunk] == previous:
            self._led &= counted
            self._run += self._ones[self._led]
        else:
            self._hits += self._run
            self._run = self._ones[counted]
            self._led = counted
        self._previous = chunk
        known.uses[chunk] += 1
        if mask & LRU_BIT:
            self._lru.order.move_to_end(chunk)
        self._learned.use(chunk, now)
        if lacking := self._all & ~mask:
            for ghost in self._absent[lacking]:
                ghost.admit(chunk, self._capacity)
            known.mask[chunk] |= lacking
            if lacking & self._leader.bit:
                self._fell.pop(chunk, None)
        self._mru.newest = chunk
        # Last: until here nobody holds a new chunk.
        if not now % TICK_EVERY:
            self._tick(now)

    def _tick(self, now: int) -> None:
        self._learned.tick(now)
        self._known.sweep(3 * TICK_EVERY)
        if self._search:
            self._find()
        if not now % COUNT_EVERY:
            self._choose()

    def _choose(self) -> None:
        fade = 0.5 ** (COUNT_EVERY / HALF_LIFE)
        hits, self._hits = self._hits, 0
        self.grand += hits
        scores = self._scores = [
            score * fade + (hits >> FIELD_BITS * n & FIELD) for n, score in enumerate(self._scores)
        ]
        best = max(range(1, len(scores)), key=scores.__getitem__)
        ghost = self._ghosts[best - 1]
        if ghost is not self._leader and scores[best] > scores[self._ghosts.index(self._leader) + 1] * (1 + MARGIN):
            self._leader.fell = None
            self._leader = ghost
            self._fell = ghost.fell = OrderedDict()
            self._search = list(reversed(self._held))
            self.log.append((self._now, self.names[best - 1]))

    def _find(self) -> None:
        bit, mask = self._leader.bit, self._known.mask
        for chunk in self._search[-SEARCH:][::-1]:
            if mask[chunk] & HELD and not mask[chunk] & bit:
                self._fell[chunk] = None
        del self._search[-SEARCH:]
