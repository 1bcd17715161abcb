"""When vLLM's blocks were begun."""

from __future__ import annotations

import pytest

from lmcache.connector.scheduler.blocks import BlockAges


def test_a_block_keeps_the_step_of_its_first_token() -> None:
    ages = BlockAges([16])
    blocks = ([3, 4, 5],)
    ages.begun(blocks, 0, 20, 1)  # block 4 is begun
    ages.begun(blocks, 20, 32, 2)  # and filled
    ages.begun(blocks, 32, 33, 3)
    assert [ages.oldest(([block],), 16) for block in (3, 4, 5)] == [1, 1, 3]
    assert ages.oldest(blocks, 33) == 1
    ages.begun(blocks, 0, 16, 9)  # the block belongs to somebody else now
    assert ages.oldest(blocks, 16) == 9
    assert ages.oldest(blocks, 33) == 1


def test_a_block_that_nobody_began_is_older_than_everything() -> None:
    ages = BlockAges([16])
    assert ages.oldest(([7],), 16) == -1
    assert ages.oldest(([70000],), 16) == -1
    ages.begun(([70000],), 0, 16, 4)
    assert ages.oldest(([70000],), 16) == 4
    assert ages.oldest(([70000, 7],), 32) == -1
    assert ages.oldest(([],), 0) == -1


def test_groups_have_blocks_of_their_own_size_and_the_null_block_is_nobodys() -> None:
    ages = BlockAges([16, 64])
    ages.begun(([1, 2, 3, 4], [9]), 0, 64, 2)
    ages.begun(([1, 2, 3, 4, 5], [9, 0]), 64, 70, 5)
    assert ages.oldest(([1, 2, 3, 4, 5], [0, 0]), 70) == 2
    assert ages.oldest(([5], [0]), 16) == 5


@pytest.mark.parametrize(
    ("start", "count", "begins"), [(0, 1, True), (1, 15, False), (1, 16, True), (16, 1, True), (5, 0, False)]
)
def test_whether_tokens_begin_a_block(start: int, count: int, begins: bool) -> None:
    assert BlockAges([16]).begins(start, count) is begins
