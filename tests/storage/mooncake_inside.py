"""What test_mooncake.py runs inside a network namespace that has loopback only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache import metrics
from lmcache.errors import ClosedError, StorageError
from lmcache.storage.backends.mooncake import MooncakeBackend
from lmcache.storage.base import StorageBackend
from lmcache.storage.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, fill, make_key, take

if not os.environ.get("LMCACHE_TEST_NAMESPACE"):
    pytest.skip("run by test_mooncake.py", allow_module_level=True)

CHUNK = 20_000
PORT = 15051
put, get = BackendTests.put, BackendTests.get


class Master:
    """A mooncake_master, in this namespace, so at fixed ports."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port, self._folder = port, folder
        self.start()

    def start(self) -> None:
        program = Path(sys.executable).parent / "mooncake_master"
        flags = f"-rpc_port={self._port} -rpc_address=127.0.0.1 -metrics_host=127.0.0.1 -metrics_port={self._port + 1}"
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, *flags.split(), "-rpc_thread_num=2", "-default_kv_lease_ttl=5000"], stdout=log, stderr=log
            )
        import socket

        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Master:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with Master(PORT, tmp_path_factory.mktemp("master")) as master:
        yield master


@pytest.fixture(scope="module")
def memory(master: Master) -> Iterator[MooncakeBackend]:
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
    with Master(PORT + 10, tmp_path):
        data = put(backend, pool, make_key(1), CHUNK, seed=1)
        assert get(backend, pool, make_key(1), CHUNK) == data
        backend.close()
    with pytest.raises(ClosedError, match="closed"):
        get(backend, pool, make_key(1), CHUNK)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Master]:
    with Master(PORT + 20, tmp_path) as master:
        yield master


def test_a_master_that_hangs_dies_and_comes_back(victim: Master, pool: PinnedPool) -> None:
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
    master.process.send_signal(signal.SIGSTOP)
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StorageError):
            call()
        assert time.monotonic() - began < 2
    master.process.send_signal(signal.SIGCONT)
    master.kill()
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StorageError):
            call()
        assert time.monotonic() - began < 2
    buffer.release()
    master.start()
    deadline = time.monotonic() + 40
    while True:
        try:
            buffer = take(pool, CHUNK)
            data = fill(buffer, 5)
            if backend.put([make_key(5)], [buffer]):
                break
        except StorageError:
            pass
        finally:
            buffer.release()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert get(backend, pool, make_key(5), CHUNK) == data
    assert get(backend, pool, make_key(1), CHUNK) is None  # a master forgets when it dies
    deadline = time.monotonic() + 20
    while pool.used_bytes:  # calls that ran over time give back what they held
        assert time.monotonic() < deadline
        time.sleep(0.1)
    backend.close()
