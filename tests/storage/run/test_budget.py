"""The limit on bytes in flight."""

from __future__ import annotations

import threading

from lmcache.storage.run.budget import ByteBudget
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


def test_a_large_one_is_not_overtaken_by_small_ones() -> None:
    budget, order, threads = ByteBudget(10), [], []

    def take(nbytes: int) -> None:
        with budget.of(nbytes):
            order.append(nbytes)

    with budget.of(8):
        for count, nbytes in enumerate((9, 1, 1), 1):
            threads.append(threading.Thread(target=take, args=(nbytes,)))
            threads[-1].start()
            wait_until(lambda n=count: len(budget._waiting) == n)
        assert not order, "though the small ones would fit"
    for thread in threads:
        thread.join(20)
    assert order == [9, 1, 1]
