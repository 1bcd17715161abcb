"""The manager under interleavings: what is under way when a tier is cleared, closed, late or left alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache import metrics
from lmcache.config import Config, LMCacheConfig, load_config
from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import fill, make_key

NBYTES = 64 << 10
WAIT_S = 10.0


class HeldBackend(StorageBackend):
    """A dict whose calls can be held at a gate, or made to fail."""

    name: ClassVar[str] = "held"
    Config = Config

    def __init__(self, config: Config | None = None) -> None:
        self.chunks: dict[ChunkKey, bytes] = {}
        self.fail: set[str] = set()
        self.gates: dict[str, threading.Event] = {}
        self.entered: dict[str, threading.Event] = {
            name: threading.Event() for name in ("sizes", "get", "put", "clear")
        }
        self.calls: list[str] = []
        self.closed = False

    def hold(self, *names: str) -> None:
        for name in names:
            self.gates[name] = threading.Event()

    def let_go(self) -> None:
        for gate in list(self.gates.values()):
            gate.set()

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        self.entered[name].set()
        if gate := self.gates.get(name):
            assert gate.wait(30)
        if name in self.fail:
            raise StorageError("broken on purpose")

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._enter("sizes")
        return [len(self.chunks[key]) for key in itertools.takewhile(self.chunks.__contains__, keys)]

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        found = [self.chunks.get(key) for key in keys]
        views = [buffer.view for buffer in into]
        self._enter("get")
        for count, (data, view) in enumerate(zip(found, views, strict=True)):
            if data is None or len(data) != view.nbytes:
                return count
            view[:] = data
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._enter("put")
        for key, buffer in zip(keys, buffers, strict=True):
            self.chunks[key] = bytes(buffer.view)
        return len(keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return sum(self.chunks.pop(key, None) is not None for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._enter("clear")
        gone = [key for key in self.chunks if fingerprint in (None, key.fingerprint)]
        return self.remove(gone)

    def close(self) -> None:
        self.closed = True


Open = Callable[..., StorageManager]


def config(**options: object) -> LMCacheConfig:
    defaults: dict[str, object] = {"memory.capacity": 32 * NBYTES, "close_timeout_s": 5.0, "memory.huge_pages": False}
    return load_config(overrides={**defaults, **{name.replace("__", "."): value for name, value in options.items()}})


@pytest.fixture
def open_manager() -> Iterator[Open]:
    """Managers that are closed at the end, after which nothing may be held."""
    opened: list[tuple[StorageManager, Sequence[StorageBackend]]] = []

    def do(*tiers: StorageBackend, **options: object) -> StorageManager:
        manager = StorageManager(config(**options), tiers=tiers)
        opened.append((manager, tiers))
        return manager

    yield do
    for manager, tiers in opened:
        for tier in tiers:
            if isinstance(tier, HeldBackend):
                tier.let_go()
        manager.close()
        settle(lambda m=manager: m.pool.used_bytes == 0, "something is still held after close")  # type: ignore[misc]


def settle(condition: Callable[[], bool], what: str) -> None:
    """Wait for a thread of the manager to get somewhere."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.005)


def store(manager: StorageManager, *numbers: int, format: int = 0) -> None:
    for n in numbers:
        buffer = manager.allocate(NBYTES)
        assert buffer is not None
        fill(buffer, n)
        manager.put(make_key(n, format=format), buffer)


def acquire(manager: StorageManager, *numbers: int, format: int = 0, **options: object) -> Lease:
    keys = [make_key(n, format=format) for n in numbers]
    return manager.acquire(keys, [NBYTES] * len(keys), **options)  # type: ignore[arg-type]


def contents(n: int) -> bytes:
    import random

    return random.Random(n).randbytes(NBYTES)


def check(lease: Lease, *numbers: int) -> None:
    assert [bytes(buffer.view) for buffer in lease.buffers] == [contents(n) for n in numbers]
    assert lease.ready == len(numbers)


def on_disk(path: Path) -> DiskBackend:
    return DiskBackend(DiskConfig(path=path, capacity=1 << 28))


def test_the_prefix_may_lie_in_turns_in_memory_and_in_two_tiers(open_manager: Open) -> None:
    near, far = HeldBackend(), HeldBackend()
    manager = open_manager(near, far)
    store(manager, 0, 4)
    manager.flush(WAIT_S)
    near.chunks = {make_key(n): contents(n) for n in (1, 3, 7)}
    far.chunks = {make_key(n): contents(n) for n in (2, 5, 8)}
    keys = [make_key(n) for n in range(9)]
    assert manager.contains(keys) == 6
    with acquire(manager, *range(9)) as lease:
        assert lease.wait(WAIT_S)
        check(lease, *range(6))
    # Promoted: now all of it is in memory.
    with acquire(manager, *range(6)) as lease:
        assert lease.done
        check(lease, *range(6))


def test_two_leases_on_the_same_chunks_below_both_get_them(open_manager: Open) -> None:
    tier = HeldBackend()
    tier.chunks = {make_key(n): contents(n) for n in range(4)}
    tier.hold("get")
    manager = open_manager(tier)
    leases = [acquire(manager, *range(4)) for _ in range(3)]
    assert tier.entered["get"].wait(WAIT_S)
    tier.let_go()
    for lease in leases:
        assert lease.wait(WAIT_S)
        check(lease, *range(4))
        lease.close()


def test_a_request_that_cannot_fit_beside_leases_evicts_nothing(open_manager: Open) -> None:
    manager = open_manager()
    store(manager, *range(32))
    with acquire(manager, *range(16)):
        assert manager.allocate(20 * NBYTES) is None
        assert manager.contains([make_key(n) for n in range(32)]) == 32
    assert manager.allocate(33 * NBYTES) is None


def test_closing_a_lease_early_leaks_nothing_and_reports_once(open_manager: Open) -> None:
    tier = HeldBackend()
    tier.chunks = {make_key(n): contents(n) for n in range(4)}
    tier.hold("get")
    manager = open_manager(tier)
    told: list[int] = []
    lease = acquire(manager, *range(4), on_done=lambda lease: told.append(lease.ready))
    assert tier.entered["get"].wait(WAIT_S)
    lease.close()
    lease.close()
    assert (lease.done, lease.ready, list(lease.buffers), told) == (True, 0, [], [0])
    tier.let_go()
    settle(lambda: manager.acquire([make_key(0)], [NBYTES]).wait(WAIT_S), "the reader is stuck")
    assert told == [0]


def test_a_failing_tier_is_left_alone_until_a_probe_succeeds(open_manager: Open) -> None:
    tier, other = HeldBackend(), HeldBackend()
    other.chunks = {make_key(n): contents(n) for n in range(20)}
    tier.fail = {"sizes", "get"}
    manager = open_manager(tier, other, breaker__cooldown_s=0.05)
    for n in range(3):
        with acquire(manager, n) as lease:
            assert lease.wait(WAIT_S)
            check(lease, n)
    assert metrics.TIER_BREAKER_OPEN.labels("held", "read")._value.get() == 1
    tier.fail = set()

    def recovered() -> bool:
        acquire(manager, 1000).wait(WAIT_S)
        return metrics.TIER_BREAKER_OPEN.labels("held", "read")._value.get() == 0

    settle(recovered, "the breaker never closes again")


def test_a_tier_that_is_always_late_is_left_alone(open_manager: Open) -> None:
    tier = HeldBackend()
    tier.chunks = {make_key(n): contents(n) for n in range(9)}
    manager = open_manager(tier, breaker__cooldown_s=60, read_timeout_s=0.3)
    for n in range(3):
        tier.hold("get")
        tier.entered["get"].clear()
        with acquire(manager, n) as lease:
            assert tier.entered["get"].wait(WAIT_S)
            assert lease.wait(WAIT_S)
            assert lease.ready == 0
        tier.let_go()
        settle(lambda n=n: manager.contains([make_key(n)]) == 1, "the late read was lost")  # type: ignore[misc]
        settle(lambda: manager.pool.used_bytes == (n + 1) * NBYTES, "the late read was lost")  # noqa: B023
    tier.calls.clear()
    with acquire(manager, 8) as lease:
        assert lease.wait(WAIT_S)
        assert lease.ready == 0
    assert not tier.calls


def test_one_tier_that_hangs_does_not_hold_up_another(open_manager: Open) -> None:
    tier, other = HeldBackend(), HeldBackend()
    other.chunks = {make_key(n): contents(n) for n in range(4)}
    tier.hold("sizes", "put")
    manager = open_manager(tier, other, read_timeout_s=0.05, breaker__failures=1, breaker__cooldown_s=60)
    with acquire(manager, 0) as lease:
        assert lease.wait(WAIT_S)
    with acquire(manager, 0, 1, timeout_s=WAIT_S) as lease:
        assert lease.wait(WAIT_S)
        check(lease, 0, 1)
    assert manager.contains([make_key(2)]) == 1


def test_a_write_under_way_does_not_bring_a_cleared_chunk_back(open_manager: Open) -> None:
    tier = HeldBackend()
    tier.hold("put")
    manager = open_manager(tier)
    store(manager, 0)
    assert tier.entered["put"].wait(WAIT_S)
    store(manager, 1)
    clearing = threading.Thread(target=manager.clear)
    clearing.start()
    settle(lambda: manager.stats()["pending_write_bytes"] <= NBYTES, "queued writes are not dropped")
    tier.let_go()
    clearing.join(WAIT_S)
    manager.flush(WAIT_S)
    assert manager.contains([make_key(0)]) == 0
    assert manager.contains([make_key(1)]) == 0


def test_a_read_that_starts_while_a_tier_is_cleared_does_not_bring_its_chunks_back(open_manager: Open) -> None:
    tier = HeldBackend()
    tier.chunks = {make_key(0): contents(0)}
    tier.hold("clear")
    manager = open_manager(tier)
    clearing = threading.Thread(target=manager.clear)
    clearing.start()
    assert tier.entered["clear"].wait(WAIT_S)
    acquire(manager, 0).wait(WAIT_S)
    tier.let_go()
    clearing.join(WAIT_S)
    assert not tier.chunks
    assert manager.contains([make_key(0)]) == 0


def test_a_tier_that_is_left_alone_is_cleared_too(open_manager: Open) -> None:
    tier = HeldBackend()
    manager = open_manager(tier, breaker__failures=1, breaker__cooldown_s=0.2)
    store(manager, 0)
    manager.flush(WAIT_S)
    tier.fail = {"get", "sizes"}
    acquire(manager, 5).wait(WAIT_S)
    tier.fail = set()
    manager.clear()
    # The cooldown is over once the tier is asked again; what was cleared may not be found then.
    tier.calls.clear()
    settle(lambda: bool(manager.contains([make_key(0)])) or "sizes" in tier.calls, "the tier is never probed")
    assert manager.contains([make_key(0)]) == 0
    assert not tier.chunks


def test_threads_that_store_read_clear_and_evict_at_once_agree(open_manager: Open, tmp_path: Path) -> None:
    manager = open_manager(on_disk(tmp_path))
    wrong: list[str] = []
    expected = {n: contents(n) for n in range(48)}

    def work(seed: int) -> None:
        import random

        dice = random.Random(seed)
        for turn in range(40):
            start = dice.randrange(40)
            numbers = range(start, start + 8)
            for n in numbers:
                if not manager.contains([make_key(n)]) and (buffer := manager.allocate(NBYTES)):
                    buffer.view[:] = expected[n]
                    manager.put(make_key(n), buffer)
            with acquire(manager, *numbers) as lease:
                lease.wait(dice.choice([0, WAIT_S]))
                for n, buffer in zip(numbers, lease.buffers, strict=False):
                    if bytes(buffer.view) != expected[n]:
                        wrong.append(f"chunk {n}")
            if seed == 0 and turn % 10 == 9:
                manager.clear()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_read_that_ends_after_close_leaks_nothing(open_manager: Open) -> None:
    tier = HeldBackend()
    tier.chunks = {make_key(0): contents(0)}
    tier.hold("get")
    manager = open_manager(tier, close_timeout_s=0.1)
    acquire(manager, 0)
    assert tier.entered["get"].wait(WAIT_S)
    manager.close()
    assert manager.pool.used_bytes == NBYTES, "the reader writes into it"
    tier.let_go()
    settle(lambda: manager.pool.used_bytes == 0, "what was read after close is kept")


def test_what_is_put_after_close_is_let_go(open_manager: Open) -> None:
    manager = open_manager(HeldBackend())
    buffer = manager.allocate(NBYTES)
    assert buffer is not None
    manager.close()
    manager.put(make_key(0), buffer)
    assert manager.pool.used_bytes == 0
