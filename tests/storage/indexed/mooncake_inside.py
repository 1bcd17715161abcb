"""What test_mooncake.py runs inside a network namespace that has loopback only."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from managers import Open, open_manager, settle
from tier_faults import CHUNK, check_manager_goes_on, freeze, work_until_closed

from lmcache import metrics
from lmcache.errors import ClosedError, StorageError
from lmcache.storage.backends.mooncake import MooncakeBackend
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendMachine, BackendTests, fill, make_key, take
from lmcache.testing.mooncake import MooncakeMaster, MooncakeOwner

if not os.environ.get("LMCACHE_TEST_NAMESPACE"):
    pytest.skip("run by test_mooncake.py", allow_module_level=True)

__all__ = ["open_manager"]
PORT = 15051
put, get = BackendTests.put, BackendTests.get


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeMaster]:
    with MooncakeMaster(PORT, tmp_path_factory.mktemp("master")) as master:
        yield master


@pytest.fixture(scope="module")
def memory(master: MooncakeMaster) -> Iterator[MooncakeBackend]:
    """One that gives memory to the store."""
    owner = open_store(segment=128 << 20)
    yield owner
    owner.close()


@pytest.fixture
def store(memory: MooncakeBackend) -> MooncakeBackend:
    """That one, empty."""
    memory.clear()
    return memory


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


def open_store(port: int = PORT, **options: Any) -> MooncakeBackend:
    backend = build_backend({"type": "remote", "url": f"mooncake://127.0.0.1:{port}", **options}, "test")
    assert isinstance(backend, MooncakeBackend)
    return backend


class TestMooncake(BackendTests):
    selects_tenants = True

    @pytest.fixture
    def open_backend(self, store: MooncakeBackend) -> Callable[[], StorageBackend]:
        return open_store


def test_batches_and_lookups_of_many_keys(store: MooncakeBackend, pool: PinnedPool) -> None:
    backend = open_store()
    keys = [make_key(n) for n in range(150)]
    buffers = [take(pool, CHUNK) for _ in keys]
    data = [fill(buffer, seed) for seed, buffer in enumerate(buffers)]
    assert backend.put(keys, buffers) == len(keys)
    for buffer in buffers:
        buffer.view[:] = bytes(CHUNK)
    assert backend.contains([*keys, *(make_key(n) for n in range(1000, 10_000))]) == len(keys)
    assert backend.get(keys, buffers) == len(keys)
    assert [bytes(buffer.view) for buffer in buffers] == data
    assert len(backend._registrations) == 2, "the pool and the headers are registered once"
    for buffer in buffers:
        buffer.release()
    assert backend.clear() == len(keys)
    backend.close()


def test_another_pool_at_the_same_address_is_registered_anew(store: MooncakeBackend) -> None:
    backend = open_store()
    for n in range(5):
        pool = PinnedPool((n + 1) << 20)
        data = put(backend, pool, make_key(n), CHUNK, seed=n)
        assert get(backend, pool, make_key(n), CHUNK) == data
        pool.close()
    backend.close()


@pytest.mark.parametrize("value", [b"x" * (4096 + CHUNK), b"short", bytes(4096 + CHUNK)])
def test_a_value_that_is_no_chunk_is_a_miss(store: MooncakeBackend, pool: PinnedPool, value: bytes) -> None:
    backend = store
    name = backend._name(make_key(1))
    assert backend._store().put(name, value) == 0
    before = metrics.CORRUPT_CHUNKS.labels("mooncake")._value.get()
    assert get(backend, pool, make_key(1), CHUNK) is None
    if len(value) > 4096:
        assert metrics.CORRUPT_CHUNKS.labels("mooncake")._value.get() == before + 1
        assert put(backend, pool, make_key(1), CHUNK, seed=1) == get(backend, pool, make_key(1), CHUNK)


def test_a_full_store_evicts_or_does_not_hold(store: MooncakeBackend, pool: PinnedPool) -> None:
    backend = open_store()
    buffer = take(pool, 8 << 20)
    held = 0
    for n in range(24):
        fill_first = n.to_bytes(8, "little")
        buffer.view[:8] = fill_first
        held += backend.put([make_key(n)], [buffer])
    assert 10 <= held <= 24
    found = 0
    for n in range(24):
        if backend.get([make_key(n)], [buffer]):
            found += 1
            assert bytes(buffer.view[:8]) == n.to_bytes(8, "little")
    assert 1 <= found <= 15
    buffer.release()
    backend.close()


def test_no_master_is_an_error_in_time_and_it_is_found_later(tmp_path: Path, pool: PinnedPool) -> None:
    began = time.monotonic()
    backend = open_store(PORT + 10, segment=64 << 20)
    with pytest.raises(StorageError, match="cannot reach the Mooncake master"):
        backend.contains([make_key(1)])
    buffer = take(pool, CHUNK)
    with pytest.raises(StorageError, match="cannot reach"):
        backend.put([make_key(1)], [buffer])
    buffer.release()
    assert time.monotonic() - began < 3
    with MooncakeMaster(PORT + 10, tmp_path):
        data = put(backend, pool, make_key(1), CHUNK, seed=1)
        assert get(backend, pool, make_key(1), CHUNK) == data
        backend.close()
    with pytest.raises(ClosedError, match="closed"):
        get(backend, pool, make_key(1), CHUNK)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[MooncakeMaster]:
    with MooncakeMaster(PORT + 20, tmp_path) as master:
        yield master


def test_a_master_that_hangs_dies_and_comes_back(victim: MooncakeMaster, pool: PinnedPool) -> None:
    master = victim
    backend = open_store(PORT + 20, segment=64 << 20, timeout_s=1.0)
    put(backend, pool, make_key(1), CHUNK, seed=1)
    buffer = take(pool, CHUNK)
    calls: list[Callable[[], object]] = [
        lambda: backend.sizes([make_key(1)]),
        lambda: backend.get([make_key(1)], [buffer]),
        lambda: backend.put([make_key(2)], [buffer]),
        lambda: backend.remove([make_key(1)]),
    ]
    freeze(master.process)
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StorageError):
            call()
        assert time.monotonic() - began < 8, "its deadline of a second, on a machine that may be busy"
    master.process.send_signal(signal.SIGCONT)
    master.kill()
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StorageError):
            call()
        assert time.monotonic() - began < 8, "its deadline of a second, on a machine that may be busy"
    buffer.release()
    master.start()
    settle(lambda: puts(backend, pool, 5), "it never works again")
    assert get(backend, pool, make_key(5), CHUNK) is not None
    assert get(backend, pool, make_key(1), CHUNK) is None  # a master forgets when it dies
    settle(lambda: not pool.used_bytes, "calls that ran over time never give back what they held")
    backend.close()


def puts(backend: MooncakeBackend, pool: PinnedPool, number: int) -> bool:
    buffer = take(pool, CHUNK)
    fill(buffer, number)
    try:
        return backend.put([make_key(number)], [buffer]) == 1
    except StorageError:
        return False
    finally:
        buffer.release()


def test_random_work_with_restarts(store: MooncakeBackend) -> None:
    class Values(BackendMachine(lambda folder: open_store())):
        lossless = True  # the memory is another client's
        restarts = 0

        def reopen(self) -> None:
            self.restarts += 1
            if self.restarts % 4 == 1:  # as closing takes the client a second
                super().reopen()

    run_state_machine_as_test(Values, settings=settings(max_examples=2, stateful_step_count=25, deadline=None))


def test_a_lease_that_ends_before_the_bytes_are_read_is_a_miss_and_the_value_stays(
    tmp_path: Path, pool: PinnedPool
) -> None:
    with MooncakeMaster(PORT + 30, tmp_path, "-default_kv_lease_ttl=1"):
        owner, backend = MooncakeOwner(PORT + 30), open_store(PORT + 30)
        put(backend, pool, make_key(1), 15 << 20, seed=1)
        before = metrics.CORRUPT_CHUNKS.labels("mooncake")._value.get()
        assert get(backend, pool, make_key(1), 15 << 20) is None
        assert backend.contains([make_key(1)]) == 1
        assert metrics.CORRUPT_CHUNKS.labels("mooncake")._value.get() == before
        backend.close()
        owner.kill()


def test_a_process_killed_with_the_memory_it_gave_costs_its_values_only(tmp_path: Path, open_manager: Open) -> None:
    with MooncakeMaster(PORT + 40, tmp_path, "-client_ttl=1"):
        owners = [MooncakeOwner(PORT + 40)]
        check_manager_goes_on(
            open_manager,
            open_store(PORT + 40, timeout_s=1.0),
            owners[0].kill,
            lambda: owners.append(MooncakeOwner(PORT + 40)),
            forgets=True,
        )
        owners[1].kill()


def test_a_master_killed_during_transfers_is_an_error_in_time_for_all(tmp_path: Path, pool: PinnedPool) -> None:
    with MooncakeMaster(PORT + 50, tmp_path) as master:
        backend = open_store(PORT + 50, segment=64 << 20, timeout_s=1.0)
        done: list[int] = []
        took: list[float] = []

        def work(number: int) -> None:
            held = True
            while held:
                began = time.monotonic()
                held = puts(backend, pool, number)
                with contextlib.suppress(StorageError):
                    assert get(backend, pool, make_key(number), CHUNK) in (None, random.Random(number).randbytes(CHUNK))
                    backend.remove([make_key(number)])
                done.append(number)
                took.append(time.monotonic() - began)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        settle(lambda: len(done) > 30, "nothing is written")
        master.kill()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert max(took) < 5
        settle(lambda: not pool.used_bytes, "calls that ran over time never give back what they held")
        master.start()  # as the client waits long for it when it is closed
        backend.close()


def test_closing_during_transfers_ends_them_and_refuses_new_ones(store: MooncakeBackend, pool: PinnedPool) -> None:
    backend = open_store()
    ends = work_until_closed(backend, pool, lambda: store.contains([make_key(n) for n in range(30)]) == 30)
    assert ends == [ClosedError] * 3
    settle(lambda: not pool.used_bytes, "a buffer leaked")
