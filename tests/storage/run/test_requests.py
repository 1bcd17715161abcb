"""The threads and limits that backends of many requests share."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from lmcache.errors import StorageError
from lmcache.storage.run.requests import ByteBudget, Crew
from lmcache.testing.processes import wait_until


def test_bytes_in_flight_stay_below_the_limit_and_a_larger_one_goes_alone() -> None:
    budget, entered, threads = ByteBudget(100), [], []
    leave = {nbytes: threading.Event() for nbytes in (60, 40, 1, 150)}

    def hold(nbytes: int) -> None:
        with budget.of(nbytes):
            entered.append(nbytes)
            assert leave[nbytes].wait(20)

    def ask(nbytes: int) -> None:
        threads.append(threading.Thread(target=hold, args=(nbytes,)))
        threads[-1].start()

    def waiting() -> int:
        return len(budget._changed._waiters)  # type: ignore[attr-defined]

    for nbytes in (60, 40):
        ask(nbytes)
    wait_until(lambda: sorted(entered) == [40, 60])
    for count, nbytes in enumerate((1, 150), 1):
        ask(nbytes)
        wait_until(lambda n=count: waiting() == n)
    leave[40].set()
    wait_until(lambda: 1 in entered)
    leave[60].set()
    wait_until(lambda: not threads[0].is_alive())
    assert 150 not in entered
    leave[1].set()
    wait_until(lambda: 150 in entered)
    ask(1)
    wait_until(lambda: waiting() == 1)
    leave[150].set()
    for thread in threads:
        thread.join(20)
    assert entered[2:] == [1, 150, 1]


def test_after_an_error_nothing_is_begun_and_nothing_is_running(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, begun, running = Crew(2, "test"), [], [0]
    futures: list[Future[Any]] = []
    submit = crew._executor.submit

    def recording(*arguments: Any) -> Future[Any]:
        futures.append(submit(*arguments))
        return futures[-1]

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise StorageError("no")
        running[0] += 1
        wait_until(lambda: len(futures) == 100 and futures[-1].cancelled())
        running[0] -= 1

    monkeypatch.setattr(crew._executor, "submit", recording)
    with pytest.raises(StorageError, match="no"):
        crew.map(work, range(100))
    assert running[0] == 0
    assert len(begun) <= 3
    crew.close()
