"""The retry helper: bounded in number, in pauses and by the deadline."""

from __future__ import annotations

import time

import pytest

from lmcache.errors import ConfigError
from lmcache.storage.backends.redis.retry import RetryConfig, retrying


class Flaky:
    def __init__(self, failures: int) -> None:
        self.calls, self.failures = 0, failures

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError(f"failure {self.calls}")
        return self.calls


def far() -> float:
    return time.monotonic() + 60.0


def test_a_call_that_succeeds_is_made_once() -> None:
    call = Flaky(0)
    assert retrying(call, RetryConfig(), deadline=far(), on=(OSError,)) == 1


def test_failures_are_tried_again_with_growing_capped_pauses() -> None:
    pauses: list[float] = []
    between: list[int] = []
    config = RetryConfig(attempts=5, base_s=0.1, cap_s=0.3)
    call = Flaky(4)
    result = retrying(
        call,
        config,
        deadline=far(),
        on=(ConnectionError,),
        between=lambda: between.append(call.calls),
        sleep=pauses.append,
        jitter=lambda low, high: high,
    )
    assert result == 5
    assert pauses == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert between == [1, 2, 3, 4]


def test_pauses_are_drawn_between_nothing_and_the_bound() -> None:
    drawn: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    retrying(Flaky(2), RetryConfig(base_s=0.2, cap_s=9.0), deadline=far(), on=(OSError,), jitter=jitter)
    assert drawn == [(0.0, 0.2), (0.0, 0.4)]


def test_the_last_error_is_raised_when_the_tries_are_used_up() -> None:
    call = Flaky(9)
    with pytest.raises(ConnectionError, match="failure 3"):
        retrying(call, RetryConfig(attempts=3), deadline=far(), on=(OSError,), sleep=lambda _: None)
    assert call.calls == 3


def test_other_errors_are_not_tried_again() -> None:
    call = Flaky(9)
    with pytest.raises(ConnectionError, match="failure 1"):
        retrying(call, RetryConfig(), deadline=far(), on=(TimeoutError,))


def test_no_pause_passes_the_deadline() -> None:
    call = Flaky(9)
    with pytest.raises(ConnectionError, match="failure 1"):
        retrying(
            call,
            RetryConfig(attempts=9, base_s=5.0, cap_s=5.0),
            deadline=time.monotonic() + 1.0,
            on=(OSError,),
            sleep=lambda _: pytest.fail("slept"),
            jitter=lambda low, high: high,
        )
    assert call.calls == 1


def test_a_typo_names_what_is_known() -> None:
    from lmcache.config import build

    with pytest.raises(ConfigError, match="atempts; known: attempts, base_s, cap_s"):
        build(RetryConfig, {"atempts": 2}, "retry")
