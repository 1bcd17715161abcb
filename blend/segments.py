"""Which runs of a prompt's tokens may have KV of their own: between separators, named, or found by their content.

    prompt     system ## passage A ## passage B ## question
    separator  |-----|  |--------|  |--------|  |------|     the separators belong to no segment
    spans               [s, e)      [s, e)                   whoever made the prompt knows
    content             |-------------------|                known passages, whole or in part, at any alignment

By content: of every passage, windows of w tokens are hashed, one every s tokens, and of a prompt the windows at every
position, all at once (a polynomial modulo 2**64: Karp and Rabin 1987). With w + s - 1 = min_tokens, a common run of
min_tokens has a hashed window in it wherever it lies. A window with an equal hash only says where to look: a match is
what the tokens themselves have in common.
"""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache.blend.reuse import Segment
from lmcache.engine.engine import TokenIds

Tokens = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
HashWindows = Callable[[Tokens, int], Hashes]

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)


@dataclass(frozen=True)
class Match(Segment):
    """A run of the prompt that is tokens ``[offset, offset + stop - start)`` of a known passage.

    passage: all its token ids as little-endian uint32.
    """

    passage: bytes
    offset: int


def as_tokens(tokens: TokenIds) -> Tokens:
    """Token ids as a flat uint32 array; bytes are taken as little-endian uint32. ValueError for anything else."""
    if isinstance(tokens, bytes):
        return np.frombuffer(tokens, dtype="<u4").astype(np.uint32, copy=False)
    array = np.asarray(tokens)
    if array.size == 0:
        return np.zeros(0, dtype=np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"token ids must be a flat sequence of integers, got {array.dtype} of shape {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 1 << 32:
        raise ValueError(f"token ids are 0 to 2**32 - 1, got {low if low < 0 else high}")
    return array.astype(np.uint32)


def split_by_separator(tokens: TokenIds, separator: TokenIds) -> list[Segment]:
    """What lies between the occurrences of ``separator``, found from the left, none overlapping.

    A separator belongs to no segment. There are no empty segments: several separators in a row, or one at an end, only
    separate. A prompt without one is a single segment.
    """
    prompt, wanted = as_tokens(tokens), as_tokens(separator)
    width = len(wanted)
    if not width:
        raise ValueError("the separator has no tokens")
    segments, start = [], 0
    for at in _occurrences(prompt, wanted):
        if at < start:
            continue  # overlaps the one before
        if at > start:
            segments.append(Segment(start, at))
        start = at + width
    if start < len(prompt):
        segments.append(Segment(start, len(prompt)))
    return segments


def explicit_spans(spans: Iterable[Sequence[int]], num_tokens: int) -> list[Segment]:
    """``[[start, stop], ...]`` as they come with a request -> segments of a prompt of ``num_tokens``.

    ValueError, saying which and why, unless they are pairs of integers, not empty, inside the prompt, sorted and
    disjoint.
    """
    segments: list[Segment] = []
    for number, span in enumerate(spans):
        where = f"span {number} is {span!r}"
        if isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 2:
            raise ValueError(f"{where}; it must be a pair [start, stop]")
        start, stop = span
        if type(start) is not int or type(stop) is not int:
            raise ValueError(f"{where}; start and stop must be integers")
        if not 0 <= start < stop <= num_tokens:
            raise ValueError(f"{where}; 0 <= start < stop <= {num_tokens}, the tokens of the prompt, must hold")
        if segments and start < segments[-1].stop:
            raise ValueError(f"{where} and the one before ends at {segments[-1].stop}; they must be sorted, disjoint")
        segments.append(Segment(start, stop))
    return segments


def rolling_hashes(tokens: Tokens, width: int) -> Hashes:
    """A hash of every window of ``width`` tokens: ``[len(tokens) - width + 1]``, of the tokens alone, not of where."""
    count = len(tokens) - width + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    # Spread the ids over all bits first, for the low bits of such a polynomial depend on low bits only.
    spread = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    spread ^= spread >> np.uint64(29)
    powers = _powers(_BASE, len(tokens))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(spread * powers, dtype=np.uint64)])
    hashes: Hashes = (sums[width:] - sums[:count]) * _powers(_BASE_INVERSE, count)
    return hashes


class ContentIndex:
    """Known passages, and where they occur in a prompt. Thread-safe.

    min_tokens: the shortest run that counts as a match; shorter passages are not known.
    capacity_tokens: of all passages; the longest unused go first. One token takes some 20 bytes.
    most_repeats: of windows with equal hashes so many are kept, and ``most_candidates`` places are looked at for one
    prompt, those of rare windows first: repetitive text costs a match, not time.
    hash_windows: as ``rolling_hashes``.
    """

    def __init__(
        self,
        min_tokens: int = 32,
        capacity_tokens: int = 1 << 20,
        *,
        most_repeats: int = 8,
        most_candidates: int = 1024,
        hash_windows: HashWindows = rolling_hashes,
    ) -> None:
        for name, value in (("min_tokens", min_tokens), ("capacity_tokens", capacity_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.min_tokens = min_tokens
        self.capacity_tokens = capacity_tokens
        self.num_tokens = 0
        self._width = (min_tokens + 1) // 2
        self._stride = min_tokens - self._width + 1
        self._most_repeats = most_repeats
        self._most_candidates = most_candidates
        self._hash_windows = hash_windows
        self._passages: OrderedDict[bytes, _Passage] = OrderedDict()  # the longest unused first
        self._windows: dict[int, list[tuple[_Passage, int]]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._passages)

    def __contains__(self, passage: TokenIds) -> bool:
        return as_tokens(passage).astype("<u4").tobytes() in self._passages

    def add(self, passage: TokenIds) -> bool:
        """Know ``passage`` from now on, or, if it is known, as just used; False if it is too short or too long."""
        tokens = as_tokens(passage)
        if not self.min_tokens <= len(tokens) <= self.capacity_tokens:
            return False
        packed = tokens.astype("<u4").tobytes()
        hashes = self._hashes_of(tokens)
        with self._lock:
            if packed in self._passages:
                self._passages.move_to_end(packed)
                return True
            while self.num_tokens + len(tokens) > self.capacity_tokens:
                self._forget(next(iter(self._passages)))
            known = _Passage(self._count, tokens, packed)
            self._count += 1
            self._passages[packed] = known
            self.num_tokens += len(tokens)
            for number, value in enumerate(hashes):
                places = self._windows.setdefault(value, [])
                if len(places) < self._most_repeats:
                    places.append((known, number * self._stride))
        return True

    def discard(self, passage: TokenIds) -> bool:
        """Forget a passage, for example because its KV is gone; whether it was known."""
        packed = as_tokens(passage).astype("<u4").tobytes()
        with self._lock:
            known = packed in self._passages
            if known:
                self._forget(packed)
        return known

    def find(self, tokens: TokenIds) -> list[Match]:
        """Disjoint matches of at least ``min_tokens``, sorted by where they start.

        The longest goes first; of equals the leftmost, then that in the shortest passage, then in the one that is
        known for longest, then the one that comes first in it. Of later ones what is left free counts.
        """
        prompt = as_tokens(tokens)
        hashes = self._hash_windows(prompt, self._width).tolist()
        with self._lock:
            matches = _longest_first(self._runs(prompt, hashes), self.min_tokens)
            for match in matches:
                self._passages.move_to_end(match.passage)
        return matches

    def _runs(self, prompt: Tokens, hashes: list[int]) -> list[_Run]:
        """What prompt and passages have in common, as long as possible, each once."""
        known = self._windows
        seeds = [(at, known[value]) for at, value in enumerate(hashes) if value in known]
        seeds.sort(key=lambda seed: len(seed[1]))
        # By passage and by how far it lies before or behind the prompt: runs on one diagonal do not overlap.
        found: dict[tuple[int, int], list[_Run]] = {}
        left = self._most_candidates
        for at, places in seeds:
            for passage, offset in places:
                diagonal = found.setdefault((passage.number, at - offset), [])
                if any(run.start <= at < run.stop for run in diagonal):
                    continue
                if not left:
                    return _flattened(found)
                left -= 1
                run = _extended(prompt, at, passage, offset, self._width)
                if run is not None:
                    diagonal.append(run)
        return _flattened(found)

    def _hashes_of(self, passage: Tokens) -> list[int]:
        hashes: list[int] = self._hash_windows(passage, self._width)[:: self._stride].tolist()
        return hashes

    def _forget(self, packed: bytes) -> None:
        passage = self._passages.pop(packed)
        self.num_tokens -= len(passage.tokens)
        for value in set(self._hashes_of(passage.tokens)):
            # None where all that was kept of this window were others, which are gone.
            places = [place for place in self._windows.get(value, []) if place[0] is not passage]
            if places:
                self._windows[value] = places
            else:
                self._windows.pop(value, None)


class _Passage(NamedTuple):
    number: int
    tokens: Tokens
    packed: bytes


class _Run(NamedTuple):
    """Tokens ``[start, stop)`` of the prompt are those of ``passage`` from ``offset`` on."""

    start: int
    stop: int
    passage: _Passage
    offset: int

    def part(self, start: int, stop: int) -> _Run:
        return _Run(start, stop, self.passage, self.offset + start - self.start)

    @property
    def rank(self) -> tuple[int, int, int, int, int]:
        passage = self.passage
        return self.start - self.stop, self.start, len(passage.tokens), passage.number, self.offset


def _occurrences(prompt: Tokens, wanted: Tokens) -> list[int]:
    """Where ``wanted`` starts, overlapping ones included."""
    count = len(prompt) - len(wanted) + 1
    if count <= 0:
        return []
    here = np.ones(count, dtype=bool)
    for offset, token in enumerate(wanted):
        here &= prompt[offset : offset + count] == token
    starts: list[int] = np.flatnonzero(here).tolist()
    return starts


def _powers(base: int, count: int) -> Hashes:
    """base**0 .. base**(count - 1) modulo 2**64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _extended(prompt: Tokens, at: int, passage: _Passage, offset: int, width: int) -> _Run | None:
    """The window at ``at`` made as long as the tokens are equal; None if its own are not."""
    theirs = passage.tokens
    if not np.array_equal(prompt[at : at + width], theirs[offset : offset + width]):
        return None
    before, behind = min(at, offset), min(len(prompt) - at, len(theirs) - offset) - width
    differs = prompt[at + width : at + width + behind] != theirs[offset + width : offset + width + behind]
    longer = int(differs.argmax()) if differs.any() else behind
    differs = (prompt[at - before : at] != theirs[offset - before : offset])[::-1]
    earlier = int(differs.argmax()) if differs.any() else before
    return _Run(at - earlier, at + width + longer, passage, offset - earlier)


def _flattened(found: dict[tuple[int, int], list[_Run]]) -> list[_Run]:
    return [run for runs in found.values() for run in runs]


def _longest_first(runs: Iterable[_Run], min_tokens: int) -> list[Match]:
    queue = [(run.rank, run) for run in runs if run.stop - run.start >= min_tokens]
    heapq.heapify(queue)
    taken: list[Match] = []  # sorted, disjoint
    while queue:
        _, run = heapq.heappop(queue)
        first = bisect_right(taken, run.start, key=lambda match: match.stop)
        start, whole = run.start, True
        parts = []
        for match in taken[first:]:
            if match.start >= run.stop:
                break
            whole = False
            parts.append((start, match.start))
            start = match.stop
        if whole:
            taken.insert(first, Match(run.start, run.stop, run.passage.packed, run.offset))
            continue
        for begin, end in (*parts, (start, run.stop)):
            if end - begin >= min_tokens:
                part = run.part(begin, end)
                heapq.heappush(queue, (part.rank, part))
    return taken
