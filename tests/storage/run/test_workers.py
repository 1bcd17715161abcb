"""Deadlines, the threads of a tier, and its breaker."""

from __future__ import annotations

import threading
import time

import pytest

from lmcache.config import BreakerConfig
from lmcache.storage.run.breaker import CircuitBreaker
from lmcache.storage.run.deadlines import Deadlines
from lmcache.storage.run.workers import Workers

WAIT_S = 20.0


def settle(condition: object, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)


def test_what_is_due_is_called_in_order_and_what_was_cancelled_is_not() -> None:
    deadlines, called, done = Deadlines(), [], threading.Event()
    now = time.monotonic()
    deadlines.at(now + 0.03, lambda: (called.append("third"), done.set()))
    deadlines.at(now + 0.01, lambda: called.append("first"))
    deadlines.at(now + 0.015, lambda: called.append("never")).cancel()
    deadlines.at(now + 0.02, lambda: called.append("second"))
    assert done.wait(WAIT_S)
    assert called == ["first", "second", "third"]
    deadlines.close()
    deadlines.at(time.monotonic(), lambda: called.append("after close"))
    assert len(called) == 3


def test_a_call_that_fails_does_not_stop_the_next(caplog: pytest.LogCaptureFixture) -> None:
    deadlines, done = Deadlines(), threading.Event()
    deadlines.at(time.monotonic(), lambda: 1 / 0)
    deadlines.at(time.monotonic() + 0.01, done.set)
    assert done.wait(WAIT_S)
    assert "what was due failed" in caplog.text
    deadlines.close()


def test_cancelled_deadlines_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for _ in range(5000):
        deadlines.at(time.monotonic() + 600, lambda: None).cancel()
    assert len(deadlines._due) <= 512
    deadlines.close()


def test_hung_threads_are_replaced_within_the_bound_and_come_back() -> None:
    deadlines, late, gate = Deadlines(), [], threading.Event()
    back = threading.Event()
    workers = Workers("test", 1, 1, deadlines, back.set)
    hang = lambda: gate.wait(WAIT_S)  # noqa: E731
    ran = threading.Event()
    for number in range(2):
        assert workers.submit(hang, 0.01, lambda number=number: late.append(number))
    settle(lambda: workers.lost == 2, "hung calls are not told")
    assert late == [0, 1]
    assert not workers.working
    assert workers.submit(ran.set, 1, lambda: None) is None, "one thread and one spare are gone"
    gate.set()
    assert back.wait(WAIT_S)
    settle(lambda: workers.lost == 0, "they have come back")
    assert workers._working == 1, "the spare one has ended"
    assert workers.submit(ran.set, 1, lambda: None)
    assert ran.wait(WAIT_S)
    workers.close()
    assert workers.submit(ran.set, 1, lambda: None) is None
    deadlines.close()


def test_a_withdrawn_job_never_starts_and_a_failing_one_takes_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    deadlines, gate, ran = Deadlines(), threading.Event(), []
    workers = Workers("test", 1, 1, deadlines)
    workers.submit(lambda: gate.wait(WAIT_S) and 1 / 0, 60, lambda: None)
    waiting = workers.submit(lambda: ran.append("withdrawn"), 60, lambda: None)
    assert waiting is not None
    workers.withdraw(waiting)
    done = threading.Event()
    workers.submit(done.set, 60, lambda: None)
    gate.set()
    assert done.wait(WAIT_S)
    assert not ran
    assert "a storage job failed" in caplog.text
    workers.close()
    deadlines.close()


def test_the_breaker_lets_one_probe_fly_at_a_time() -> None:
    breaker = CircuitBreaker(BreakerConfig(failures=2, cooldown_s=0.01))
    breaker.failed()
    assert breaker.state == "closed"
    breaker.failed()
    assert (breaker.state, breaker.ready, breaker.allows()) == ("open", False, False)
    settle(lambda: breaker.ready, "the cooldown never ends")
    assert breaker.state == "half_open"
    allowed: list[bool] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        allowed.append(breaker.allows())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 7 + [True]
    threading.Event().wait(0.02)
    assert not breaker.allows(), "also when the probe takes longer than a cooldown"
    breaker.failed()
    assert breaker.state == "open"
    settle(breaker.allows, "the cooldown never ends")
    breaker.undecided()
    assert breaker.allows(), "a probe that says nothing gives way to another"
    breaker.succeeded()
    assert (breaker.state, breaker.failures) == ("closed", 0)
