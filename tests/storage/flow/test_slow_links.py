"""Links that are slow for the deadline: what has come is kept, and no batch is larger than what comes in time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("obstore", reason="obstore is not installed")

from managers import settle
from object_places import prefix_of, seaweed
from redis_places import needs_valkey, valkey

from lmcache.config import LMCacheConfig, build
from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.server.config import ServerConfig
from lmcache.server.server import Server
from lmcache.storage.backends.objects.backend import ObjectStoreBackend
from lmcache.storage.manager import StorageManager
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.run.pace import FIRST_BYTES, LEAST_BYTES, Pace
from lmcache.storage.testing import fill, make_key, take
from lmcache.testing.proxy import FaultyProxy

__all__ = ["seaweed", "valkey"]
CHUNK = 64 << 10
pytestmark = pytest.mark.serial


class Link:
    """A server behind a proxy, and the options of a remote that knows only the proxy; its calls end after a second."""

    def __init__(self, port: int, options: Callable[[int], dict[str, Any]]) -> None:
        self.proxy = FaultyProxy(port)
        self.options = options(self.proxy.port)

    @contextlib.contextmanager
    def manager(self, deadline_s: float, timeout_s: float = 1.0) -> Iterator[StorageManager]:
        values = {"memory": {"capacity": "32MiB", "huge_pages": False}, "read_timeout_s": deadline_s}
        config = LMCacheConfig.model_validate({**values, "close_timeout_s": 0.2, "breaker": {"failures": 100}})
        options = {**self.options, "timeout_s": timeout_s}
        manager = StorageManager(config, tiers=[build_backend(options, "test")])
        try:
            yield manager
        finally:
            manager.close()
        settle(lambda: manager.pool.used_bytes == 0, "a buffer leaked")


@pytest.fixture(params=[pytest.param("redis", marks=needs_valkey), "s3", "lm"])
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    prefix = prefix_of(request)
    with contextlib.ExitStack() as stack:
        if request.param == "redis":
            limits = {"connect_timeout_s": 1.0, "timeout_s": 1.0, "prefix": f"{prefix}:"}
            port = request.getfixturevalue("valkey").port
            link = Link(port, lambda port: {"type": "remote", "url": f"redis://127.0.0.1:{port}", **limits})
        elif request.param == "s3":
            server = request.getfixturevalue("seaweed")
            quick = {"connect_timeout_s": 1.0, "timeout_s": 1.0, "retries": 0, "index_ttl_s": 0}
            link = Link(server.port, lambda port: server.options(prefix, endpoint=f"http://127.0.0.1:{port}", **quick))
        else:
            storage = {"memory": {"capacity": "32MiB", "huge_pages": False}}
            chunks = Server(build(ServerConfig, {"port": 0, "drain_timeout_s": 0.2, "storage": storage}, "test"))
            stack.callback(chunks.stop)
            chunks.start()
            quick = {"timeout_s": 1.0}
            link = Link(chunks.port, lambda port: {"type": "remote", "url": f"lm://127.0.0.1:{port}", **quick})
        stack.callback(link.proxy.close)
        yield link


def store(manager: StorageManager, count: int) -> list[bytes]:
    data = []
    for number in range(count):
        buffer = manager.allocate(CHUNK)
        assert buffer is not None
        data.append(fill(buffer, number))
        manager.put(make_key(number), buffer)
    assert manager.flush(30)
    return data


def test_what_comes_before_the_deadline_is_kept(link: Link) -> None:
    count = 100
    with link.manager(10.0) as manager:
        data = store(manager, count)
    with link.manager(4.0, timeout_s=20.0) as manager:
        before = link.proxy.passed_bytes[True]
        link.proxy.rate = 1e6
        with manager.acquire([make_key(n) for n in range(count)], [CHUNK] * count) as lease:
            assert lease.wait(20)
            crossed = link.proxy.passed_bytes[True] - before
            # On a busy machine less crosses than could, and the first batches, of an unknown pace, are a part of that.
            assert lease.ready * CHUNK >= crossed / 2 - 2 * FIRST_BYTES, "what crossed the link was thrown away"
            assert lease.ready < count
            assert [bytes(buffer.view) for buffer in lease.buffers] == data[: lease.ready]
        link.proxy.rate = None


def test_a_read_that_runs_out_of_time_returns_the_chunks_that_came(link: Link) -> None:
    count = 40
    with link.manager(10.0) as manager:
        data = store(manager, count)
    pool = PinnedPool(16 << 20, huge_pages=False)
    with contextlib.closing(build_backend(link.options, "test")) as backend:
        buffers = [take(pool, CHUNK) for _ in range(count)]
        keys = [make_key(n) for n in range(count)]
        link.proxy.rate = 1.5e6
        if isinstance(backend, ObjectStoreBackend):
            read = backend._read  # each object has a deadline of its own, so let one of them fail

            def fail_at_5(key: ChunkKey, view: memoryview) -> bool:
                if key == keys[5]:
                    raise StorageError("no answer")
                return read(key, view)

            backend._read = fail_at_5  # type: ignore[method-assign]
        got = backend.get(keys, buffers)
        assert 0 < got < count
        assert [bytes(buffer.view) for buffer in buffers[:got]] == data[:got]
        link.proxy.rate = None
        for buffer in buffers:
            buffer.release()
    settle(lambda: pool.used_bytes == 0, "a buffer leaked")
    pool.close()


def test_writes_are_made_as_small_as_the_link_needs(link: Link) -> None:
    count = 40
    with link.manager(2.0) as manager:
        link.proxy.rate = 1e6
        store(manager, count)
        link.proxy.rate = None
    with contextlib.closing(build_backend(link.options, "test")) as backend:
        assert backend.sizes([make_key(n) for n in range(count)]) == [CHUNK] * count


def test_batches_grow_and_shrink_with_the_pace() -> None:
    pace = Pace()
    assert pace.batch_bytes(1.0, 16 << 20) == FIRST_BYTES
    pace.moved(1 << 20, 0.001)
    assert pace.batch_bytes(1.0, 16 << 20) == 16 << 20
    for _ in range(20):
        pace.moved(1 << 20, 1.0)
    assert pace.batch_bytes(2.0, 16 << 20) == pytest.approx(2 << 20, rel=0.01)
    pace.failed(2 << 20, 2.0)
    assert pace.batch_bytes(2.0, 16 << 20) == pytest.approx(1 << 20, rel=0.01)
    pace.failed(100, 10.0)
    assert pace.batch_bytes(2.0, 16 << 20) == LEAST_BYTES
    new = Pace()
    new.failed(1 << 20, 0.001)
    assert new.batch_bytes(1.0, 16 << 20) == FIRST_BYTES, "a refused connection says nothing of the link"
