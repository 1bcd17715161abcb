"""What a line of storage_bench is: an operation, the physical limit that it is measured against, and a floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Case:
    """One line of the table.

    nbytes   payload that one call of `run` moves; 0 where only time counts
    run      the operation; `limit` the raw one on the same medium and the same bytes, or None
    floor    least share of the limit's rate that is acceptable (of medians of interleaved rounds), or None
    most_s   most seconds that a call may take, or None
    close    called when the case has been measured
    """

    name: str
    size: str
    nbytes: int
    run: Callable[[], object]
    limit: Callable[[], object] | None = None
    limit_name: str = ""
    floor: float | None = None
    most_s: float | None = None
    close: Callable[[], object] = lambda: None
    repeats: int = 9
