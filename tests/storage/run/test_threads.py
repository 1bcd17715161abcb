"""Deadlines, the threads of a tier, and its breaker."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from lmcache.config import BreakerConfig
from lmcache.errors import ClosedError, StorageError
from lmcache.storage.run.breaker import CircuitBreaker
from lmcache.storage.run.budget import ByteBudget
from lmcache.storage.run.deadlines import Deadlines
from lmcache.storage.run.threads import Threads

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
    workers = Threads("test", 1, spare=1, deadlines=deadlines, on_back=back.set)
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
    workers = Threads("test", 1, spare=1, deadlines=deadlines)
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


def test_a_result_that_came_too_late_goes_to_whoever_takes_what_is_unwanted() -> None:
    deadlines, gate, taken = Deadlines(), threading.Event(), []
    threads, done = Threads("test", 1, spare=1, deadlines=deadlines), threading.Event()
    late = threads.submit(lambda: gate.wait(WAIT_S), 60, lambda: None, lambda it: (taken.append(it), done.set()))
    assert late is not None
    assert not threads.wait(late, 0.01)
    assert threads.lost == 1
    job = threads.submit(lambda: 7, 60, lambda: None)
    assert job is not None
    assert threads.wait(job, WAIT_S)
    assert job.result == 7
    gate.set()
    assert done.wait(WAIT_S)
    assert taken == [True]
    threads.close()
    deadlines.close()


def test_never_more_calls_hang_than_there_are_threads_and_the_others_fail_in_time() -> None:
    threads, gate = Threads("test", 2), threading.Event()
    for _ in range(2):
        with pytest.raises(StorageError, match=r"look: no answer within 0.01 s"):
            threads.call(lambda: gate.wait(WAIT_S), 0.01, "look")
    with pytest.raises(StorageError, match=r"look: all 2 threads were busy for 0.01 s"):
        threads.call(lambda: None, 0.01, "look")
    assert not threads.close(0.0), "both still run"
    gate.set()
    assert threads.close(WAIT_S)
    with pytest.raises(ClosedError, match="this tier is closed"):
        threads.call(lambda: None, 1, "look")


def test_bytes_in_flight_are_bounded_but_one_job_may_have_more() -> None:
    threads, budget, running, most, lock = Threads("test", 4), ByteBudget(10), 0, 0, threading.Lock()
    two = threading.Barrier(2)

    def job() -> bool:
        nonlocal running, most
        with budget.of(4):
            with lock:
                running += 4
                most = max(most, running)
            two.wait(10)  # passes only when two run at once
            with lock:
                running -= 4
            return True

    def large() -> bool:
        with budget.of(100):
            return True

    assert threads.run([job] * 8) == [True] * 8
    assert most == 8
    assert threads.run([large] * 3) == [True] * 3
    assert threads.close(1.0)


def test_jobs_behind_a_miss_are_left_out_and_other_errors_are_raised() -> None:
    threads = Threads("test", 1)
    calls = [lambda: True, lambda: False, lambda: True]
    assert threads.run(calls, ends=lambda outcome: outcome is not True) == [True, False, None]

    def full() -> bool:
        raise OSError("full")

    first, second = threads.run([full, lambda: True])
    assert isinstance(first, OSError)
    assert second is True

    def bug() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        threads.run([bug, lambda: True])
    threads.close(1.0)


def test_after_an_error_nothing_is_begun_and_nothing_is_running() -> None:
    threads, begun, running = Threads("test", 2), [], [0]
    failed = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            failed.set()
            raise StorageError("no")
        running[0] += 1
        assert failed.wait(WAIT_S)
        threading.Event().wait(0.02)
        running[0] -= 1

    with pytest.raises(StorageError, match="no"):
        threads.map(work, range(100))
    assert running[0] == 0
    assert len(begun) <= 3
    assert threads.close(None)


def test_close_drops_what_has_not_begun_and_tells_whoever_waits_for_it() -> None:
    threads, gate, begun, errors = Threads("test", 1), threading.Event(), threading.Event(), []

    def hold() -> None:
        begun.set()
        gate.wait(WAIT_S)

    def batch() -> None:
        try:
            threads.run([hold, lambda: None])
        except ClosedError as error:
            errors.append(error)

    asking = threading.Thread(target=batch)
    asking.start()
    assert begun.wait(WAIT_S)
    assert not threads.close(0.01)
    assert asking.is_alive(), "what runs may use its memory"
    gate.set()
    asking.join(WAIT_S)
    assert len(errors) == 1


def test_threads_of_one_that_is_forgotten_unclosed_end() -> None:
    threads = Threads("forgotten", 2)
    threads.run([lambda: None] * 4)
    mine = [thread for thread in threading.enumerate() if thread.name == "lmcache-forgotten"]
    assert len(mine) == 2
    del threads
    gc.collect()
    for thread in mine:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in mine)


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
