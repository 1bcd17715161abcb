"""What is measured of a blend whose KV is loaded, and medians of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Timed:
    """One measurement. method: load, compute, sequential, pipelined or chosen. ratio: 0 for loads."""

    load: float
    bytes_per_s: float
    method: str
    ratio: float
    repeat: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """Medians at one rate and one ratio. chosen: by the controller; only pipelined_s is of that ratio then."""

    load: float
    bytes_per_s: float
    ratio: float
    load_s: float
    compute_s: float
    sequential_s: float
    pipelined_s: float
    chosen: bool = False

    @property
    def share(self) -> float:
        return self.pipelined_s / self.sequential_s

    @property
    def balanced(self) -> bool:
        """Neither part is below half the other: there is something to hide, and something to hide it behind."""
        return min(self.load_s, self.compute_s) >= max(self.load_s, self.compute_s) / 2


def summary(rows: Sequence[Timed], chosen: float) -> list[Found]:
    """Of one rate, by ratio; that of the controller last, beside what load and compute take at the smallest."""
    times: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        times.setdefault((row.method, 0.0 if row.method == "chosen" else row.ratio), []).append(row.seconds)
    of: Mapping[tuple[str, float], float] = {key: median(values) for key, values in times.items()}
    ratios = sorted({ratio for method, ratio in of if method == "compute"})
    load, rate = rows[0].load, rows[0].bytes_per_s
    found = [
        Found(load, rate, r, of["load", 0.0], of["compute", r], of["sequential", r], of["pipelined", r]) for r in ratios
    ]
    least = found[0]
    return [*found, dataclasses.replace(least, ratio=chosen, pipelined_s=of["chosen", 0.0], chosen=True)]
