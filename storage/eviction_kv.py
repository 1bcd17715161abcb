"""`reuse`: does as the policy does that would have had most hits of late.

See docs/storage/eviction.md. A few ghosts (eviction_ghosts.py, eviction_learned.py) each hold what one policy would hold;
the tier lets go of what the best of them does not hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lmcache.keys import ChunkKey
from lmcache.storage.eviction import EvictionPolicy, Place
from lmcache.storage.eviction_ghosts import (
    DOWN,
    INDEX,
    NOTHING,
    PLACE_BITS,
    START,
    UP,
    Ghost,
    GhostLRU,
    GhostS3FIFO,
    Segments,
)
from lmcache.storage.eviction_learned import GhostLearned

# Chunks of which nothing is known but that they came in with the others of the run.
PENDING = -1
MOST_RUN = 256
# Chunks of a new end of a chain of which the last one gets a segment of its own.
LEAST_CUT = 4
# Uses after which the best ghost is looked for.
CHOOSE_EVERY = 128
# Uses after which a hit counts half.
HALF_LIFE = 20000
# How many more hits another ghost must have to be followed, of those that still count.
MARGIN = 0.0
HALF_CAP = 0
FIRST = 0
# Segments looked at with each run, after another ghost is followed, and whether somebody still needs them.
SEARCH, SWEEP = 256, 6
# The ghosts are smaller by this share of the tier: so many chunks can be let go before a run has to be cut.
SLACK = 1 / 128
UNKNOWN = 1 << 62


class Reuse(EvictionPolicy):
    """Follows the ghost that had most hits of late."""

    def __init__(self) -> None:
        segments = self._segments = Segments()
        self._places = segments.places
        bits = iter([1 << n for n in range(32)])
        self._lru, self._learned = GhostLRU(segments, bits), GhostLearned(segments, bits)
        self._ghosts: list[Ghost] = [
            self._learned,
            self._lru,
            GhostS3FIFO(segments, bits, 1, 1.0, False),
            GhostS3FIFO(segments, bits, 2, 0.9, True),
        ]
        self.names = ["learned", "lru", "s3p", "s3fifo"]
        self._scores = [0.0 for _ in self._ghosts]
        self._uses = 0.0
        self._fell: OrderedDict[int, None] = OrderedDict()
        self._leader: Ghost = self._ghosts[FIRST]
        self._leader.fell = self._fell
        self._search: list[int] = []
        """Segments of which it is not known yet whether the tier holds more of them than the leader."""
        self._run: list[ChunkKey] = []
        """Chunks used one after another, each the parent of the one before, or (``_step`` UP) the other way round."""
        self._step = self._joint = START
        """How the run goes on; and how it follows the one before, when it was cut."""
        self._parent: ChunkKey | None = None
        self._last: ChunkKey | None = None
        """Of what was used last; ``_first``: of the first of a run from its beginning."""
        self._first: ChunkKey | None = None
        self._at = NOTHING
        """Where what was used last stands, when ``_parent`` is not known yet."""
        self._next = NOTHING
        """The place of the parent of what was used last, when the run may go there."""
        self._below = NOTHING
        """The segment that the run, when it comes from its end, is the parent of."""
        self._count = self._now = self._chosen = 0
        self._capacity = UNKNOWN
        self._asked = False
        """Somebody asked for victims, and nothing was used since."""
        self._spared = 0
        """Segments at the end of ``_fell`` that the run goes through."""
        self._batch = self._low = 0
        """Chunks that were evicted since, and how many were left; 0: not many, none."""
        self.log = []; self.total = [0]*9

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        found = self._places.get(key)
        if found is None:
            self._places[key] = PENDING
            self._count += 1
            self._asked = False
            self._use(key, place.parent if place is not None else None)
            return
        segment, index = self._place(key, found)
        held, bit = self._segments.held, 1 << index
        if not held[segment] & bit:
            held[segment] |= bit
            self._count += 1
            if index >= self._leader.kept[segment] and segment not in self._fell:
                self._fell[segment] = None
                self._spared += 1
        self.touch(key)

    def touch(self, key: ChunkKey) -> None:
        if (found := self._places.get(key)) is None:
            return
        if found < 0:
            self._close()
            found = self._places[key]
        segments, segment, index = self._segments, found >> PLACE_BITS, found & INDEX
        if not segments.held[segment] >> index & 1:
            return
        self._asked = False
        if found == self._next:
            self._run.append(key)
        else:
            self._use(key, self._parent_of(found))
            if self._step == UP:
                self._spare(segment)
                return
        if self._at < 0 or self._at >> PLACE_BITS != segment:
            self._spare(segment)
        self._at = found
        if index:
            self._next = found - 1
        elif len(self._run) < MOST_RUN and (above := segments.above[segment]) >= 0:
            self._next = (above << PLACE_BITS) + segments.size[above] - 1
        else:
            self._next = NOTHING

    def remove(self, key: ChunkKey) -> None:
        if (found := self._places.get(key)) is None:
            return
        if found < 0:
            self._close()
            found = self._places[key]
        segment, bit = found >> PLACE_BITS, 1 << (found & INDEX)
        held = self._segments.held
        if held[segment] & bit:
            held[segment] ^= bit
            self._count -= 1
            if self._asked:
                self._batch += 1
                self._low = self._count
            if segment in self._fell and not held[segment] >> self._leader.kept[segment]:
                del self._fell[segment]

    def victims(self) -> Iterator[ChunkKey]:
        self._asked = True
        if len(self._fell) <= self._batch // 8 + self._spared:
            self._close()
        self._batch = 0
        segments, fell, kept = self._segments, self._fell, self._leader.kept
        for segment in fell:
            held, least, keys = segments.held[segment], kept[segment], segments.keys[segment]
            for index in range(held.bit_length() - 1, least - 1, -1):
                if held >> index & 1:
                    yield keys[index]
        order = self._lru.order
        for segment in order:
            yield from self._chunks(segment, kept[segment])
        for segment in range(len(segments.keys)):
            if segment not in order:
                yield from self._chunks(segment, kept[segment])
        for key in self._run:
            if self._places[key] == PENDING:
                yield key

    def _place(self, key: ChunkKey, found: int) -> tuple[int, int]:
        if found == PENDING:
            self._close()
            found = self._places[key]
        return found >> PLACE_BITS, found & INDEX

    def _chunks(self, segment: int, stop: int) -> Iterator[ChunkKey]:
        """Those before ``stop`` that the tier holds, the last one first."""
        held, keys = self._segments.held[segment], self._segments.keys[segment]
        for index in range(min(stop, held.bit_length()) - 1, -1, -1):
            if held >> index & 1:
                yield keys[index]

    def _parent_of(self, place: int) -> ChunkKey | None:
        segments, segment, index = self._segments, place >> PLACE_BITS, place & INDEX
        if index:
            return segments.keys[segment][index - 1]
        above = segments.above[segment]
        return segments.keys[above][-1] if above >= 0 else None

    def _spare(self, segment: int) -> None:
        """What is used in this run is not evicted before the ghosts know of it."""
        if segment in self._fell:
            self._fell.move_to_end(segment)
            self._spared += 1

    def _settle(self) -> None:
        if self._at >= 0:
            if len(self._run) > 1 and self._step != UP:
                self._step = DOWN
            self._parent = self._parent_of(self._at)
            self._at = self._next = NOTHING

    def _use(self, key: ChunkKey, parent: ChunkKey | None) -> None:
        self._settle()
        run = self._run
        if run:
            if key == self._parent and self._step != UP:
                self._step = DOWN
            elif parent == run[-1] and self._step != DOWN:
                self._step = UP
            else:
                self._close()
        if not run:
            # It may go on with a run that was cut.
            if (self._joint == DOWN and key != self._parent) or (self._joint == UP and parent != self._last):
                self._joint = START
            self._step = self._joint
            self._first = parent
        run.append(key)
        self._parent = parent
        if len(run) >= MOST_RUN:
            self._close()

    def _close(self) -> None:
        """Let the ghosts use the run."""
        self._settle()
        run, joint, down = self._run, self._joint, self._step == DOWN
        if not run:
            return
        self._last = run[-1]
        self._now += len(run)
        below = self._below if joint == DOWN else NOTHING
        part = self._find(run[::-1], self._parent, below) if down else self._find(run, self._first, NOTHING)
        run.clear()
        self._joint, self._spared = self._step, 0
        if part[-1] == below:
            part.pop()  # was used, all of it, when the run was cut in the middle of it
            if not part:
                return
        if self._low:
            self._resize(self._low - int(self._low * SLACK))
        segments, everywhere, chunks, capacity = self._segments, -1, 0, self._capacity
        for segment in part:
            everywhere &= segments.users[segment]
            chunks += segments.size[segment]
            segments.uses[segment] += 1
        for ghost in self._ghosts:
            ghost.use(part, joint, capacity, chunks if everywhere & ghost.full else 0)
        self._below = part[0]
        segments.sweep(SWEEP)
        if self._search:
            self._look()
        if self._now >= self._chosen + CHOOSE_EVERY:
            self._choose()
            self._learned.learn()

    def _find(self, path: list[ChunkKey], first: ChunkKey | None, below: int) -> list[int]:
        """The segments of ``path``, new ones where it is new, old ones cut where it leaves them.

        first: the parent of its first chunk. below: the segment that hangs on its last one.
        """
        segments, part, at, end = self._segments, list[int](), 0, len(path)
        places = segments.places
        above = NOTHING
        if first is not None and places[path[0]] == PENDING and (found := places.get(first, PENDING)) >= 0:
            above = self._cut(found >> PLACE_BITS, (found & INDEX) + 1)
        while at < end:
            found = places[path[at]]
            if found == PENDING:
                stop = at + 1
                while stop < end and places[path[stop]] == PENDING:
                    stop += 1
                if stop == end and below < 0 and stop >= at + LEAST_CUT:
                    stop -= 1  # the end of a prompt is of another kind
                segment = segments.new(path[at:stop], above)
                segments.held[segment] = (1 << stop - at) - 1
                self._fell[segment] = None
            else:
                segment, index = found >> PLACE_BITS, found & INDEX
                keys = segments.keys[segment]
                stop = at + min(end - at, len(keys) - index)
                if keys[index : index + stop - at] != path[at:stop]:
                    stop = next(n for n in range(at + 1, end) if path[n] != keys[index + n - at])
                if segment != below:
                    segment = self._cut(segment, index + stop - at)
            part.append(segment)
            above, at = segment, stop
        if below >= 0 and segments.above[below] < 0 and below != above:
            segments.above[below] = above
            segments.children[above] += 1
            self._learned.linked(below, above)
        return part

    def _cut(self, segment: int, index: int) -> int:
        """``segment`` up to ``index``."""
        if index >= self._segments.size[segment]:
            return segment
        head = self._segments.split(segment, index)
        for ghost in self._ghosts:
            ghost.divide(head, segment)
        return head

    def _resize(self, capacity: int) -> None:
        self._low = 0
        if capacity >= self._capacity or self._capacity == UNKNOWN:
            self._capacity = capacity
        else:
            self._capacity -= (self._capacity - capacity + 63) // 64

    def _choose(self) -> None:
        passed = self._now - self._chosen
        self._chosen = self._now
        window = max(HALF_LIFE, HALF_CAP * min(self._capacity, self._count))
        fade = 0.5 ** (passed / window)
        self._uses = self._uses * fade + passed
        for n, ghost in enumerate(self._ghosts):
            self._scores[n] = self._scores[n] * fade + ghost.hits
            self.total[n] += ghost.hits
            ghost.hits = 0
        scores = self._scores
        best = max(range(len(scores)), key=scores.__getitem__)
        ghost = self._ghosts[best]
        if ghost is not self._leader and scores[best] > scores[self._ghosts.index(self._leader)] + MARGIN * self._uses:
            self._leader.fell = None
            self._leader = ghost
            self._fell = ghost.fell = OrderedDict()
            self._search = list(range(len(self._segments.keys)))
            self.log.append((self._now, self.names[best]))

    def _look(self) -> None:
        held, kept = self._segments.held, self._leader.kept
        for segment in self._search[-SEARCH:]:
            if held[segment] >> kept[segment]:
                self._fell[segment] = None
        del self._search[-SEARCH:]
