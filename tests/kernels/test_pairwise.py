"""The cases that interpret and aot modes run of a grid hold every pair of its values."""

from __future__ import annotations

import itertools
import math

import pytest
from pairwise import covering, pairs

pytestmark = pytest.mark.host


@pytest.mark.parametrize("sizes", [(1,), (3,), (4, 5), (2, 2, 5, 4), (3, 3, 3), (2, 2, 2, 3, 4), (6, 4, 5)])
def test_every_pair_is_kept(sizes: tuple[int, ...]) -> None:
    grid = list(itertools.product(*map(range, sizes)))
    kept = [grid[i] for i in covering(grid)]
    assert set().union(*map(pairs, kept)) == set().union(*map(pairs, grid))
    for i, j in itertools.combinations_with_replacement(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in kept} == {(row[i], row[j]) for row in grid}
    assert len(kept) <= 2 * math.prod(sorted(sizes)[-2:])


def test_an_incomplete_grid_keeps_the_pairs_that_it_has() -> None:
    grid = [row for row in itertools.product(range(3), repeat=3) if sum(row) != 4]
    assert set().union(*(pairs(grid[i]) for i in covering(grid))) == set().union(*map(pairs, grid))
