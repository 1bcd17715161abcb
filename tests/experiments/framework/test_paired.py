"""Means, paired differences and their intervals, against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.framework import paired


def test_a_constant_has_no_spread() -> None:
    interval = paired.mean([2.0] * 6, ["a", "a", "b", "b", "c", "c"])
    assert (interval.value, interval.low, interval.high) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    interval = paired.mean(list(values), range(400))
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.06)


def test_values_of_one_group_are_drawn_together() -> None:
    values, groups = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    interval = paired.mean(values, groups)
    assert (interval.low, interval.high) == (0.0, 1.0)  # two groups: both draws may be of one
    assert paired.mean(values, range(100)).high < 0.65


def test_a_comparison_is_paired() -> None:
    base = np.random.default_rng(2).normal(10.0, 5.0, 30)
    comparison = paired.compare(list(base - 0.1), list(base), range(30))
    assert comparison.difference.value == pytest.approx(-0.1)
    assert comparison.difference.high < 0
    assert comparison.ratio.value == pytest.approx((base.mean() - 0.1) / base.mean())


def test_a_ratio_is_one_of_means() -> None:
    comparison = paired.compare([1.0, 1.0], [1.0, 3.0], ["a", "b"])
    assert comparison.ratio.value == 0.5
    assert (comparison.ratio.low, comparison.ratio.high) == (pytest.approx(1 / 3), 1.0)


def test_equal_methods_are_not_told_apart() -> None:
    comparison = paired.compare([0.2, 0.1, 0.3, 0.2], [0.1, 0.2, 0.2, 0.3], "abcd")
    assert comparison.difference.low < 0 < comparison.difference.high


def test_the_same_values_give_the_same_interval() -> None:
    values = list(np.random.default_rng(3).normal(size=20))
    assert paired.mean(values, range(20)) == paired.mean(values, range(20))


@pytest.mark.parametrize(("values", "groups"), [([1.0], "ab"), ([], "")])
def test_each_value_needs_a_group(values: list[float], groups: str) -> None:
    with pytest.raises(ValueError, match="a group for each"):
        paired.mean(values, groups)
