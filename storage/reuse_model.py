"""What is known about when chunks are used again: learned reuse intervals, and what keeping a chunk is worth.

Time is counted in uses of chunks. The age of a chunk is the time since its last use, cut into levels that grow
geometrically; chunks of one kind (see eviction_kv.py) share counts of how many came to a level and were used there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Ages at which the levels begin. The last one has no end: what gets there is taken for never
# used again, and what was let go is forgotten then. So no more than that many are remembered beside what is held.
LEVELS = 36
STARTS = [0, *(int(32 * 1.3**i) for i in range(LEVELS - 1))]
LAST = LEVELS - 1
# Chunks of the wider kind that a kind's own counts are mixed with: those of a request live and die together.
PRIOR_CHUNKS = 100.0
# Before anything is known: as many are used again in each level, so that the least recently used is worth least.
FIRST_GUESS = 0.05
# Uses after which what was counted counts half.
HALF_LIFE = 1 << 18

Kind = tuple[int, ...]
Counts = npt.NDArray[np.float64]


class ReuseModel:
    """Counts by kind and level, and the value of each. A kind's wider kind is the tuple without its last number."""

    def __init__(self) -> None:
        self._index: dict[Kind, int] = {}
        self._wider: list[int] = []
        self.entered: list[list[float]] = []
        """By kind: chunks that came to a level; ``used``: that were used there; ``left``: that grew older."""
        self.used: list[list[float]] = []
        self.left: list[list[float]] = []
        self.value: list[list[float]] = []
        """By kind and level: expected uses for each unit of time that such a chunk is kept."""
        self._fitted = 0
        self.kind(())

    def kind(self, kind: Kind) -> int:
        """The number of a kind."""
        index = self._index.get(kind)
        if index is None:
            wider = self.kind(kind[:-1]) if kind else -1
            index = self._index[kind] = len(self._wider)
            self._wider.append(wider)
            for counts in (self.entered, self.used, self.left):
                counts.append([0.0] * LEVELS)
            self.value.append(self.value[wider] if kind else [1.0 / (start + 1) for start in STARTS])
        return index

    def fit(self, now: int) -> None:
        """Renew ``value`` by what was counted, and let old counts fade."""
        entered, used, left = (np.array(counts) for counts in (self.entered, self.used, self.left))
        for index in range(len(self._wider) - 1, 0, -1):  # wider kinds come before theirs
            for counts in (entered, used, left):
                counts[self._wider[index]] += counts[index]
        # Those still inside a level have, on average, half of it behind them.
        exposed = used + left + np.maximum(entered - used - left, 0) / 2
        used, exposed = smooth(used), smooth(exposed)
        chance = np.empty_like(used)
        for index, wider in enumerate(self._wider):
            prior = chance[wider] if index else np.full(LEVELS, FIRST_GUESS)
            chance[index] = (used[index] + PRIOR_CHUNKS * prior) / (exposed[index] + PRIOR_CHUNKS)
        chance[:, LAST] = 0
        self.value = worth(np.minimum(chance, 0.999)).tolist()
        fade = 0.5 ** ((now - self._fitted) / HALF_LIFE)
        self._fitted = now
        for rows in (self.entered, self.used, self.left):
            rows[:] = [[count * fade for count in row] for row in rows]


def worth(chance: Counts) -> Counts:
    """``[kinds, levels]`` chances of a use within a level -> expected uses a unit of time, when kept as long as best.

    A chunk that is kept until some age costs room until it is used or that age is reached, whichever is first. The
    value is the best ratio of uses to time over all such ages (a Gittins index): what is worth least should go, however
    large the cache is. Reuse that becomes likely only later, as when a user reads an answer first, counts already now.
    """
    width = np.diff(np.array([*STARTS, 2 * STARTS[-1]], dtype=np.float64))
    value = np.zeros_like(chance)
    for level in range(LEVELS):
        ahead = chance[:, level:]
        alive = np.cumprod(1 - ahead, axis=1)
        alive = np.concatenate([np.ones((len(chance), 1)), alive[:, :-1]], axis=1)
        uses = np.cumsum(alive * ahead, axis=1)
        time = np.cumsum(alive * (1 - ahead / 2) * width[level:], axis=1)
        value[:, level] = (uses / time).max(axis=1)
    return value


def smooth(counts: Counts) -> Counts:
    """``[kinds, levels]`` with neighbouring levels mixed in: levels are finer than what is known of them."""
    edged = np.pad(counts, ((0, 0), (1, 1)))
    return edged[:, :-2] / 4 + counts / 2 + edged[:, 2:] / 4
