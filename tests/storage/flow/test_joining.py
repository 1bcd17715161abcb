"""Leases that want the same chunks share their reads; a lease is done in time whatever the tiers do."""

from __future__ import annotations

import threading

import pytest
from managers import NBYTES, Open, acquire, contents, in_memory, keys, open_manager, plant, settle
from scripted import WAIT_S, Gate, ScriptedBackend

from lmcache import metrics
from lmcache.keys import ChunkKey
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import make_key

__all__ = ["open_manager"]


def ask(manager: StorageManager, *numbers: int, **options: object) -> Lease:
    return manager.acquire(keys(*numbers), [NBYTES] * len(numbers), **options)  # type: ignore[arg-type]


def check(lease: Lease, *numbers: int) -> None:
    assert [bytes(buffer.view) for buffer in lease.buffers] == [contents(number) for number in numbers]
    lease.close()


@pytest.mark.parametrize("promote", ["always", "never"])
def test_many_leases_on_one_prefix_read_it_once(open_manager: Open, promote: str) -> None:
    tier = ScriptedBackend()
    plant(tier, 0, 1, 2)
    manager = open_manager(tier, promote=promote)
    gate = tier.before["get"] = Gate()
    leases = [ask(manager, 0, 1, 2, 100 + n) for n in range(8)]
    tier.await_call("get")
    leases += [ask(manager, 0, 1, 2, 200 + n) for n in range(8)]
    gate.open()
    for lease in leases:
        assert lease.wait(WAIT_S)
        check(lease, 0, 1, 2)
    assert tier.calls.count("get") == 1
    # Each asks for the chunk of its own behind the prefix, the first together with the prefix.
    assert tier.calls.count("sizes") == 16


def test_a_lease_needs_not_wait_for_what_only_another_wants(open_manager: Open) -> None:
    tier = ScriptedBackend()
    plant(tier, 0, 1, 2, 3)
    manager = open_manager(tier, read_batch=2 * NBYTES, read_threads=1)
    gate, second = Gate(), Gate()
    tier.before["get"] = lambda: (gate if tier.calls.count("get") == 1 else second)()
    long = ask(manager, 0, 1, 2, 3)
    tier.await_call("get")
    short = ask(manager, 0, 1)
    gate.open()
    assert short.wait(WAIT_S)
    assert not long.done
    check(short, 0, 1)
    second.open()
    assert long.wait(WAIT_S)
    check(long, 0, 1, 2, 3)


def test_who_joins_goes_on_when_the_first_has_gone(open_manager: Open) -> None:
    tier = ScriptedBackend()
    plant(tier, 0, 1)
    manager = open_manager(tier)
    gate = tier.before["sizes"] = Gate()
    first, second = ask(manager, 0, 1), ask(manager, 0, 1)
    tier.await_call("sizes")
    first.close()
    gate.open()
    assert second.wait(WAIT_S)
    check(second, 0, 1)
    assert tier.calls.count("get") == 1


def test_what_nobody_wants_any_more_is_not_read_but_what_is_under_way_ends_in_memory(
    open_manager: Open,
) -> None:
    tier = ScriptedBackend()
    plant(tier, *range(8))
    manager = open_manager(tier, read_batch=NBYTES, read_threads=1)
    gate = tier.before["get"] = Gate()
    lease = ask(manager, *range(8))
    tier.await_call("get")
    lease.settle()
    assert lease.done
    assert lease.ready == 0
    gate.open()
    settle(lambda: in_memory(manager, 0) == [0], "what was read is lost")
    settle(lambda: not manager._joining._flights, "it goes on reading")
    assert tier.calls.count("get") == 1
    with acquire(manager, *range(8)) as again:
        assert again.ready == 8


def test_deadlines_hold_while_every_thread_of_the_tier_is_busy(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_threads=2, read_timeout_s=0.2, breaker__failures=100)
    tier.before["sizes"] = Gate()
    done = threading.Semaphore(0)
    leases = [ask(manager, number, on_done=lambda lease: done.release()) for number in range(40)]
    for _ in leases:
        assert done.acquire(timeout=WAIT_S)
    assert tier.calls.count("sizes") <= 4, "and no more threads than the tier may have are used"


def test_a_lease_with_less_time_than_the_read_that_it_joined_is_done_with_what_it_has(
    open_manager: Open,
) -> None:
    tier = ScriptedBackend()
    plant(tier, 0, 1)
    manager = open_manager(tier, read_batch=NBYTES, read_threads=1)
    second = Gate()
    tier.before["get"] = lambda: second() if tier.calls.count("get") == 2 else None
    patient = ask(manager, 0, 1)
    tier.await_call("get")
    tier.await_call("get")
    hasty = ask(manager, 0, 1, timeout_s=0.05)
    assert hasty.wait(WAIT_S)
    check(hasty, 0)
    assert not patient.done
    assert manager.health().tiers[0].failures == 0, "nobody asked the tier to be so fast"
    second.open()
    assert patient.wait(WAIT_S)
    check(patient, 0, 1)


def test_reads_that_wait_are_bounded_and_more_are_counted_misses(open_manager: Open) -> None:
    tier = ScriptedBackend()
    plant(tier, *range(9))
    manager = open_manager(tier, lookup_queue=2)
    gate = tier.before["sizes"] = Gate()
    refused = metrics.LOOKUPS_REFUSED._value.get()
    one, two, three = ask(manager, 0), ask(manager, 1), ask(manager, 2)
    joined = ask(manager, 1)
    assert three.done
    assert three.ready == 0
    assert metrics.LOOKUPS_REFUSED._value.get() == refused + 1
    gate.open()
    for lease, number in ((one, 0), (two, 1), (joined, 1)):
        assert lease.wait(WAIT_S)
        check(lease, number)
    settle(lambda: not manager._joining._flights, "the queue is not emptied")
    with acquire(manager, 2) as again:
        assert again.ready == 1


@pytest.mark.parametrize(("planted", "found"), [((21, 22), 21), ((22,), 22), ((), None)])
def test_a_run_ends_with_the_first_that_can_be_had(
    open_manager: Open,
    planted: tuple[int, ...],
    found: int | None,
) -> None:
    tier = ScriptedBackend()
    plant(tier, 0, 1, *planted)
    manager = open_manager(tier)
    asked: list[int] = []

    def ends(count: int) -> list[tuple[ChunkKey, int]]:
        asked.append(count)
        return [(key, NBYTES) for key in keys(20, 21, 22)]

    lease = ask(manager, 0, 1, 2, ends=ends)
    assert lease.wait(WAIT_S)
    assert asked == [2]
    assert lease.end == (None if found is None else make_key(found))
    check(lease, 0, 1, *([] if found is None else [found]))


def test_the_longest_end_is_taken_from_below_before_a_shorter_one_from_memory(open_manager: Open) -> None:
    tier = ScriptedBackend()
    plant(tier, 21, 22)
    manager = open_manager(tier)
    with acquire(manager, 22):
        pass
    tier.calls.clear()
    lease = ask(manager, ends=lambda count: [(key, NBYTES) for key in keys(20, 21, 22, 23)])
    assert lease.wait(WAIT_S)
    assert lease.end == make_key(21)
    check(lease, 21)
    assert tier.calls == ["sizes", "sizes", "get"]
    lease = ask(manager, ends=lambda count: [(make_key(22), NBYTES), (make_key(23), NBYTES)])
    assert lease.done, "what is in memory is not asked for"
    check(lease, 22)


def test_a_tier_is_asked_once_where_a_run_ends(open_manager: Open) -> None:
    near, far = ScriptedBackend(), ScriptedBackend()
    plant(near, 0, 1)
    plant(far, 2)
    manager = open_manager(near, far)
    with acquire(manager, 0, 1, 2, 3) as lease:
        assert lease.ready == 3
    assert near.calls == ["sizes", "get", "sizes"], "the end of its run, and what the other one does not have"
    assert far.calls == ["sizes", "get"]


def test_a_removal_ends_the_reads_under_way_and_nobody_joins_them(open_manager: Open) -> None:
    tier = ScriptedBackend()
    plant(tier, 0)
    manager = open_manager(tier)
    gate = tier.before["get"] = Gate()
    before = ask(manager, 0)
    tier.await_call("get")
    manager.clear(wait=False)
    assert before.done
    assert before.ready == 0
    after = ask(manager, 0)
    gate.open()
    assert after.wait(WAIT_S)
    assert after.ready == 0
    assert in_memory(manager, 0) == []


def test_leases_that_come_and_go_at_once_hold_the_right_bytes(open_manager: Open) -> None:
    tier = ScriptedBackend()
    plant(tier, *range(12))
    manager = open_manager(tier, chunks=16, promote="second_hit", read_batch=2 * NBYTES)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(60):
            first = (seed * 7 + turn * 3) % 6
            numbers = list(range(first, first + 6))
            lease = ask(manager, *numbers)
            if (seed + turn) % 3 == 0:
                lease.settle()
            lease.wait(WAIT_S)
            held = lease.share()
            wrong.extend(n for n, b in zip(numbers, held, strict=False) if bytes(b.view) != contents(n))
            for buffer in held:
                buffer.release()
            lease.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    settle(lambda: not manager._joining._flights and not manager._joining._by_key, "a flight was left behind")
