"""`reuse`: lets go of what the policy would not hold that has had more hits, LRU or one that learns.

Two ghosts (ghosts.py, learned.py) each hold what one policy would hold, and count its hits. The tier
follows one of them, the leader. Pictures and figures: docs/storage/eviction.md.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lmcache.keys import ChunkKey
from lmcache.storage.eviction.base import EvictionPolicy, Place
from lmcache.storage.eviction.ghosts import (
    DOWN,
    INDEX,
    NOTHING,
    PENDING,
    PLACE_BITS,
    START,
    UP,
    Ghost,
    GhostLRU,
    Segments,
)
from lmcache.storage.eviction.learned import GhostLearned

MOST_RUN = 256
# Of so many new chunks at the end of a chain the last one gets a segment of its own: it is of another kind.
LEAST_CUT = 4
EVERY = 64  # uses between two looks at the segments, the leader or what was learned
# A hit counts half after so many uses: longer than most judge by, shorter than a tier runs.
HALF_LIFE = 1_000_000
# How many more hits the other ghost must have to be followed: as a share of uses, and for each chunk that fits in, as a
# change costs some; and by how many times what such a sum varies by chance, as hits come by the request.
MARGIN, MARGIN_EACH, SURE = 0.0002, 0.002, 1.0
# Segments looked at: with each run, whether the new leader holds them; now and then, whether they are still needed.
SEARCH, SWEEP = 256, 4 * EVERY
MOST_LOOKS = 8  # for one eviction
# By how much the ghosts are smaller than the tier: so many chunks can go before a run that is not over has to be cut.
# As many as most runs have, but no more than a share of a small tier.
SLACK, SLACK_SMALL, SLACK_RUN = 1 / 128, 1 / 32, 32
UNKNOWN = 1 << 62


class Reuse(EvictionPolicy):
    """Follows the ghost that had more hits.

    Uses are gathered to runs, chunks of one chain used one after another, and the ghosts are told of whole runs:

        touch c2, touch c1, touch c0  ──▶  run c0 c1 c2  ──▶  segments  ──▶  both ghosts ──▶ ``_fell`` of the leader

    The tier holds all that the leader holds, and a little more: what is in ``_fell``, and what is new in the run.
    """

    def __init__(self) -> None:
        segments = self._segments = Segments()
        self._places = segments.places
        bits = iter([1 << n for n in range(32)])
        self._lru, self._learned = GhostLRU(segments, bits), GhostLearned(segments, bits)
        self._ghosts: tuple[Ghost, ...] = self._learned, self._lru
        # It does what LRU does until it has learned something.
        self._leader: Ghost = self._learned
        self._fell = self._leader.fell = OrderedDict[int, None]()
        """Segments of which the tier holds more than the leader; the first goes first."""
        self._search: list[int] = []
        """Segments of which that is not known, as the leader is new."""
        self._ahead = self._noise = self._uses = 0.0
        """How many more hits the other ghost had than the leader, the sum of their squares, and uses; older ones count
        less."""
        self._run: list[ChunkKey] = []
        """Each the parent of the one before, or, where ``_step`` is UP, its child."""
        self._step = self._joint = START
        """How the run goes on, and how it follows the one before."""
        self._first: ChunkKey | None = None
        self._last: ChunkKey | None = None
        """The parent of the first of the run; what was used last."""
        self._parent: ChunkKey | None = None
        self._at = self._next = NOTHING
        """The parent of what was used last; or, before that is looked up, the places of both, if any."""
        self._below = NOTHING
        """The first segment of the run before, which hangs on this run when ``_joint`` is DOWN."""
        self._count = self._now = self._chosen = self._due = 0
        self._sweeps = False
        self._capacity = UNKNOWN
        self._spared = 0
        """Segments at the end of ``_fell`` that the run goes through."""
        self._asked = False
        """For victims, and nothing was used since."""
        self._batch, self._low = 0, NOTHING
        """Chunks that were evicted then, and how many were left."""

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        found = self._places.get(key)
        if found is None:
            self._places[key] = PENDING
            self._count += 1
            self._asked = False
            parent, run = place.parent if place is not None else None, self._run
            if key == self._parent and run and self._step != UP and self._at < 0 and len(run) < MOST_RUN - 1:
                # What ``_use`` would do, without a call: chunks come in from the end of a chain.
                self._step = DOWN
                run.append(key)
                self._parent = parent
            else:
                self._use(key, parent)
            return
        if found == PENDING:
            self._close()
            found = self._places[key]
        segment, index = found >> PLACE_BITS, found & INDEX
        held = self._segments.held
        if not held[segment] >> index & 1:
            held[segment] |= 1 << index
            self._count += 1
            if index >= self._leader.kept[segment] and segment not in self._fell:
                self._fell[segment] = None
                self._spared += 1
        self.touch(key)

    def touch(self, key: ChunkKey) -> None:
        if (found := self._places.get(key)) is None:
            return
        if found == PENDING:
            self._close()
            found = self._places[key]
        segments, segment, index = self._segments, found >> PLACE_BITS, found & INDEX
        if not segments.held[segment] >> index & 1:
            return
        self._asked = False
        if found == self._next:
            self._run.append(key)
            if index and self._at >> PLACE_BITS == segment:
                self._at, self._next = found, found - 1
                return
        else:
            self._use(key, self._parent_of(found))
            found = self._places[key]  # a run was closed, perhaps, and the segment cut
            segment, index = found >> PLACE_BITS, found & INDEX
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
        if found == PENDING:
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
        looks = 0
        while self._search and not self._fell and looks < MOST_LOOKS:
            self._look()
            looks += 1
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
        """Look up the parent of what was used last."""
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
        path = run[::-1] if down else run[:]
        found = self._places[path[0]]
        if found >= 0 and below < 0 and self._segments.keys[found >> PLACE_BITS] == path:
            part = [found >> PLACE_BITS]
        else:
            part = self._find(path, self._parent if down else self._first, below)
        run.clear()
        self._joint, self._spared = self._step, 0
        if part[-1] == below:
            part.pop()  # was used, all of it, when the run was cut in the middle of it
            if not part:
                return
        if self._low >= 0:
            slack = max(self._low * SLACK, min(self._low * SLACK_SMALL, SLACK_RUN))
            self._resize(self._low - int(slack))
        segments, everywhere, chunks, capacity = self._segments, -1, 0, self._capacity
        for segment in part:
            everywhere &= segments.users[segment]
            chunks += segments.size[segment]
        for ghost in self._ghosts:
            ghost.use(part, joint, capacity, chunks if everywhere & ghost.full else 0)
        # Nobody took it: its number may soon be another's.
        self._below = part[0] if segments.users[part[0]] or segments.held[part[0]] else NOTHING
        if self._search:
            self._look()
        if self._now >= self._due:
            # By turns, so that no single call takes long.
            self._due, self._sweeps = self._now + EVERY, not self._sweeps
            if self._sweeps:
                segments.sweep(SWEEP)
            else:
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
                if segments.size[segment] == 1:
                    part.append(segment)
                    above, at = segment, at + 1
                    continue
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
        """Ghosts are as large as what an eviction leaves; they shrink slowly, for a quota's eviction leaves less."""
        if self._capacity == UNKNOWN:
            self._capacity = self._low
        elif capacity > self._capacity:
            self._capacity = capacity
        else:
            self._capacity -= (self._capacity - capacity + 63) // 64
        self._low = NOTHING

    def _choose(self) -> None:
        """Follow the other ghost when it has more hits, by more than chance."""
        fade = 0.5 ** ((self._now - self._chosen) / HALF_LIFE)
        self._uses = self._uses * fade + self._now - self._chosen
        self._chosen = self._now
        other = self._lru if self._leader is self._learned else self._learned
        more = other.hits - self._leader.hits
        self._learned.hits = self._lru.hits = 0
        self._ahead = self._ahead * fade + more
        self._noise = self._noise * fade + more * more
        least = max(MARGIN * self._uses, MARGIN_EACH * min(self._capacity, self._count), SURE * self._noise**0.5)
        if self._ahead > least:
            self._ahead = -self._ahead
            self._follow(other)

    def _follow(self, ghost: Ghost) -> None:
        self._leader.fell = None
        self._leader = ghost
        self._fell = self._leader.fell = OrderedDict()
        self._search = list(range(len(self._segments.keys)))

    def _look(self) -> None:
        """Find some more of what the tier holds and the leader does not."""
        held, kept = self._segments.held, self._leader.kept
        for segment in self._search[-SEARCH:]:
            if held[segment] >> kept[segment]:
                self._fell[segment] = None
        del self._search[-SEARCH:]
