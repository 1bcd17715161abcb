"""Policies of queues with a lazy promotion: S3-FIFO and SIEVE. A hit sets a mark; eviction moves what is marked.

Both move keys while they look for a victim. Here ``victims()`` only foretells that, and ``remove`` does it for a key
that ``victims()`` has yielded: a tier that looks and evicts nothing changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from lmcache.keys import ChunkKey
from lmcache.storage.eviction.base import EvictionPolicy, Place

# S3-FIFO: the small queue's share of the capacity, and how many rounds uses are good for.
SMALL_SHARE, MOST_USES = 0.1, 3


class Sieve(EvictionPolicy):
    """SIEVE: a hand goes from old to new, spares what was used since it last passed, and evicts the rest.

    Source: Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024.

        oldest ──behind──▶ hand ──ahead──▶ newest        each maps a key to whether it was used
    """

    def __init__(self) -> None:
        self._behind: OrderedDict[ChunkKey, bool] = OrderedDict()
        self._ahead: OrderedDict[ChunkKey, bool] = OrderedDict()
        self._foretold: set[ChunkKey] = set()

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        if key in self._behind or key in self._ahead:
            self.touch(key)
            return
        self._foretold.clear()
        self._ahead[key] = False

    def touch(self, key: ChunkKey) -> None:
        self._foretold.clear()
        for part in (self._ahead, self._behind):
            if key in part:
                part[key] = True

    def remove(self, key: ChunkKey) -> None:
        if key in self._foretold:
            self._foretold.discard(key)
            self._sweep(key)
        self._behind.pop(key, None)
        self._ahead.pop(key, None)
        if not self._ahead:
            # Past the newest comes the oldest, not what will be added next.
            self._ahead, self._behind = self._behind, self._ahead

    def victims(self) -> Iterator[ChunkKey]:
        for used in (False, True):
            for part in (self._ahead, self._behind):
                for key, mark in part.items():
                    if mark is used:
                        self._foretold.add(key)
                        yield key

    def _sweep(self, key: ChunkKey) -> None:
        """Bring the hand to ``key``. It passes by what is leased, too."""
        while True:
            passed, used = next(iter(self._ahead.items()))
            if passed == key and not used:
                return
            del self._ahead[passed]
            self._behind[passed] = False
            if not self._ahead:
                self._ahead, self._behind = self._behind, self._ahead


@dataclass(slots=True)
class _Entry:
    nbytes: int
    uses: int = 0


class _Queue(OrderedDict[ChunkKey, _Entry]):
    """Oldest first."""


class S3FIFO(EvictionPolicy):
    """S3-FIFO: a small queue that new keys pass through, a main one for those used twice meanwhile, and a ghost.

        add ──▶ small (10 %) ──used──▶ main (90 %) ⟲ used        a key that is in the ghost goes to main at once
                  └──evicted──▶ ghost (keys only, as many bytes as 90 %)

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023; details as in libCacheSim. The
    capacity is the most bytes that were ever held.

    promote_at: uses in small after which main takes a key. ghost_share: of the capacity, in bytes of what it remembers.
    fill_main: until something is evicted, new keys go to main once small is full.
    """

    def __init__(self, promote_at: int = 2, ghost_share: float = 0.9, fill_main: bool = True) -> None:
        self._promote_at, self._ghost_share, self._fill_main = promote_at, ghost_share, fill_main
        self._small = _Queue()
        self._main = _Queue()
        self._ghost: OrderedDict[ChunkKey, int] = OrderedDict()
        self._small_bytes = self._main_bytes = self._ghost_bytes = self._capacity = 0
        self._full = False
        """Something was evicted; before that, everything is in ``_small``."""
        self._foretold: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey, nbytes: int, place: Place | None = None) -> None:
        if key in self._small or key in self._main:
            self.touch(key)
            return
        self._foretold.clear()
        seen = self._ghost.pop(key, None)
        if seen is not None:
            self._ghost_bytes -= seen
        # Only now: what was evicted to make room for this key does not push it out of the ghost.
        self._trim()
        if seen is None:
            self._small[key] = _Entry(nbytes)
            self._small_bytes += nbytes
        else:
            self._main[key] = _Entry(nbytes)
            self._main_bytes += nbytes
        self._capacity = max(self._capacity, self._small_bytes + self._main_bytes)

    def touch(self, key: ChunkKey) -> None:
        self._foretold.clear()
        if entry := self._small.get(key) or self._main.get(key):
            entry.uses += 1

    def remove(self, key: ChunkKey) -> None:
        evicted = key in self._foretold
        if evicted:
            self._advance(key)
        if entry := self._small.pop(key, None):
            self._small_bytes -= entry.nbytes
            if evicted:
                self._ghost[key] = entry.nbytes
                self._ghost_bytes += entry.nbytes
        elif entry := self._main.pop(key, None):
            self._main_bytes -= entry.nbytes

    def victims(self) -> Iterator[ChunkKey]:
        small, main = (self._small, self._main) if self._full else self._divided()
        for key in self._foretell(small, main):
            self._foretold[key] = None
            yield key

    def _small_size(self) -> int:
        return int(self._capacity * SMALL_SHARE)

    def _divided(self) -> tuple[_Queue, _Queue]:
        """What is held when nothing was evicted yet: the first keys in small, as many as fit, the others in main."""
        small, main, used = _Queue(), _Queue(), 0
        for key, entry in self._small.items():
            if used < self._small_size() or not self._fill_main:
                small[key], used = entry, used + entry.nbytes
            else:
                main[key] = entry
        return small, main

    def _foretell(self, small: _Queue, main: _Queue) -> Iterator[ChunkKey]:
        fresh, kept = iter(small.items()), iter(main.items())
        moved: deque[tuple[ChunkKey, int, int]] = deque()  # behind the end of main: key, bytes, uses
        small_bytes = self._small_bytes if self._full else sum(entry.nbytes for entry in small.values())
        main_bytes = self._small_bytes + self._main_bytes - small_bytes
        main_size = self._capacity - self._small_size()
        while small_bytes or main_bytes:
            if small_bytes and main_bytes <= main_size:
                for key, entry in fresh:
                    small_bytes -= entry.nbytes
                    if entry.uses < self._promote_at:
                        yield key
                        break
                    moved.append((key, entry.nbytes, 0))
                    main_bytes += entry.nbytes
                continue
            if found := next(kept, None):
                key, nbytes, uses = found[0], found[1].nbytes, found[1].uses
            else:
                key, nbytes, uses = moved.popleft()
            if uses:
                moved.append((key, nbytes, min(uses, MOST_USES) - 1))
            else:
                main_bytes -= nbytes
                yield key

    def _advance(self, key: ChunkKey) -> None:
        """Move what eviction moves on its way to ``key``."""
        if not self._full:
            self._small, self._main = self._divided()
            self._small_bytes = sum(entry.nbytes for entry in self._small.values())
            self._main_bytes = sum(entry.nbytes for entry in self._main.values())
            self._full = True
        while (other := self._foretold.popitem(last=False)[0]) != key:
            # Leased: as if it came in now.
            (self._small if other in self._small else self._main).move_to_end(other)
        main_size = self._capacity - self._small_size()
        from_small = self._main_bytes <= main_size
        while self._small and from_small:
            first, entry = next(iter(self._small.items()))
            if entry.uses < self._promote_at:
                return
            del self._small[first]
            self._small_bytes -= entry.nbytes
            self._main[first] = _Entry(entry.nbytes)
            self._main_bytes += entry.nbytes
        while self._main:
            first, entry = next(iter(self._main.items()))
            if not entry.uses:
                return
            entry.uses = min(entry.uses, MOST_USES) - 1
            self._main.move_to_end(first)

    def _trim(self) -> None:
        while self._ghost_bytes > int(self._capacity * self._ghost_share):
            self._ghost_bytes -= self._ghost.popitem(last=False)[1]


class S3FIFOPaper(S3FIFO):
    """S3-FIFO as most write it down: one use promotes, the ghost is as large as the cache, small is filled first."""

    def __init__(self) -> None:
        super().__init__(promote_at=1, ghost_share=1.0, fill_main=False)
