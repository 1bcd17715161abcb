"""The fault matrix of real remotes behind a network, through the StorageManager.

A fault is a miss in time and never a wrong byte; the breaker opens, and closes afterwards; all buffers come back.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("obstore", reason="obstore is not installed")

from object_places import QUICK, azure, pool, prefix_of, seaweed
from redis_places import needs_valkey, valkey

from lmcache.config import LMCacheConfig
from lmcache.errors import StorageError
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.manager import StorageManager
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, fill, make_key, take
from lmcache.testing.processes import wait_until
from lmcache.testing.proxy import FaultyProxy

__all__ = ["azure", "pool", "seaweed", "valkey"]
SIZE = 300_000
DEADLINE_S = 0.8
CONFIG = LMCacheConfig.model_validate(
    {
        "memory": {"capacity": "8MiB", "huge_pages": False},
        "breaker": {"failures": 1, "cooldown_s": 0.05},
        "read_timeout_s": DEADLINE_S,
        "close_timeout_s": 0.2,
    }
)


class Place:
    """A server behind a proxy, and the options of a remote that knows only the proxy."""

    def __init__(self, port: int, options: Callable[[int], dict[str, Any]]) -> None:
        self._port = port
        self.proxy = FaultyProxy(port)
        self.options = options(self.proxy.port)

    def refuse(self) -> None:
        self.proxy.close()

    def mend(self) -> None:
        """Anew on the same port, so that what hung does not arrive later."""
        self.proxy.close()
        self.proxy = FaultyProxy(self._port, listen=self.proxy.port)


@pytest.fixture(params=[pytest.param("redis", marks=needs_valkey), "s3", "az"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    prefix = prefix_of(request)
    quick = {**QUICK, "timeout_s": 0.5, "retries": 0}
    if request.param == "redis":
        limits = {"connect_timeout_s": 0.3, "timeout_s": 0.5, "prefix": f"{prefix}:"}
        place = Place(
            request.getfixturevalue("valkey").port,
            lambda port: {"type": "remote", "url": f"redis://127.0.0.1:{port}", **limits},
        )
    elif request.param == "s3":
        server = request.getfixturevalue("seaweed")
        place = Place(server.port, lambda port: server.options(prefix, endpoint=f"http://127.0.0.1:{port}", **quick))
    else:
        server = request.getfixturevalue("azure")
        endpoint = f"http://127.0.0.1:%d/{server.account}"
        place = Place(server.port, lambda port: server.options(prefix, endpoint=endpoint % port, **quick))
    yield place
    place.proxy.close()


def change(**fields: object) -> Callable[[Place], None]:
    return lambda place: place.proxy.__dict__.update(fields)


LENGTH = str(HEADER_BYTES + SIZE).encode()  # as Redis and HTTP announce it
ERRORS: dict[str, Callable[[Place], None]] = {
    "refused": Place.refuse,
    "hang": change(hang=True),
    "slow": change(slow_s=0.3),
    "reset at once": change(reset_after=0),
}
DAMAGE: dict[str, Callable[[Place], None]] = {
    "reset midway": change(reset_after=100_000),
    "wrong bytes": change(flip_after=150_000),
    "shorter": change(replace={LENGTH: b"%d" % (int(LENGTH) - 1)}),
    "longer": change(replace={LENGTH: b"%d" % (int(LENGTH) + 1)}),
}


@contextlib.contextmanager
def managed(place: Place) -> Iterator[StorageManager]:
    """A manager with empty memory; in the end no buffer is held."""
    manager = StorageManager(CONFIG, tiers=[build_backend(place.options, "test")])
    try:
        yield manager
    finally:
        manager.close()
    wait_until(lambda: manager.pool.used_bytes == 0)


def store(place: Place, *numbers: int) -> dict[int, bytes]:
    data = {}
    with managed(place) as manager:
        for number in numbers:
            buffer = manager.allocate(SIZE)
            assert buffer is not None
            data[number] = fill(buffer, number)
            manager.put(make_key(number), buffer)
        assert manager.flush(10)
    return data


def load(manager: StorageManager, number: int) -> bytes | None:
    begun = time.monotonic()
    with manager.acquire([make_key(number)], [SIZE]) as lease:
        assert lease.wait(10)
        assert time.monotonic() - begun < DEADLINE_S + 1
        return bytes(lease.buffers[0].view) if lease.ready else None


@pytest.mark.parametrize("fault", ERRORS)
def test_a_fault_opens_the_breaker_and_its_end_closes_it(place: Place, fault: str) -> None:
    data = store(place, 1, 2)
    with managed(place) as manager:
        ERRORS[fault](place)
        assert load(manager, 1) is None
        wait_until(lambda: manager.stats()["open_breakers"] == 1)
        place.mend()
        wait_until(lambda: load(manager, 2) == data[2])
        assert manager.stats()["open_breakers"] == 0
        assert load(manager, 1) == data[1]
        assert manager.stats()["leases"] == 0


@pytest.mark.parametrize("fault", DAMAGE)
def test_an_answer_that_the_network_damages_is_a_miss_or_right_and_the_tier_goes_on(place: Place, fault: str) -> None:
    data = store(place, 1, 2)
    with managed(place) as manager:
        DAMAGE[fault](place)
        assert load(manager, 1) in ((None,) if fault == "wrong bytes" else (None, data[1]))
        place.mend()
        wait_until(lambda: load(manager, 2) == data[2])
        assert load(manager, 1) in (None, data[1])  # what came damaged may have been removed


def test_an_upload_that_is_cut_midway_leaves_a_whole_chunk_or_none(place: Place, pool: PinnedPool) -> None:
    with contextlib.closing(build_backend(place.options, "test")) as backend:
        place.proxy.cut_after = 100_000
        buffer = take(pool, SIZE)
        data = fill(buffer, 1)
        with pytest.raises(StorageError):
            backend.put([make_key(1)], [buffer])
        place.mend()
        assert backend.sizes([make_key(1)]) in ([], [SIZE])
        assert BackendTests.get(backend, pool, make_key(1), SIZE) in (None, data)
        assert backend.put([make_key(1)], [buffer]) == 1
        assert BackendTests.get(backend, pool, make_key(1), SIZE) == data
        buffer.release()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_shutdown_during_a_hung_transfer_is_bounded(place: Place, operation: str) -> None:
    store(place, 1)
    with managed(place) as manager:
        seen = place.proxy.requests
        place.proxy.hang = True
        if operation == "read":
            manager.acquire([make_key(1)], [SIZE])
        else:
            buffer = manager.allocate(SIZE)
            assert buffer is not None
            manager.put(make_key(2), buffer)
        wait_until(lambda: place.proxy.requests > seen)
        begun = time.monotonic()
        manager.close()
        assert time.monotonic() - begun < 3


def test_two_managers_write_one_key_and_read_one_whole_chunk(place: Place) -> None:
    with managed(place) as one, managed(place) as two:
        written: list[bytes] = []

        def write(manager: StorageManager, seed: int) -> None:
            for _ in range(5):
                buffer = manager.allocate(SIZE)
                assert buffer is not None
                written.append(fill(buffer, seed))
                manager.put(make_key(1), buffer)
                assert manager.flush(10)
                manager.remove([make_key(1)], tier="memory")

        threads = [threading.Thread(target=write, args=pair) for pair in ((one, 1), (two, 2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(written) == 10
        assert load(one, 1) in written
        assert load(one, 1) == load(two, 1)
