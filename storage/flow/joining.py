"""Leases that want the same chunks share their reads.

    lease A ── keys 0 1 2 3 a b ──┐
      (0 1 in memory)             ├──> flight: reads 2 3 a b (reading.py) under a lease of its own
    lease B ── keys 0 1 2 3 c ────┘
                          B takes 2 3 as they come, then goes on with c in a flight of its own

A lease is done at its own deadline, even if its flight is not. A flight that no lease waits for any more finishes the
batches that it has begun, which stay in memory, and begins no further one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcache import metrics
from lmcache.keys import ChunkKey
from lmcache.storage.flow.reading import Reading
from lmcache.storage.flow.tier import LowerTier
from lmcache.storage.lease import Lease
from lmcache.storage.memory.tier import MemoryTier
from lmcache.storage.run.deadlines import Deadlines

Ends = Callable[[int], Sequence[tuple[ChunkKey, int | range]]]
Keep = Callable[[ChunkKey], bool]
MOST_ENDS = 16  # of the keys that a lease may end with, asked for one by one, and in memory any number


class Flight:
    """Chunks that are being read, and the searches that wait for them."""

    def __init__(self, keys: Sequence[ChunkKey], sizes: Sequence[int | range], ends_at: float) -> None:
        self.keys = keys
        self.ends_at = ends_at
        self.cancelled = False
        self.searches: list[Search] = []
        self.carrier = Lease(keys, sizes, 0.0)


@dataclass(frozen=True)
class _Seat:
    """Where a search joined a flight: lease key ``i`` is flight key ``i - offset``, up to flight key ``stop``."""

    flight: Flight
    offset: int
    stop: int


class Joining:
    """The flights of one manager. Thread-safe; nothing here waits.

    most: flights at once. A lease that would need one more has what is in memory: a miss, counted.
    """

    def __init__(
        self, tiers: Sequence[LowerTier], memory: MemoryTier, deadlines: Deadlines, *, batch_bytes: int, most: int
    ) -> None:
        self.tiers = tiers
        self.memory = memory
        self.deadlines = deadlines
        self._batch_bytes = batch_bytes
        self._most = most
        self._lock = threading.Lock()
        self._flights: set[Flight] = set()
        self._by_key: dict[ChunkKey, tuple[Flight, int]] = {}

    def read(self, lease: Lease, timeout_s: float, *, keep: Keep, ends: Ends | None = None, join: bool = True) -> None:
        """Read what ``lease`` lacks; it is done after ``timeout_s`` at the latest. See ``StorageManager.acquire``."""
        Search(self, lease, time.monotonic() + timeout_s, keep, join, ends).start()

    @property
    def available(self) -> bool:
        """Whether any tier can be read now."""
        return any(tier.available for tier in self.tiers)

    def cancel(self, matches: Callable[[ChunkKey], bool]) -> None:
        """Hand on nothing more of what is being read and ``matches``; the leases on it are done with what they have."""
        with self._lock:
            gone = {flight for flight in self._flights if any(map(matches, flight.keys))}
            for flight in gone:
                flight.cancelled = True
                self._drop(flight)
        for flight in gone:
            flight.carrier.settle()

    def join(self, search: Search) -> bool:
        """Have the search wait for its next key, in the flight that reads it or a new one; False: there are too many.

        No lock is held by who calls: the search may hear of its flight before this returns.
        """
        lease = search.lease
        first = lease.ready
        with self._lock:
            flight, at = self._by_key.get(lease.keys[first], (None, 0)) if search.joins else (None, 0)
            new = flight is None
            if flight is None:
                if len(self._flights) >= self._most:
                    metrics.LOOKUPS_REFUSED.inc()
                    return False
                flight = Flight(lease.keys[first:], lease.sizes[first:], search.ends_at)
                self._flights.add(flight)
                if search.joins:
                    for place, key in enumerate(flight.keys):
                        self._by_key.setdefault(key, (flight, place))
            stop = at + _common(flight.keys[at:], lease.keys[first:])
            search.sit(_Seat(flight, first - at, stop))
            flight.searches.append(search)
        if lease.done:  # before it could be seen to leave
            self.leave(flight, search)
        if new:
            self._start(flight, search, lease.keys[first - 1] if first else None)
        else:
            search.arrived(flight)
        return True

    def _start(self, flight: Flight, search: Search, parent: ChunkKey | None) -> None:
        flight.carrier.tell_reader(lambda: self._ended(flight))
        reading = Reading(
            flight.carrier,
            self.tiers,
            self.memory,
            batch_bytes=self._batch_bytes,
            keep=search.keep,
            parent=parent,
            on_progress=lambda: self._progress(flight),
            wanted=lambda: self._wanted(flight),
        )
        try:
            reading.start(max(1e-3, flight.ends_at - time.monotonic()), self.deadlines)
        except BaseException:
            flight.carrier.settle()
            raise

    def leave(self, flight: Flight, search: Search) -> None:
        with self._lock:
            if search in flight.searches:
                flight.searches.remove(search)

    def _wanted(self, flight: Flight) -> bool:
        with self._lock:
            if not flight.searches:
                self._drop(flight)  # nobody joins what ends
            return bool(flight.searches)

    def _progress(self, flight: Flight) -> None:
        with self._lock:
            searches = list(flight.searches)
        for search in searches:
            search.arrived(flight)

    def _ended(self, flight: Flight) -> None:
        with self._lock:
            self._drop(flight)
            searches, flight.searches = flight.searches, []
        for search in searches:
            search.landed(flight)
        flight.carrier.close()

    def _drop(self, flight: Flight) -> None:
        self._flights.discard(flight)
        for key in flight.keys:
            if self._by_key.get(key, (None, 0))[0] is flight:
                del self._by_key[key]


class Search:
    """One lease on its way through flights, and then through the keys that it may end with."""

    def __init__(
        self, joining: Joining, lease: Lease, ends_at: float, keep: Keep, joins: bool, ends: Ends | None
    ) -> None:
        self.lease = lease
        self.ends_at = ends_at
        self.keep = keep
        self.joins = joins
        self._ends = ends
        self._joining = joining
        self._lock = threading.Lock()
        self._seat: _Seat | None = None
        self._probe: Lease | None = None

    def start(self) -> None:
        lease = self.lease
        lease.hold(self._joining.memory.pin(lease.keys))
        if lease.ready == len(lease.keys) and self._ends is None:
            lease.settle()
            return
        # After that of its own flight, which tells the tier that it hangs.
        deadline = self._joining.deadlines.at(self.ends_at + 2e-3, self.lease.settle)

        def ended() -> None:
            deadline.cancel()
            with self._lock:
                seat, self._seat = self._seat, None
            if seat is not None:
                self._joining.leave(seat.flight, self)
            if self._probe is not None:
                self._probe.settle()

        self.lease.tell_reader(ended)
        self._go_on()

    def sit(self, seat: _Seat) -> None:
        with self._lock:
            self._seat = seat

    def arrived(self, flight: Flight) -> None:
        """The flight holds more."""
        with self._lock:
            seat = self._seat
            if seat is None or seat.flight is not flight:
                return
            self._take(seat)
            if self.lease.ready < seat.offset + seat.stop and not self.lease.done:
                return
            self._seat = None
        self._joining.leave(flight, self)
        self._go_on()

    def landed(self, flight: Flight) -> None:
        """The flight has ended."""
        with self._lock:
            seat = self._seat
            if seat is None or seat.flight is not flight:
                return
            self._take(seat)
            self._seat = None
        ready = self.lease.ready
        asked = ready < seat.offset + seat.stop and ready == seat.offset + flight.carrier.ready
        if flight.cancelled:
            self.lease.settle()
        elif asked and time.monotonic() < flight.ends_at:
            self._end()  # no tier has the next one
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Wait for the next key that is not held."""
        lease, joining = self.lease, self._joining
        if not lease.done:
            lease.hold(joining.memory.pin(lease.keys[lease.ready :]))
        if lease.done or time.monotonic() >= self.ends_at:
            lease.settle()
        elif lease.ready == len(lease.keys) or not joining.available:
            self._end()
        elif not joining.join(self):
            lease.settle()

    def _take(self, seat: _Seat) -> None:
        """Hold what has come of the keys that both want."""
        first = self.lease.ready - seat.offset
        if first >= 0 and not self.lease.done:
            self.lease.hold(seat.flight.carrier.share(first, seat.stop))

    def _end(self) -> None:
        """No more of the keys can be had: take the first that may stand there instead, and be done."""
        ends = [] if self._ends is None or self.lease.done else self._ends(self.lease.ready)
        self._end_with(ends, MOST_ENDS)

    def _end_with(self, ends: Sequence[tuple[ChunkKey, int | range]], questions: int) -> None:
        lease, joining = self.lease, self._joining
        here = next((at for at, (key, _) in enumerate(ends) if key in joining.memory), len(ends))
        if here and questions and joining.available and not lease.done and time.monotonic() < self.ends_at:
            (key, size), rest = ends[0], ends[1:]

            def probed(probe: Lease) -> None:
                if found := probe.share():
                    lease.hold_end(key, size, found)
                probe.close()
                if found:
                    lease.settle()
                else:
                    self._end_with(rest, questions - 1)

            self._probe = Lease([key], [size], 0.0, probed)
            Search(joining, self._probe, self.ends_at, self.keep, self.joins, None).start()
            return
        if here < len(ends):
            lease.hold_end(*ends[here], joining.memory.pin([ends[here][0]]))
        lease.settle()


def _common(one: Sequence[ChunkKey], other: Sequence[ChunkKey]) -> int:
    """How many keys both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
