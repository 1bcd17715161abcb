"""What is known about when chunks are used again: learned reuse intervals, and what keeping a chunk is worth.

Time is counted in uses of chunks. The age of a chunk is the time since its last use, cut into levels that grow
geometrically; chunks of one kind (see learned.py) share counts of how many were used at a level.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Ages at which the levels begin. The last one has no end: what gets there is taken for never used again.
LEVELS = 28
STARTS = [0, *(int(32 * 1.4**i) for i in range(LEVELS - 1))]
LAST = LEVELS - 1
# Chunks of the wider kind that a kind's own counts are mixed with: those of a request live and die together.
PRIOR_CHUNKS = 100.0
# Before anything is known: as many are used again in each level, so that the least recently used is worth least.
FIRST_GUESS = 0.05
# Uses after which what was counted counts half.
HALF_LIFE = 1 << 18

Kind = tuple[int, ...]
Counts = npt.NDArray[np.float64]
Times = npt.NDArray[np.int64]
_STARTS = np.array(STARTS)
_WIDTHS = np.diff(np.array([*STARTS, 2 * STARTS[-1]], dtype=np.float64))


class ReuseModel:
    """Counts by kind and level, and the value of each. A kind's wider kind is the tuple without its last number."""

    def __init__(self) -> None:
        self._index: dict[Kind, int] = {}
        self._wider: list[int] = []
        self.used: list[list[float]] = []
        """By kind and level: chunks that were used there; in the last level, those that were never used again."""
        self.value: list[list[float]] = []
        """By kind and level: expected uses for each unit of time that such a chunk is kept."""
        self._chance = np.zeros((0, LEVELS))
        self._fitted = 0
        self.kind(())

    def __len__(self) -> int:
        return len(self._wider)

    def kind(self, kind: Kind) -> int:
        """The number of a kind."""
        index = self._index.get(kind)
        if index is None:
            wider = self.kind(kind[:-1]) if kind else -1
            index = self._index[kind] = len(self._wider)
            self._wider.append(wider)
            self.used.append([0.0] * LEVELS)
            self.value.append(self.value[wider] if kind else [1.0 / (start + 1) for start in STARTS])
        return index

    def fit(self, now: int, kinds: Times, ages: Times, weights: Times) -> None:
        """Renew the chances by what was counted, and let old counts fade; ``price`` comes next.

        kinds, ages: of what waits for its next use, each of which stands for some chunks, its weight.
        """
        used = np.array(self.used)
        levels = np.searchsorted(_STARTS, ages, side="right") - 1
        waiting = np.bincount(kinds * LEVELS + levels, weights, used.size).reshape(used.shape)
        self.used = (used * 0.5 ** ((now - self._fitted) / HALF_LIFE)).tolist()
        self._fitted = now
        for index in range(len(self) - 1, 0, -1):  # wider kinds come before theirs
            for counts in (used, waiting):
                counts[self._wider[index]] += counts[index]
        # Those that ended or wait in a level were, on average, exposed to half of it; to those before, whole.
        stopped = used + waiting
        exposed = np.cumsum(stopped[:, ::-1], axis=1)[:, ::-1] - waiting / 2
        used[:, LAST] = 0
        used, exposed = smooth(used), smooth(exposed)
        chance = np.empty_like(used)
        for index, wider in enumerate(self._wider):
            prior = chance[wider] if index else np.full(LEVELS, FIRST_GUESS)
            chance[index] = (used[index] + PRIOR_CHUNKS * prior) / (exposed[index] + PRIOR_CHUNKS)
        chance[:, LAST] = 0
        self._chance = np.minimum(chance, 0.999)

    def price(self) -> None:
        """Renew ``value`` by the chances."""
        self.value = worth(self._chance).tolist()


def worth(chance: Counts) -> Counts:
    """``[kinds, levels]`` chances of a use within a level -> expected uses a unit of time, when kept as long as best.

    A chunk that is kept until some age costs room until it is used or that age is reached, whichever is first. The
    value is the best ratio of uses to time over all such ages (a Gittins index): what is worth least should go, however
    large the cache is. Reuse that becomes likely only later, as when a user reads an answer first, counts already now.
    """
    none = np.zeros((len(chance), 1))
    alive = np.maximum(np.concatenate([none + 1, np.cumprod(1 - chance, axis=1)[:, :-1]], axis=1), 1e-60)
    uses = np.concatenate([none, np.cumsum(alive * chance, axis=1)], axis=1)
    time = np.concatenate([none, np.cumsum(alive * (1 - chance / 2) * _WIDTHS, axis=1)], axis=1)
    value = np.zeros_like(chance)
    for level in range(LAST):
        # What is alive at this level divides both and cancels out.
        value[:, level] = (
            (uses[:, level + 1 :] - uses[:, level, None]) / (time[:, level + 1 :] - time[:, level, None])
        ).max(1)
    return value


def smooth(counts: Counts) -> Counts:
    """``[kinds, levels]`` with neighbouring levels mixed in: levels are finer than what is known of them."""
    edged = np.pad(counts, ((0, 0), (1, 1)))
    return edged[:, :-2] / 4 + counts / 2 + edged[:, 2:] / 4
