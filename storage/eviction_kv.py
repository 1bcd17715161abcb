"""`reuse`: does as the policy does that would have had most hits of late.

See docs/storage/eviction.md. A few ghosts (eviction_ghosts.py, eviction_learned.py) each hold what one policy would hold;
the tier lets go of what the best of them does not hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lmcache.keys import ChunkKey
from lmcache.storage.eviction import EvictionPolicy, Place
from lmcache.storage.eviction_ghosts import DOWN, HELD, START, UP, Ghost, GhostLFU, GhostLRU, GhostS3FIFO, Known, Log
from lmcache.storage.eviction_learned import GhostLearned

# Uses after which all ghosts have played them, the best is looked for, and what nobody needs is forgotten.
TICK = 128
SWEEP = 3
# Uses after which a hit counts half.
HALF_LIFE = 20000
# How many more hits another ghost must have to be followed, of those that still count.
MARGIN = 0.0
# Chunks looked at in each tick after another ghost is followed.
SEARCH = 4096
# The ghosts are smaller by this share of the tier: so many chunks can be let go before the log has to be played.
SLACK = 1 / 128
UNKNOWN = 1 << 62


class Reuse(EvictionPolicy):
    """Follows the ghost that had most hits of late."""

    def __init__(self) -> None:
        known = self._known = Known()
        bits = iter([1 << n for n in range(1, 32)])
        self._lru = GhostLRU(known, next(bits))
        self._learned = GhostLearned(known, next(bits), next(bits), next(bits))
        self._ghosts: list[Ghost] = [
            self._learned,
            self._lru,
            GhostS3FIFO(known, next(bits), next(bits), 1, 1.0, False),
            GhostS3FIFO(known, next(bits), next(bits), 2, 0.9, True),
            GhostLFU(known, next(bits)),
        ]
        self.names = ["learned", "lru", "s3p", "s3fifo", "lfu"]
        self._scores = [0.0 for _ in self._ghosts]
        self._fell: OrderedDict[int, None] = OrderedDict()
        self._leader: Ghost = self._learned
        self._leader.fell = self._fell
        self._search: list[int] = []
        """Chunks of the tier of which it is not known yet whether the leader has them."""
        self._held: dict[int, None] = {}
        self._log = Log()
        self._previous = known.number(ChunkKey(b"", b""))
        known.mask[self._previous] = HELD  # of no real chunk, and never forgotten
        self._capacity = UNKNOWN
        self._asked, self._evicted = False, 0
        self.log = []; self.total = [0]*9; self._now=0

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        known = self._known
        chunk = known.number(key)
        if not known.mask[chunk] & HELD:
            if self._evicted:
                self._resize()
            if place is not None and (above := place.parent) is not None and known.parent[chunk] < 0 and above != key:
                parent = known.parent[chunk] = known.number(above)
                known.children[parent] += 1
            known.mask[chunk] |= HELD
            self._held[chunk] = None
        self._use(chunk)

    def touch(self, key: ChunkKey) -> None:
        chunk = self._known.numbers.get(key)
        if chunk is not None and self._known.mask[chunk] & HELD:
            self._use(chunk)

    def remove(self, key: ChunkKey) -> None:
        chunk = self._known.numbers.get(key)
        if chunk is not None and self._known.mask[chunk] & HELD:
            self._known.mask[chunk] ^= HELD
            del self._held[chunk]
            self._fell.pop(chunk, None)
            self._evicted += self._asked

    def victims(self) -> Iterator[ChunkKey]:
        self._asked = True
        fell, keys = self._fell, self._known.keys
        if len(fell) <= self._evicted:
            self._leader.play(self._log, self._capacity)
        for chunk in fell:
            yield keys[chunk]
        mask, order = self._known.mask, self._lru.order
        for chunk in order:
            if mask[chunk] & HELD and chunk not in fell:
                yield keys[chunk]
        for chunk in self._held:
            if chunk not in fell and chunk not in order:
                yield keys[chunk]

    def _use(self, chunk: int) -> None:
        self._asked = False
        log, parent, previous = self._log, self._known.parent, self._previous
        self._previous = chunk
        log.steps.append(DOWN if parent[previous] == chunk else UP if parent[chunk] == previous else START)
        log.chunks.append(chunk)
        if len(log.chunks) == TICK // 2:
            self._learned.learn()
        elif len(log.chunks) >= TICK:
            self._tick()

    def _resize(self) -> None:
        held = len(self._held)
        slack = max(int(held * SLACK) - self._evicted, 0)
        self._evicted = 0
        if held - slack >= self._capacity or self._capacity == UNKNOWN:
            self._capacity = held - slack
        else:
            self._capacity -= (self._capacity - held + slack + 63) // 64

    def _tick(self) -> None:
        for ghost in self._ghosts:
            ghost.play(self._log, self._capacity)
            ghost.played = 0
        self._log.chunks.clear()
        self._log.steps.clear()
        self._known.sweep(SWEEP * TICK)
        self._choose()
        if self._search:
            self._find()

    def _choose(self) -> None:
        self._now += TICK
        fade = 0.5 ** (TICK / HALF_LIFE)
        for n, ghost in enumerate(self._ghosts):
            self._scores[n] = self._scores[n] * fade + ghost.hits
            self.total[n] += ghost.hits
            ghost.hits = 0
        scores = self._scores
        best = max(range(len(scores)), key=scores.__getitem__)
        ghost = self._ghosts[best]
        if ghost is not self._leader and scores[best] > scores[self._ghosts.index(self._leader)] * (1 + MARGIN):
            self._leader.fell = None
            self._leader = ghost
            self._fell = ghost.fell = OrderedDict()
            self._search = list(reversed(self._held))
            self.log.append((self._now, self.names[best]))

    def _find(self) -> None:
        bit, mask = self._leader.bit, self._known.mask
        for chunk in self._search[-SEARCH:][::-1]:
            if mask[chunk] & HELD and not mask[chunk] & bit:
                self._fell[chunk] = None
        del self._search[-SEARCH:]
