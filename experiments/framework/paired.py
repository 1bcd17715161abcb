"""Paired comparisons of two methods on the same prompts, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Comparison:
    """Two means compared: a - b, and a / b."""

    difference: Interval
    ratio: Interval


def mean(values: Sequence[float], groups: Sequence[Hashable]) -> Interval:
    """The mean. Whole groups are drawn: prompts about one article share text and are not independent."""
    sums, counts, drawn = _resampled(np.asarray([values], dtype=float), groups)
    return _interval(float(np.mean(values)), sums[0][drawn].sum(1) / counts[drawn].sum(1))


def compare(a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable]) -> Comparison:
    """Values of the same prompts, in the same order. Each repeat draws the same groups for both, as they are paired."""
    sums, counts, drawn = _resampled(np.asarray([a, b], dtype=float), groups)
    of_a, of_b = (side[drawn].sum(1) / counts[drawn].sum(1) for side in sums)
    mean_a, mean_b = float(np.mean(a)), float(np.mean(b))
    tiny = np.finfo(float).tiny
    return Comparison(
        _interval(mean_a - mean_b, of_a - of_b),
        _interval(mean_a / max(mean_b, tiny), of_a / np.maximum(of_b, tiny)),
    )


def _resampled(
    values: Array, groups: Sequence[Hashable], repeats: int = 10_000
) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Sums `[methods, G]` and counts `[G]` of each group, and which groups each repeat draws `[repeats, G]`."""
    if values.shape[1] != len(groups) or not len(groups):
        raise ValueError(
            f"{values.shape[1]} values in {len(groups)} groups; there must be a group for each, one at least"
        )
    names = list(dict.fromkeys(groups))
    members = np.asarray([[group == name for name in names] for group in groups], dtype=float)  # [n, G]
    drawn = np.random.default_rng(0).integers(len(names), size=(repeats, len(names)))
    return values @ members, members.sum(0), drawn


def _interval(value: float, repeats: Array) -> Interval:
    low, high = np.quantile(repeats, (0.025, 0.975))
    return Interval(value, float(low), float(high))
