"""The fault matrix, over a scripted tier: a miss or less within the deadline, nothing held, the other tiers go on."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

import pytest
from managers import (
    NBYTES,
    Open,
    acquire,
    contents,
    in_memory,
    keys,
    open_gates,
    open_manager,
    plant,
    read,
    settle,
    store,
)
from scripted import WAIT_S, Gate, ScriptedBackend, raising

from lmcache import metrics
from lmcache.errors import StorageError
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import make_key

__all__ = ["open_manager"]
DEADLINE_S = 0.8
OPTIONS = {
    "read_timeout_s": DEADLINE_S,
    "breaker__failures": 2,
    "breaker__cooldown_s": 0.02,
    "retry__backoff_s": 0.001,
}


class Slow:
    """A fault that takes ``seconds``, or until ``stop``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.stop = threading.Event()

    def __call__(self) -> None:
        self.stop.wait(self.seconds)


Fault = Callable[[ScriptedBackend], None]


def refused(tier: ScriptedBackend) -> None:
    for operation in ("sizes", "get", "put"):
        tier.before[operation] = raising(ConnectionRefusedError(errno.ECONNREFUSED, "refused"))


def not_ours(tier: ScriptedBackend) -> None:
    tier.before["sizes"] = tier.before["get"] = tier.before["put"] = raising(ZeroDivisionError("a plugin's bug"))


def midway(tier: ScriptedBackend) -> None:
    tier.before["get"] = raising(ConnectionResetError(errno.ECONNRESET, "reset"))


def hang_in_index(tier: ScriptedBackend) -> None:
    tier.before["sizes"] = Gate()


def hang_in_read(tier: ScriptedBackend) -> None:
    tier.before["get"] = Gate()


def too_slow(tier: ScriptedBackend) -> None:
    tier.before["get"] = Slow(10 * DEADLINE_S)


def wrong_bytes(tier: ScriptedBackend) -> None:
    for key, (header, data) in list(tier.chunks.items()):
        tier.chunks[key] = header, b"?" + data[1:]


def wrong_length(tier: ScriptedBackend) -> None:
    for key, (header, data) in list(tier.chunks.items()):
        tier.chunks[key] = header, data[:-1]


def wrong_key(tier: ScriptedBackend) -> None:
    tier.chunks = {key: tier.chunks[make_key(7)] for key in keys(*range(4))}


FAULTS: list[Fault] = [
    refused,
    not_ours,
    midway,
    hang_in_index,
    hang_in_read,
    too_slow,
    wrong_bytes,
    wrong_length,
    wrong_key,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_miss_within_the_deadline_and_another_tier_serves(open_manager: Open, fault: Fault) -> None:
    tier, other = ScriptedBackend(), ScriptedBackend()
    plant(tier, *range(4), 7)
    manager = open_manager(tier, other, **OPTIONS)
    fault(tier)
    start = time.monotonic()
    assert read(manager, *range(4)) == 0
    assert time.monotonic() - start < DEADLINE_S + 1
    plant(other, *range(4))
    start = time.monotonic()
    assert read(manager, *range(4)) == 4, "the tier behind it serves"
    assert time.monotonic() - start < DEADLINE_S + 1
    for fault_of in tier.before.values():
        if isinstance(fault_of, Slow):
            fault_of.stop.set()
    open_gates(tier)
    settle(lambda: not any(b.shared for b in manager._memory._buffers.values()), "a hung call keeps its buffers")
    settle(lambda: manager.pool.used_bytes == len(manager._memory) * NBYTES, "a buffer leaked")


@pytest.mark.parametrize("fault", [refused, not_ours, midway, hang_in_index, hang_in_read, too_slow])
def test_the_breaker_opens_and_closes_when_the_fault_is_gone(open_manager: Open, fault: Fault) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, **{**OPTIONS, "read_timeout_s": 0.1})
    for number in range(20):
        plant(tier, number)
    fault(tier)
    numbers = iter(range(20))
    settle(
        lambda: read(manager, next(numbers)) == 0 and manager.stats()["open_breakers"] == 1,
        "the breaker never opens",
    )
    for fault_of in tier.before.values():
        if isinstance(fault_of, Slow):
            fault_of.stop.set()
    open_gates(tier)
    plant(tier, 50)
    settle(lambda: read(manager, 50) == 1, "the tier never serves again")
    assert manager.stats()["open_breakers"] == 0
    settle(lambda: manager.health().tiers[0].hung_threads == 0, "the hung threads never come back")


def test_hung_reads_do_not_disable_the_tier(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_timeout_s=0.2, breaker__failures=100, read_threads=2)
    plant(tier, *range(10))
    gate = tier.before["get"] = Gate()
    for number in range(2):
        assert read(manager, number) == 0
    settle(lambda: manager.health().tiers[0].hung_threads == 2, "both reading threads hang")
    tier.before.clear()
    assert read(manager, 5, timeout_s=WAIT_S) == 1, "others have taken their place"
    tier.before["get"] = gate
    for number in range(6, 8):
        assert read(manager, number) == 0
    settle(lambda: manager.health().tiers[0].hung_threads == 4, "the spare ones hang too")
    start = time.monotonic()
    assert read(manager, 9, timeout_s=WAIT_S) == 0
    assert time.monotonic() - start < 5, "no thread without bound, and nobody waits for one"
    gate.open()
    tier.before.clear()
    settle(lambda: manager.health().tiers[0].hung_threads == 0, "they never come back")
    assert read(manager, 9) == 1


def test_hung_writes_open_the_breaker_and_others_go_on(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_timeout_s=0.2, breaker__failures=2, breaker__cooldown_s=0.05)
    gate = tier.before["put"] = Gate()
    store(manager, 0)
    settle(lambda: manager.health().tiers[0].failures == 1, "a hung write is not told")
    tier.before.clear()
    store(manager, 1)
    settle(lambda: make_key(1) in tier.chunks, "another thread goes on with the queue")
    tier.before["put"] = gate
    for number in (2, 3):
        store(manager, number)
        settle(lambda n=number: manager.health().tiers[0].hung_threads == n, "not told")  # type: ignore[misc]
    settle(lambda: manager.stats()["open_breakers"] == 1, "hung writes do not open the breaker")
    assert not manager.flush(0)
    gate.open()
    tier.before.clear()
    assert manager.flush(WAIT_S)
    settle(lambda: not manager.health().tiers[0].hung_threads, "they never come back")
    settle(lambda: _writes(manager, tier, 9), "the tier never takes another write")


def _writes(manager: StorageManager, tier: ScriptedBackend, number: int) -> bool:
    store(manager, number)
    manager.flush(WAIT_S)
    manager.remove(keys(number), tier="memory")
    return make_key(number) in tier.chunks


def test_writes_go_on_after_all_their_threads_hung(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_timeout_s=0.1, breaker__failures=100)
    gate = tier.before["put"] = Gate()
    for number in range(3):
        store(manager, number)
        settle(lambda n=number: manager.health().tiers[0].hung_threads == n + 1, "not told")  # type: ignore[misc]
    store(manager, 3, 4)
    gate.open()
    assert manager.flush(WAIT_S), "what waited is written when a thread comes back"
    assert tier.holds() == set(keys(*range(5)))


def test_a_transient_failure_is_tried_again_and_a_final_one_is_not(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, retry__attempts=3, retry__backoff_s=0.001)
    plant(tier, 0)
    retries = metrics.TIER_RETRIES.labels(tier.name)
    before = retries._value.get()

    def twice() -> None:
        if tier.calls.count("get") < 3:
            raise ConnectionResetError("reset")

    tier.before["get"] = twice
    assert read(manager, 0) == 1
    assert retries._value.get() == before + 2
    assert manager.health().tiers[0].failures == 0
    tier.before["put"] = raising(StorageError(errno.ENOSPC, "full"))
    store(manager, 1)
    assert manager.flush(WAIT_S)
    assert tier.calls.count("put") == 1
    assert manager.health().tiers[0].last_error == "[Errno 28] full"
    wrapped = StorageError("cannot write a file: no space")
    wrapped.__cause__ = OSError(errno.ENOSPC, "no space")
    tier.before["put"] = raising(wrapped)
    store(manager, 2)
    assert manager.flush(WAIT_S)
    assert tier.calls.count("put") == 2, "nor is one that the system gave as the reason"


def test_no_attempt_is_made_that_would_end_after_the_deadline(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_timeout_s=DEADLINE_S, retry__attempts=10, retry__backoff_s=60.0)
    plant(tier, 0)
    tier.before["get"] = raising(ConnectionResetError("reset"))
    start = time.monotonic()
    assert read(manager, 0) == 0
    assert time.monotonic() - start < DEADLINE_S + 1
    assert tier.calls.count("get") == 1


def test_a_full_tier_sheds_what_it_cannot_take_and_keeps_the_rest(open_manager: Open) -> None:
    tier = ScriptedBackend()
    tier.capacity = 3 * NBYTES
    manager = open_manager(tier, breaker__failures=100)
    shed = metrics.TIER_SHED_BYTES.labels(tier.name)._value.get()
    for number in range(6):
        store(manager, number)
        assert manager.flush(WAIT_S)
    assert tier.holds() == set(keys(0, 1, 2))
    assert metrics.TIER_SHED_BYTES.labels(tier.name)._value.get() == shed + 3 * NBYTES
    assert read(manager, *range(6)) == 6


def test_two_writers_of_one_key_leave_one_whole_chunk(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager, other = open_manager(tier), open_manager(tier)
    start = threading.Barrier(2)

    def write(which: StorageManager) -> None:
        start.wait()
        for _ in range(20):
            store(which, 0)

    threads = [threading.Thread(target=write, args=(which,)) for which in (manager, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert manager.flush(WAIT_S)
    assert other.flush(WAIT_S)
    other.remove(keys(0), tier="memory")
    assert read(manager, 0) == read(other, 0) == 1
    settle(lambda: manager.pool.used_bytes == NBYTES, "the second writer's buffers are let go of")


@pytest.mark.parametrize("operation", ["sizes", "get", "put", "close"])
def test_shutdown_during_a_transfer_is_bounded_and_leaks_nothing(open_manager: Open, operation: str) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, close_timeout_s=0.1, **OPTIONS)
    plant(tier, *range(4))
    gate = tier.before[operation] = Gate()
    if operation == "put":
        store(manager, 9)
    elif operation != "close":
        manager.acquire(keys(*range(4)), [NBYTES] * 4)
        tier.await_call(operation)
    start = time.monotonic()
    manager.close()
    assert time.monotonic() - start < 5
    gate.open()
    settle(lambda: manager.pool.used_bytes == 0, "what hung at the end never gives its buffers back")


def test_a_tier_that_cannot_be_cleared_now_is_before_it_serves_again(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, **OPTIONS)
    store(manager, 0)
    assert manager.flush(WAIT_S)
    tier.before["clear"] = raising(StorageError("refused"))
    manager.clear()
    assert manager.health().tiers[0].owes_clear
    assert make_key(0) in tier.chunks
    assert read(manager, 0) == 0, "it is asked to clear first, and refuses"
    tier.before.clear()
    settle(lambda: read(manager, 0) == 0 and not manager.health().tiers[0].owes_clear, "never cleared")
    assert not tier.chunks


def test_a_late_write_does_not_bring_a_removed_chunk_back(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_timeout_s=0.2, breaker__failures=100)
    gate = tier.before["put"] = Gate()
    store(manager, 0)
    settle(lambda: manager.health().tiers[0].hung_threads == 1, "not told")
    manager.remove(keys(0))
    gate.open()
    assert manager.flush(WAIT_S)
    assert not tier.chunks
    assert in_memory(manager, 0) == []


def test_a_late_read_still_comes_in(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_timeout_s=0.2)
    plant(tier, 0)
    gate = tier.before["get"] = Gate()
    with acquire(manager, 0) as lease:
        assert lease.ready == 0
    gate.open()
    settle(lambda: in_memory(manager, 0) == [0], "the bytes were read for nothing")
    with acquire(manager, 0) as lease:
        assert bytes(lease.buffers[0].view) == contents(0)
