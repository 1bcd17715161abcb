"""Fewer cases of a large parameter grid, with every pair of values of two parameters still among them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

Pair = tuple[int, Hashable, int, Hashable]


def pairs(row: Sequence[Hashable]) -> set[Pair]:
    """(column, its value, the same or a later column, its value) of a row of the grid."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(row), 2)}


def covering(grid: Sequence[Sequence[Hashable]]) -> list[int]:
    """Which rows to keep, ascending: each pair that any row of the grid has is in one that is kept. Deterministic.

    Greedy: the row that covers most of what is still uncovered, the first of several. Some rows more than a minimum.
    """
    of_row = [pairs(row) for row in grid]
    uncovered: set[Pair] = set().union(*of_row)
    kept: set[int] = set()
    while uncovered:
        best = max(range(len(grid)), key=lambda i: (len(of_row[i] & uncovered), -i))
        kept.add(best)
        uncovered -= of_row[best]
    return sorted(kept)
