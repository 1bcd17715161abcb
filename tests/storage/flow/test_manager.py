"""The manager: waterfall, promotion, leases, deadlines, breaker, back-pressure, clearing, closing."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache import metrics
from lmcache.config import Config, LMCacheConfig, load_config
from lmcache.errors import ConfigError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.eviction.base import LRU
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import fill, make_key

SIZE = 64 << 10
WAIT = 20.0


class Scripted(StorageBackend):
    """A dict that can be told to hang or to fail: the faults of a tier, on cue."""

    name: ClassVar[str] = "scripted"
    Config = Config

    def __init__(self, config: Any = None) -> None:
        self.data: dict[ChunkKey, bytes] = {}
        self.error: OSError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0
        self.reached = threading.Event()

    def _enter(self) -> None:
        self.calls += 1
        self.reached.set()
        assert self.gate.wait(WAIT)
        if self.error is not None:
            raise self.error

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._enter()
        return [len(self.data[key]) for key in itertools.takewhile(self.data.__contains__, keys)]

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        self._enter()
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            if len(self.data.get(key, b"")) != buffer.nbytes:
                return count
            buffer.view[:] = self.data[key]
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._enter()
        self.data.update({key: bytes(buffer.view) for key, buffer in zip(keys, buffers, strict=True)})
        return len(keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return sum(self.data.pop(key, None) is not None for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self.remove([key for key in self.data if fingerprint in (None, key.fingerprint)])

    def close(self) -> None:
        self.closed = True


Open = Callable[..., StorageManager]


@pytest.fixture
def open_manager() -> Iterator[Open]:
    opened: list[tuple[StorageManager, list[StorageBackend]]] = []

    def do(*tiers: StorageBackend, chunks: int = 16, **options: Any) -> StorageManager:
        values = {"memory": {"capacity": chunks * SIZE, "huge_pages": False}, "close_timeout_s": 1, **options}
        manager = StorageManager(load_config(overrides=values), tiers=list(tiers))
        opened.append((manager, list(tiers)))
        return manager

    yield do
    for manager, tiers in opened:
        for tier in tiers:
            if isinstance(tier, Scripted):
                tier.gate.set()
        manager.close()
        assert manager.pool.used_bytes == 0, "a buffer leaked"


def put(manager: StorageManager, number: int, **where: int) -> bytes:
    buffer = manager.allocate(SIZE)
    assert buffer is not None
    data = fill(buffer, number)
    manager.put(make_key(number, **where), buffer)
    return data


def keys(count: int, first: int = 0) -> list[ChunkKey]:
    return [make_key(n) for n in range(first, first + count)]


def acquire(manager: StorageManager, count: int, first: int = 0, **options: Any) -> Lease:
    lease = manager.acquire(keys(count, first), [SIZE] * count, **options)
    assert lease.wait(WAIT)
    return lease


def test_what_is_put_is_leased_from_memory_without_a_thread(open_manager: Open) -> None:
    manager = open_manager()
    data = [put(manager, n) for n in range(4)]
    calls: list[Lease] = []
    with manager.acquire(keys(6), [SIZE] * 6, on_done=calls.append) as lease:
        assert lease.done
        assert calls == [lease]
        assert [bytes(b.view) for b in lease.buffers] == data
    assert manager.contains(keys(6)) == 4
    assert lease.ready == 0


def test_a_run_over_memory_and_two_tiers_is_read_and_promoted(open_manager: Open) -> None:
    upper, lower = Scripted(), Scripted()
    manager = open_manager(upper, lower)
    put(manager, 0)
    put(manager, 3)
    assert manager.flush(WAIT)
    for tier in (upper, lower):
        tier.data.clear()
    upper.data[make_key(1)] = b"1" * SIZE
    lower.data[make_key(2)] = b"2" * SIZE
    lower.data[make_key(4)] = b"4" * SIZE
    assert manager.contains(keys(9)) == 5
    with acquire(manager, 9) as lease:
        assert lease.ready == 5
        assert bytes(lease.buffers[2].view[:1]) == b"2"
    calls = upper.calls + lower.calls
    with acquire(manager, 5) as again:
        assert again.ready == 5
    assert upper.calls + lower.calls == calls, "promoted chunks are served by memory"


def test_leased_chunks_outlive_eviction_and_clear(open_manager: Open) -> None:
    manager = open_manager(chunks=4)
    data = [put(manager, n) for n in range(3)]
    with acquire(manager, 3) as lease:
        put(manager, 10)
        for n in range(11, 15):
            buffer = manager.allocate(SIZE)
            if buffer is not None:
                manager.put(make_key(n), buffer)
        manager.clear()
        assert [bytes(b.view) for b in lease.buffers] == data
    assert manager.contains(keys(3)) == 0


def test_allocation_evicts_the_oldest_but_a_prefix_keeps_its_head(open_manager: Open) -> None:
    manager = open_manager(chunks=4)
    for n in range(4):
        put(manager, n)
    acquire(manager, 4).close()
    put(manager, 10)
    assert manager.contains(keys(4)) == 3, "the tail of the prefix goes first"


def test_a_full_memory_of_leased_chunks_allocates_nothing_and_recovers(open_manager: Open) -> None:
    manager = open_manager(chunks=2)
    put(manager, 0)
    put(manager, 1)
    lease = acquire(manager, 2)
    assert manager.allocate(SIZE) is None
    assert manager.allocate(100 * SIZE) is None
    lease.close()
    buffer = manager.allocate(SIZE)
    assert buffer is not None
    buffer.release()


def test_an_expired_lease_gives_way_when_memory_is_needed(open_manager: Open) -> None:
    manager = open_manager(chunks=2, lease_timeout_s=0.001)
    put(manager, 0)
    put(manager, 1)
    lease = acquire(manager, 2)
    deadline = time.monotonic() + WAIT
    while not lease.expired:
        assert time.monotonic() < deadline
    buffer = manager.allocate(SIZE)
    assert buffer is not None
    buffer.release()
    assert lease.closed
    assert lease.buffers == []


def test_a_hanging_tier_costs_one_deadline_and_nothing_leaks(open_manager: Open) -> None:
    tier = Scripted()
    tier.data = {key: b"x" * SIZE for key in keys(4)}
    manager = open_manager(tier, breaker={"failures": 1, "cooldown_s": 600})
    tier.gate.clear()
    start = time.monotonic()
    lease = manager.acquire(keys(4), [SIZE] * 4, timeout_s=0.2)
    assert lease.wait(WAIT)
    assert 0.1 < time.monotonic() - start < 5
    assert lease.ready == 0
    assert manager.stats()["open_breakers"] == 1
    start = time.monotonic()
    assert acquire(manager, 4).ready == 0
    assert time.monotonic() - start < 0.1, "an open breaker costs nothing"
    tier.gate.set()


def test_closing_a_lease_while_it_reads_leaks_nothing(open_manager: Open) -> None:
    tier = Scripted()
    tier.data = {key: b"x" * SIZE for key in keys(4)}
    manager = open_manager(tier)
    tier.gate.clear()
    done: list[Lease] = []
    lease = manager.acquire(keys(4), [SIZE] * 4, on_done=done.append)
    assert tier.reached.wait(WAIT)
    lease.close()
    assert done == [lease]
    tier.gate.set()
    assert acquire(manager, 4).ready == 4
    assert done == [lease]


def test_a_failing_tier_is_a_miss_then_left_alone_then_probed(open_manager: Open) -> None:
    tier = Scripted()
    tier.error = OSError("broken")
    manager = open_manager(tier, breaker={"failures": 2, "cooldown_s": 0.05})
    errors = metrics.TIER_ERRORS.labels("scripted", "read")._value.get()
    for _ in range(4):
        assert acquire(manager, 1).ready == 0
    assert metrics.TIER_ERRORS.labels("scripted", "read")._value.get() >= errors + 2
    assert manager.stats()["open_breakers"] == 1
    tier.error = None
    tier.data = {make_key(0): b"x" * SIZE}
    deadline = time.monotonic() + WAIT
    while acquire(manager, 1).ready == 0:
        assert time.monotonic() < deadline
    assert manager.stats()["open_breakers"] == 0


def test_the_write_queue_is_bounded_in_bytes_and_sheds(open_manager: Open) -> None:
    tier = Scripted()
    tier.gate.clear()
    manager = open_manager(tier, write_queue=3 * SIZE)
    shed = metrics.TIER_SHED_BYTES.labels("scripted")._value.get()
    for n in range(6):
        put(manager, n)
    assert manager.stats()["pending_write_bytes"] <= 3 * SIZE
    assert metrics.TIER_SHED_BYTES.labels("scripted")._value.get() == shed + 3 * SIZE
    assert not manager.flush(0.01)
    tier.gate.set()
    assert manager.flush(WAIT)
    assert set(tier.data) == set(keys(3))
    assert manager.contains(keys(6)) == 6, "what was shed is still in memory"


def test_clear_by_format_reaches_queued_and_running_writes(open_manager: Open) -> None:
    tier = Scripted()
    tier.gate.clear()
    manager = open_manager(tier, read_timeout_s=0.2)
    put(manager, 0)
    assert tier.reached.wait(WAIT)
    put(manager, 1)
    other = put(manager, 2, format=9)
    manager.clear(make_key(0).fingerprint)
    tier.gate.set()
    assert manager.flush(WAIT)
    assert tier.data == {make_key(2, format=9): other}


def test_a_read_that_was_under_way_does_not_bring_cleared_chunks_back(open_manager: Open) -> None:
    tier = Scripted()
    tier.data = {make_key(0): b"x" * SIZE}
    manager = open_manager(tier, read_timeout_s=5)
    tier.gate.clear()
    lease = manager.acquire(keys(1), [SIZE])
    assert tier.reached.wait(WAIT)
    done = threading.Thread(target=manager.clear)
    done.start()
    deadline = time.monotonic() + WAIT
    while manager._memory.generation == 0:
        assert time.monotonic() < deadline
    tier.gate.set()
    done.join()
    assert lease.wait(WAIT)
    lease.close()
    tier.data.clear()
    assert manager.contains(keys(1)) == 0


def test_disk_serves_after_a_restart(open_manager: Open, tmp_path: Path) -> None:
    def disk() -> DiskBackend:
        return DiskBackend(DiskConfig(path=tmp_path, capacity=1 << 30))

    manager = open_manager(disk())
    data = [put(manager, n) for n in range(8)]
    manager.close()
    with acquire(open_manager(disk()), 10) as lease:
        assert [bytes(b.view) for b in lease.buffers] == data


def test_more_on_disk_than_memory_holds_is_leased_as_far_as_it_fits(open_manager: Open) -> None:
    tier = Scripted()
    tier.data = {key: b"x" * SIZE for key in keys(10)}
    with acquire(open_manager(tier, chunks=4), 10) as lease:
        assert 1 <= lease.ready <= 4


def test_close_is_bounded_when_a_tier_hangs(open_manager: Open) -> None:
    tier = Scripted()
    tier.gate.clear()
    manager = open_manager(tier, close_timeout_s=0.1)
    buffer = manager.allocate(SIZE)
    assert buffer is not None
    manager.put(make_key(0), buffer)
    assert tier.reached.wait(WAIT)
    start = time.monotonic()
    manager.close()
    assert time.monotonic() - start < 5
    tier.gate.set()
    deadline = time.monotonic() + WAIT
    while manager.pool.used_bytes:
        assert time.monotonic() < deadline, "the hung write never gave its buffer back"


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ({"type": "dsk"}, "unknown storage backend 'dsk'; known: .*disk"),
        ({"path": "/x"}, r"tiers\[0\]: needs a type"),
        (
            {"type": "disk", "path": "/tmp/x", "capactiy": "1GiB"},
            r"tiers\[0\] \(disk\): unknown key capactiy; known: path",
        ),
        ({"type": "disk"}, r"tiers\[0\] \(disk\): path: Field required"),
        ({"type": "disk", "path": "/tmp/x", "eviction": "lur"}, "unknown eviction policy 'lur'; known: .*lru"),
    ],
)
def test_typos_in_tiers_are_named(tier: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StorageManager(LMCacheConfig(tiers=(tier,)))


def test_many_threads_put_and_acquire(open_manager: Open, tmp_path: Path) -> None:
    manager = open_manager(DiskBackend(DiskConfig(path=tmp_path, capacity=1 << 30)), chunks=12)
    expected = {n: None for n in range(24)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(30):
            n = (seed * 7 + i) % 24
            buffer = manager.allocate(SIZE)
            if buffer is not None:
                fill(buffer, n)
                manager.put(make_key(n), buffer)
            with manager.acquire([make_key(n)], [SIZE]) as lease:
                lease.wait(WAIT)
                for held in lease.buffers:
                    probe = bytes(held.view[:64])
                    if expected[n] is None:
                        expected[n] = probe  # type: ignore[assignment]
                    elif expected[n] != probe:
                        wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert manager.flush(WAIT)


@given(st.lists(st.tuples(st.sampled_from("atr"), st.integers(0, 8)), max_size=60))
def test_lru_evicts_in_the_order_of_an_ordered_dict(work: list[tuple[str, int]]) -> None:
    policy, model = LRU(), OrderedDict[int, None]()
    for action, n in work:
        if action == "a":
            policy.add(make_key(n), 1)
            model[n] = None
            model.move_to_end(n)
        elif action == "t":
            policy.touch(make_key(n))
            if n in model:
                model.move_to_end(n)
        else:
            policy.remove(make_key(n))
            model.pop(n, None)
        assert list(policy.victims()) == [make_key(n) for n in model]


def test_a_warm_lease_on_512_chunks_costs_a_few_milliseconds_at_most(open_manager: Open) -> None:
    manager = open_manager(chunks=512)
    for n in range(512):
        put(manager, n)
    wanted, sizes, times = keys(512), [SIZE] * 512, []
    for _ in range(20):
        start = time.perf_counter()
        lease = manager.acquire(wanted, sizes)
        times.append(time.perf_counter() - start)
        assert lease.ready == 512
        lease.close()
    # Measured about 1 ms on an idle core; the bound only catches a change of order on a shared machine.
    assert min(times) < 0.01
    print(f"acquire of 512 chunks: {min(times) * 1e3:.2f} ms")
