"""The Redis family on one Valkey server: what is stored, round trips, time to live, a full server, damage, options."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from redis_places import backend, cleared, connect, corrupt, count_round_trips, name_of, needs_valkey, pool, url, valkey

from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.storage.backends.redis.backend import RedisBackend
from lmcache.storage.chunk import HEADER_BYTES, encode_header
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, OpenBackend, fill, make_key, take
from lmcache.testing.processes import wait_until
from lmcache.testing.redis import RedisServer

__all__ = ["backend", "pool", "url", "valkey"]
pytestmark = needs_valkey
put, get = BackendTests.put, BackendTests.get


class TestValkey(BackendTests):
    selects_tenants = True

    @pytest.fixture
    def open_backend(self, url: str) -> OpenBackend:
        return cleared(url)


def test_one_key_holds_header_and_payload(valkey: RedisServer, backend: RedisBackend, pool: PinnedPool) -> None:
    put(backend, pool, make_key(1), 5000, 1)
    assert valkey.ask("DBSIZE") == b":1\r\n"
    assert valkey.ask("STRLEN", name_of(1)) == b":%d\r\n" % (HEADER_BYTES + 5000)
    assert valkey.ask("PTTL", name_of(1)) == b":-1\r\n"


@pytest.mark.skipif(shutil.which("redis-cli", path="/usr/bin") is None, reason="needs redis-cli")
def test_redis_cli_sees_the_same_chunks(
    valkey: RedisServer, backend: RedisBackend, pool: PinnedPool, tmp_path: Path
) -> None:
    data = put(backend, pool, make_key(1), 5000, 1)
    cli = ["/usr/bin/redis-cli", "-p", str(valkey.port)]
    found = subprocess.run([*cli, "--scan", "--pattern", "lmcache:*"], capture_output=True, check=True, timeout=30)
    assert found.stdout.split() == [name_of(1)]
    value = subprocess.run([*cli, "--raw", "GET", name_of(1)], capture_output=True, check=True, timeout=30).stdout
    assert value[:-1] == encode_header(make_key(1), memoryview(data)) + data
    # And what redis-cli writes is read.
    other = encode_header(make_key(2), memoryview(data)) + data
    subprocess.run([*cli, "-x", "SET", name_of(2)], input=other, capture_output=True, check=True, timeout=30)
    assert get(backend, pool, make_key(2), 5000) == data


def test_a_lookup_of_ten_thousand_keys_takes_two_round_trips(
    backend: RedisBackend, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = count_round_trips(monkeypatch)
    keys = [make_key(number) for number in range(10_000)]
    buffer = take(pool, 8)
    assert backend.put(keys, [buffer] * len(keys)) == len(keys)
    buffer.release()
    trips.clear()
    assert backend.sizes(keys) == [8] * len(keys)
    assert list(trips.values()) == [2]
    trips.clear()
    assert backend.contains([make_key(20_000), *keys]) == 0
    assert list(trips.values()) == [1]


def test_what_is_held_is_not_sent_again(valkey: RedisServer, backend: RedisBackend, pool: PinnedPool) -> None:
    put(backend, pool, make_key(1), 100_000, 1)
    valkey.ask("CONFIG", "RESETSTAT")
    put(backend, pool, make_key(1), 100_000, 1)
    assert b"cmdstat_set:" not in valkey.ask("INFO", "commandstats")


def test_a_time_to_live_is_set_and_renewed(valkey: RedisServer, url: str, pool: PinnedPool) -> None:
    with contextlib.closing(connect(url, ttl_s=500)) as backend:
        put(backend, pool, make_key(1), 4096, 1)
        assert 400_000 < int(valkey.ask("PTTL", name_of(1))[1:]) <= 500_000
        valkey.ask("PEXPIRE", name_of(1), "1000")
        put(backend, pool, make_key(1), 4096, 1)
        assert 400_000 < int(valkey.ask("PTTL", name_of(1))[1:]) <= 500_000
    with contextlib.closing(connect(url, ttl_s=0.02)) as backend:
        put(backend, pool, make_key(2), 4096, 2)
        wait_until(lambda: backend.contains([make_key(2)]) == 0)
        assert get(backend, pool, make_key(2), 4096) is None


def test_a_full_server_holds_nothing_more_but_still_reads(
    valkey: RedisServer, backend: RedisBackend, pool: PinnedPool, caplog: pytest.LogCaptureFixture
) -> None:
    data = put(backend, pool, make_key(1), 4096, 1)
    refused = metrics.TIER_REFUSED_BYTES.labels("redis")._value.get()
    valkey.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        buffers = [take(pool, 1 << 20) for _ in range(3)]
        keys = [make_key(number) for number in (2, 3, 4)]
        assert backend.put(keys, buffers) == 0
        assert backend.put([make_key(1), *keys], [buffers[0], *buffers]) == 0  # of another length: not held
        assert get(backend, pool, make_key(1), 4096) == data
    finally:
        valkey.ask("CONFIG", "SET", "maxmemory", "0")
    assert metrics.TIER_REFUSED_BYTES.labels("redis")._value.get() == refused + (7 << 20)
    assert sum("not stored" in record.message for record in caplog.records) == 1
    assert backend.put(keys, buffers) == 3
    for buffer in buffers:
        buffer.release()


def test_a_server_that_evicts_by_itself_makes_room(
    valkey: RedisServer, backend: RedisBackend, pool: PinnedPool
) -> None:
    valkey.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    valkey.ask("CONFIG", "SET", "maxmemory", "16mb")
    try:
        data = [put(backend, pool, make_key(number), 1 << 20, number) for number in range(24)]
        assert get(backend, pool, make_key(23), 1 << 20) == data[23]
        assert not all(backend.contains([make_key(number)]) for number in range(24))
    finally:
        valkey.ask("CONFIG", "SET", "maxmemory", "0")
        valkey.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


def test_a_value_larger_than_the_server_takes_is_not_held(url: str, pool: PinnedPool) -> None:
    with contextlib.closing(connect(url, max_value="64KiB")) as backend:
        buffer = take(pool, 64 << 10)
        assert backend.put([make_key(1)], [buffer]) == 0
        buffer.release()


DAMAGE: dict[str, Callable[[RedisServer], object]] = {
    "a byte of the payload": lambda server: server.ask("SETRANGE", name_of(1), "50000", b"\x00\x01\x02\x03"),
    "the magic": lambda server: server.ask("SETRANGE", name_of(1), "0", b"X"),
    "padding of the header": lambda server: server.ask("SETRANGE", name_of(1), "4000", b"X"),
    "another key's chunk": lambda server: server.ask("COPY", name_of(2), name_of(1), "REPLACE"),
    "too long": lambda server: server.ask("APPEND", name_of(1), b"X"),
    "too short": lambda server: server.ask("SET", name_of(1), b"LMCACHE"),
    "nothing": lambda server: server.ask("SET", name_of(1), b""),
    "not a string": lambda server: (server.ask("DEL", name_of(1)), server.ask("RPUSH", name_of(1), b"X")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_value_is_a_miss_and_is_removed(
    valkey: RedisServer, backend: RedisBackend, pool: PinnedPool, what: str
) -> None:
    data = {number: put(backend, pool, make_key(number), 100_000, number) for number in (0, 1, 2)}
    before = corrupt()
    DAMAGE[what](valkey)
    keys = [make_key(number) for number in (0, 1, 2)]
    buffers = [take(pool, 100_000) for _ in keys]
    assert backend.get(keys, buffers) == 1
    assert bytes(buffers[0].view) == data[0]
    assert corrupt() == before + 1
    assert valkey.ask("EXISTS", name_of(1)) == b":0\r\n"
    # The connection is still good, and the place can be filled again.
    assert get(backend, pool, make_key(2), 100_000) == data[2]
    assert put(backend, pool, make_key(1), 100_000, 1) == data[1]
    assert get(backend, pool, make_key(1), 100_000) == data[1]
    for buffer in buffers:
        buffer.release()


def test_a_truncated_value_is_written_again(valkey: RedisServer, backend: RedisBackend, pool: PinnedPool) -> None:
    put(backend, pool, make_key(1), 100_000, 1)
    valkey.ask("SET", name_of(1), b"half a chunk")
    assert backend.contains([make_key(1)]) == 0
    data = put(backend, pool, make_key(1), 100_000, 1)
    assert get(backend, pool, make_key(1), 100_000) == data


def test_clear_leaves_what_is_not_a_chunk_under_its_prefix(
    valkey: RedisServer, backend: RedisBackend, url: str, pool: PinnedPool
) -> None:
    for name in (b"other", b"lmcache:settings", b"lmcachex" + name_of(1)[8:]):
        valkey.ask("SET", name, b"1")
    with contextlib.closing(connect(url, prefix="t*[e]nant?\\:")) as tenant:
        data = put(tenant, pool, make_key(1), 4096, 1)
        put(backend, pool, make_key(1), 4096, 1)
        assert backend.clear() == 1
        assert get(tenant, pool, make_key(1), 4096) == data
        assert tenant.clear(make_key(1).fingerprint) == 1
    assert valkey.ask("DBSIZE") == b":3\r\n"


def test_databases_are_kept_apart(url: str, backend: RedisBackend, pool: PinnedPool) -> None:
    with contextlib.closing(connect(f"{url}/3")) as third:
        put(third, pool, make_key(1), 4096, 1)
        assert backend.contains([make_key(1)]) == 0
        assert third.contains([make_key(1)]) == 1


def test_many_threads_share_few_connections(url: str, valkey: RedisServer, pool: PinnedPool) -> None:
    failures: list[str] = []
    with contextlib.closing(connect(url, connections=2)) as backend:

        def work(number: int) -> None:
            try:
                for turn in range(5):
                    data = put(backend, pool, make_key(100 * number + turn), 30_000, number + turn)
                    if get(backend, pool, make_key(100 * number + turn), 30_000) != data:
                        failures.append("wrong bytes")
            except (StorageError, AssertionError) as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        clients = valkey.ask("CLIENT", "LIST").count(b"id=") - 1  # less the one that asks
        assert clients <= 2


def test_two_writers_of_one_key_leave_one_whole_chunk(url: str, pool: PinnedPool) -> None:
    with contextlib.closing(connect(url)) as one, contextlib.closing(connect(url)) as two:
        stop = threading.Event()
        errors: list[BaseException] = []

        def write(backend: RedisBackend, nbytes: int) -> None:
            buffer = take(pool, nbytes)
            fill(buffer, nbytes)
            try:
                while not stop.is_set():
                    backend.put([make_key(1)], [buffer])
            except BaseException as error:
                errors.append(error)
            finally:
                buffer.release()

        # Of different lengths, so that each overwrites the other's.
        threads = [threading.Thread(target=write, args=pair) for pair in ((one, 200_000), (two, 300_000))]
        for thread in threads:
            thread.start()
        before, seen = corrupt(), 0
        try:
            for _ in range(100):
                for nbytes in (200_000, 300_000):
                    buffer = take(pool, nbytes)
                    if one.get([make_key(1)], [buffer]):
                        expected = take(pool, nbytes)
                        seen += bytes(buffer.view) == fill(expected, nbytes)
                        assert bytes(buffer.view) == bytes(expected.view)
                        expected.release()
                    buffer.release()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not errors
        assert seen or corrupt() > before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "redis://h:6379?db=1"}, "options such as"),
        ({"url": "redis://a,b"}, "one host"),
        ({"url": "redis://h:port"}, "expected host:port"),
        ({"url": "redis://"}, "expected host:port"),
        ({"url": "redis://h/one"}, "database is a number"),
        ({"url": "redis+cluster://h/1"}, "no databases"),
        ({"url": "redis+sentinel://h:1"}, "name of the master"),
        ({"url": "redis://h", "tls_ca": "/x"}, "tls: true"),
        ({"url": "rediss://h", "tls_cert": "/x"}, "both or neither"),
        ({"url": "rediss://h", "tls_ca": "/does/not/exist"}, "No such file"),
        ({"url": "redis://h", "password": "a", "password_file": "b"}, "one of them"),
        ({"url": "redis://h", "conections": 1}, "conections; known: url"),
        ({"url": "redis://u:hunter2@h?x=1"}, "^(?!.*hunter2)"),
        ({"url": "redis://u:hunter2@h", "timeout_s": 0}, "^(?!.*hunter2)"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_is_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backend({"type": "remote", **options}, "tiers[0]")
