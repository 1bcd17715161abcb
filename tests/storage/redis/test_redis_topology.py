"""The Redis family where more than one server has a say: a master behind sentinels, a cluster; plain and over TLS."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from certificates import Certificates
from redis.crc import key_slot
from redis_places import REDIS, VALKEY, cleared, connect, count_round_trips, name_of, needs_valkey, pool, tls_options

from lmcache.errors import StorageError
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import BackendTests, OpenBackend, make_key, take
from lmcache.testing.processes import free_port, wait_until
from lmcache.testing.redis import RedisServer, TLSFiles, start_cluster, stop_all

__all__ = ["pool"]
pytestmark = needs_valkey
put, get = BackendTests.put, BackendTests.get


class Transport(NamedTuple):
    """How servers and clients talk."""

    binary: str
    tls: TLSFiles | None
    options: dict[str, Any]


@pytest.fixture(scope="module", params=["plain", "tls"])
def transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transport:
    """Valkey without TLS, and Redis with nothing but TLS, as the Valkey that is installed has none."""
    assert VALKEY is not None
    if request.param == "plain":
        return Transport(VALKEY, None, {})
    if REDIS is None:
        pytest.skip("needs a redis-server with TLS: apt-get install redis-tools")
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    return Transport(REDIS, certificates.server, {"tls": True, **tls_options(certificates.client)})


@pytest.fixture(scope="module")
def cluster(transport: Transport) -> Iterator[list[RedisServer]]:
    servers = start_cluster(transport.binary, tls=transport.tls)
    yield servers
    stop_all(servers)


class TestCluster(BackendTests):
    selects_tenants = True

    @pytest.fixture
    def open_backend(self, cluster: list[RedisServer], transport: Transport) -> OpenBackend:
        return cleared(f"redis+cluster://127.0.0.1:{cluster[1].port},127.0.0.1:{cluster[0].port}", **transport.options)


@pytest.fixture(scope="module")
def watched(transport: Transport) -> Iterator[tuple[RedisServer, RedisServer, RedisServer]]:
    """A master, its replica, and a sentinel that watches them."""
    binary, tls, _ = transport
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(RedisServer(binary, tls=tls))
        follow = ("--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0")
        replica = stack.enter_context(RedisServer(binary, *follow, tls=tls))
        wait_until(lambda: b"master_link_status:up" in replica.ask("INFO", "replication"))
        lines = f"sentinel monitor kv 127.0.0.1 {master.port} 1\n"
        lines += "sentinel down-after-milliseconds kv 500\nsentinel failover-timeout kv 3000\n"
        sentinel = stack.enter_context(RedisServer(binary, "--sentinel", tls=tls, config=lines))
        wait_until(lambda: b"slaves=1" in sentinel.ask("INFO", "sentinel"))
        yield master, replica, sentinel


class TestSentinel(BackendTests):
    selects_tenants = True

    @pytest.fixture
    def open_backend(self, watched: tuple[RedisServer, RedisServer, RedisServer], transport: Transport) -> OpenBackend:
        # The first sentinel is not there: the second is asked.
        return cleared(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{watched[2].port}/kv", **transport.options)


@pytest.mark.parametrize("transport", ["tls"], indirect=True)
@pytest.mark.parametrize("change", [{"tls_ca": "other"}, {"tls_ca": None}, {"tls": False}])
def test_a_server_that_is_not_trusted_or_wants_tls_is_an_error_that_says_so(
    cluster: list[RedisServer],
    watched: tuple[RedisServer, RedisServer, RedisServer],
    transport: Transport,
    tmp_path: Path,
    change: dict[str, Any],
) -> None:
    if "tls" in change:
        options, message = {}, "(?i)closed by server|reset by peer"
    else:
        other = str(Certificates(tmp_path).ca) if change["tls_ca"] else None
        options, message = {**transport.options, "tls_ca": other}, "certificate verify failed"
    options = {name: value for name, value in options.items() if value is not None}
    for url in (f"redis+cluster://127.0.0.1:{cluster[0].port}", f"redis+sentinel://127.0.0.1:{watched[2].port}/kv"):
        with contextlib.closing(connect(url, **options)) as backend, pytest.raises(StorageError) as caught:
            backend.contains([make_key(1)])
        assert re.search(message, str(caught.value))
        assert "object at" not in str(caught.value)


def test_a_master_that_no_sentinel_knows_is_an_error_that_says_so(
    watched: tuple[RedisServer, RedisServer, RedisServer], transport: Transport
) -> None:
    url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{watched[2].port}/other"
    message = r"refused.*; sentinel 127\.0\.0\.1:\d+: other is not known"
    backend = connect(url, **transport.options)
    with contextlib.closing(backend), pytest.raises(StorageError, match=message):
        backend.contains([make_key(1)])


def test_after_a_failover_the_new_master_is_used(
    watched: tuple[RedisServer, RedisServer, RedisServer], transport: Transport, pool: PinnedPool
) -> None:
    master, replica, sentinel = watched
    backend = connect(f"redis+sentinel://127.0.0.1:{sentinel.port}/kv", **transport.options)
    with contextlib.closing(backend):
        data = put(backend, pool, make_key(1), 100_000, 1)
        wait_until(lambda: b":1\r\n" in replica.ask("EXISTS", name_of(1)))
        master.kill()

        def answers() -> bool:
            try:
                return backend.contains([make_key(1)]) == 1
            except StorageError:
                return False

        wait_until(answers)
        assert get(backend, pool, make_key(1), 100_000) == data
        put(backend, pool, make_key(2), 100_000, 2)
        assert replica.ask("STRLEN", name_of(2)) == b":104096\r\n"


def test_a_demoted_master_is_an_error(pool: PinnedPool) -> None:
    assert VALKEY is not None
    with RedisServer(VALKEY) as server, contextlib.closing(connect(f"redis://127.0.0.1:{server.port}")) as backend:
        server.ask("REPLICAOF", "127.0.0.1", str(free_port()))
        buffer = take(pool, 4096)
        with pytest.raises(StorageError, match="READONLY"):
            backend.put([make_key(1)], [buffer])
        server.ask("REPLICAOF", "NO", "ONE")
        assert backend.put([make_key(1)], [buffer]) == 1
        buffer.release()


def test_a_lookup_in_a_cluster_takes_two_round_trips_a_node(
    cluster: list[RedisServer], transport: Transport, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = count_round_trips(monkeypatch)
    keys = [make_key(number) for number in range(10_000)]
    buffer = take(pool, 8)
    with contextlib.closing(connect(f"redis+cluster://127.0.0.1:{cluster[0].port}", **transport.options)) as backend:
        assert backend.put(keys, [buffer] * len(keys)) == len(keys)
        trips.clear()
        assert backend.contains(keys) == len(keys)
        assert list(trips.values()) == [2, 2, 2]
        # The chunks are spread, and clear() finds them on every node.
        assert all(server.ask("DBSIZE") > b":2" for server in cluster)
        assert backend.clear() >= len(keys)
        assert all(server.ask("DBSIZE") == b":0\r\n" for server in cluster)
    buffer.release()


def migrate(cluster: list[RedisServer], name: bytes, source: RedisServer, target: RedisServer, *, finish: bool) -> None:
    """Begin to move a key's slot, with the key; with ``finish``, end it too."""
    slot = str(key_slot(name))
    ids = {server.port: server.ask("CLUSTER", "MYID").split(b"\r\n")[1] for server in cluster}
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
    reply = source.ask("MIGRATE", "127.0.0.1", str(target.port), name, "0", "5000")
    assert reply in (b"+OK\r\n", b"+NOKEY\r\n")
    if finish:
        for server in (target, source):
            assert server.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port]) == b"+OK\r\n"


def owner(cluster: list[RedisServer], name: bytes) -> int:
    """Index of the node that serves a key."""
    return next(i for i, server in enumerate(cluster) if not server.ask("STRLEN", name).startswith(b"-MOVED"))


def test_a_slot_that_moved_is_followed(cluster: list[RedisServer], transport: Transport, pool: PinnedPool) -> None:
    with contextlib.closing(connect(f"redis+cluster://127.0.0.1:{cluster[0].port}", **transport.options)) as backend:
        backend.clear()
        data = {number: put(backend, pool, make_key(number), 50_000, number) for number in range(6)}
        at = owner(cluster, name_of(3))
        source, target = cluster[at], cluster[(at + 1) % 3]
        migrate(cluster, name_of(3), source, target, finish=False)
        # While it moves it is a miss, not an error, and nothing else is disturbed.
        assert backend.contains([make_key(3)]) == 0
        assert get(backend, pool, make_key(3), 50_000) is None
        buffer = take(pool, 50_000)
        assert backend.put([make_key(3)], [buffer]) == 0
        buffer.release()
        assert backend.contains([make_key(number) for number in range(6)]) == 3
        migrate(cluster, name_of(3), source, target, finish=True)
        keys = [make_key(number) for number in range(6)]
        buffers = [take(pool, 50_000) for _ in keys]
        assert backend.get(keys, buffers) == 6
        assert [bytes(buffer.view) for buffer in buffers] == list(data.values())
        for buffer in buffers:
            buffer.release()
        assert backend.remove(keys) == 6
        migrate(cluster, name_of(3), target, source, finish=True)  # as it was


def test_a_cluster_that_lost_a_node_is_an_error_until_it_is_back(
    cluster: list[RedisServer], transport: Transport, pool: PinnedPool
) -> None:
    url = f"redis+cluster://127.0.0.1:{cluster[0].port},127.0.0.1:{cluster[1].port}"
    with contextlib.closing(connect(url, timeout_s=2, **transport.options)) as backend:
        backend.clear()
        keys = [make_key(number) for number in range(8)]
        for number in range(8):
            put(backend, pool, make_key(number), 4096, number)
        lost = cluster[2]
        lost.kill()
        with pytest.raises(StorageError):
            backend.contains(keys)
        lost.start()

        def answers() -> bool:
            try:
                return backend.put(keys, buffers) == 8
            except StorageError:
                return False

        buffers = [take(pool, 4096) for _ in keys]
        wait_until(answers)
        for buffer in buffers:
            buffer.release()
        assert backend.contains(keys) == 8
