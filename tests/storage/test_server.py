"""The standalone server: conformance over real processes, faults, bad input, crashes, TLS, shutdown."""

from __future__ import annotations

import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache import metrics
from lmcache.config import build
from lmcache.errors import ClosedError, ConfigError, StorageError
from lmcache.server import protocol
from lmcache.server.channel import Channel
from lmcache.server.client import Client, ClientConfig
from lmcache.server.config import ServerConfig
from lmcache.server.http import StatusPages
from lmcache.server.protocol import MAX_HEAD_BYTES, PREFIX_BYTES, SEAL_BYTES, encode_frame, join_keys
from lmcache.server.server import Server
from lmcache.storage.backends.lm import LMServerBackend
from lmcache.storage.base import StorageBackend
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key

sys.path.insert(0, str(Path(__file__).parent))
from server_process import ServerProcess

CHUNK = 100_000
WAIT_S = 20.0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def data(seed: int, nbytes: int = CHUNK) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def put(client: Client, *numbers: int) -> int:
    return client.put([make_key(n) for n in numbers], [memoryview(data(n)) for n in numbers])


def get(client: Client, *numbers: int) -> list[bytes]:
    into = [bytearray(CHUNK) for _ in numbers]
    count = client.get([make_key(n) for n in numbers], [memoryview(b) for b in into])
    return [bytes(b) for b in into[:count]]


@pytest.fixture
def open_server() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(**options: Any) -> Server:
        storage = {"memory": {"capacity": "16MiB"}, **options.pop("storage", {})}
        server = Server(build(ServerConfig, {"port": 0, "drain_timeout_s": 0.2, "storage": storage, **options}, "test"))
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()
        assert server._shared.budget.used == 0
        assert server._shared.store.pool.used_bytes == 0, "a buffer leaked"


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    clients = []

    def open_client(server: Any, scheme: str = "lm", **options: Any) -> Client:
        port = server if isinstance(server, int) else server.port
        clients.append(Client(ClientConfig(url=f"{scheme}://127.0.0.1:{port}", backoff_s=0.01, **options)))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


def in_use(server: Server) -> int:
    """Bytes of buffers that hold no chunk."""
    held = sum(-(-b.nbytes // 4096) * 4096 for b in server._shared.store._memory._buffers.values())
    return server._shared.store.pool.used_bytes - held


# -- conformance: a process with memory, one with memory and disk, one that acknowledges what is on disk


@pytest.fixture(scope="class")
def process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = str(tmp_path_factory.mktemp("kv"))
    overrides = [override.replace("FOLDER", folder) for override in request.cls.overrides]
    process = ServerProcess("storage.memory.capacity=64MiB", *overrides)
    yield process
    status, said = process.terminate()
    assert status == 0, said
    assert "Traceback" not in said


class OverAProcess(BackendTests):
    durable = False
    overrides: tuple[str, ...] = ()

    @pytest.fixture
    def open_backend(self, process: ServerProcess) -> Callable[[], StorageBackend]:
        url = f"lm://127.0.0.1:{process.port}"
        before = LMServerBackend(ClientConfig(url=url))
        before.clear()
        before.close()
        return lambda: build_backend({"type": "remote", "url": url}, "test")


class TestMemoryServer(OverAProcess):
    durable = True  # the server keeps what a client put when that client goes


class TestDiskServer(OverAProcess):
    durable = True
    overrides = ("storage.tiers=[{type: disk, path: FOLDER}]",)


class TestDurableServer(OverAProcess):
    durable = True
    overrides = ("storage.tiers=[{type: disk, path: FOLDER}]", "durable=true")


# -- damage and limits


def test_damage_in_the_servers_memory_is_a_miss_and_goes(open_server: Any, connect: Any) -> None:
    server = open_server()
    client = connect(server)
    assert put(client, 0, 1, 2) == 3
    server._shared.store._memory._buffers[make_key(1)].view[500] ^= 1
    before = metrics.CORRUPT_CHUNKS.labels("lm")._value.get()
    assert get(client, 0, 1, 2) == [data(0)]
    assert metrics.CORRUPT_CHUNKS.labels("lm")._value.get() == before + 1
    assert client.sizes([make_key(1)]) == []
    assert put(client, 1) == 1
    assert get(client, 0, 1, 2) == [data(n) for n in range(3)], "and the connection stays in step"


def test_a_chunk_under_another_key_is_a_miss(open_server: Any, connect: Any) -> None:
    server = open_server()
    client = connect(server)
    put(client, 0, 1)
    buffers = server._shared.store._memory._buffers
    buffers[make_key(0)], buffers[make_key(1)] = buffers[make_key(1)], buffers[make_key(0)]
    assert get(client, 0) == []


def test_a_put_that_does_not_bear_its_seal_is_not_held(open_server: Any) -> None:
    server = open_server()
    channel = log_in(server.port)
    channel.send_head(protocol.Put(join_keys([make_key(0)]), [CHUNK], False), CHUNK + SEAL_BYTES)
    channel._send([memoryview(data(0)), memoryview(bytes(SEAL_BYTES))])
    assert channel.receive_frame(protocol.REPLY, MAX_HEAD_BYTES)[0] == protocol.Count(0)
    assert server.stats()["chunks"] == 0
    channel.close()


def test_what_is_too_large_is_not_held_and_the_rest_is(open_server: Any, connect: Any) -> None:
    server = open_server(max_chunk=CHUNK + SEAL_BYTES)
    client = connect(server)
    large = memoryview(bytearray(CHUNK + 1))
    keys = [make_key(n) for n in range(3)]
    assert client.put(keys, [memoryview(data(0)), large, memoryview(data(2))]) == 2
    assert get(client, 0, 2) == [data(0), data(2)]


def test_more_than_memory_holds_evicts_and_what_is_read_comes_in_batches(open_server: Any, connect: Any) -> None:
    server = open_server(storage={"memory": {"capacity": "100MiB"}})
    client = connect(server)
    numbers = range(300)
    assert put(client, *numbers) == 300
    assert get(client, *numbers) == [data(n) for n in numbers]
    assert in_use(server) == 0


def test_ten_thousand_keys_are_one_round_trip(open_server: Any, connect: Any) -> None:
    client = connect(open_server())
    put(client, *range(5))
    before = metrics.SERVER_REQUESTS.labels("sizes")._value.get()
    assert client.sizes([make_key(n) for n in range(10_000)]) == [CHUNK] * 5
    eventually(lambda: metrics.SERVER_REQUESTS.labels("sizes")._value.get() == before + 1)


def test_connections_are_limited(open_server: Any, connect: Any) -> None:
    server = open_server(max_connections=2)
    channels = [log_in(server.port) for _ in range(2)]
    with pytest.raises(StorageError, match="too many connections"):
        put(connect(server, attempts=2), 0)
    for channel in channels:
        channel.close()
    eventually(lambda: server.stats()["connections"] == 0)
    assert put(connect(server), 0) == 1


def test_requests_without_room_are_refused_in_time_and_nothing_leaks(open_server: Any, connect: Any) -> None:
    server = open_server(busy_timeout_s=0.05)
    client = connect(server, attempts=1)
    put(client, 0)
    assert server._shared.budget.take(server._shared.budget.nbytes, 0)
    assert put(client, 1) == 0
    with pytest.raises(StorageError, match="busy"):
        get(client, 0)
    server._shared.budget.give(server._shared.budget.nbytes)
    assert get(client, 0) == [data(0)]


# -- bad input


def log_in(port: int) -> Channel:
    channel = Channel(socket.create_connection(("127.0.0.1", port)))
    channel.start(WAIT_S)
    channel.receive_frame(protocol.HELLO, 1024)
    channel.send_frame(protocol.Login(bytes(32), b""))
    channel.receive_frame(protocol.WELCOME, 1024)
    return channel


def good_frames() -> list[bytes]:
    keys = join_keys([make_key(0), make_key(1)])
    put_head = encode_frame(protocol.Put(keys, [10, 20], False), 30 + 2 * SEAL_BYTES)
    return [
        encode_frame(protocol.Sizes(keys)),
        encode_frame(protocol.Get(keys, [10, 20])),
        put_head + bytes(30 + 2 * SEAL_BYTES),
        encode_frame(protocol.Remove(keys)),
        encode_frame(protocol.Clear(None)),
        encode_frame(protocol.Login(bytes(32), b"")),
    ]


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Server]:
    server = Server(
        ServerConfig(port=0, request_timeout_s=0.3, login_timeout_s=0.3, storage={"memory": {"capacity": 16 << 20}})
    )  # type: ignore[arg-type]
    server.start()
    yield server
    server.stop()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frame=st.sampled_from(good_frames()),
    edits=st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), max_size=3),
    cut=st.none() | st.integers(0, 200),
    tail=st.binary(max_size=64),
    logged_in=st.booleans(),
)
def test_no_frame_harms_the_server(
    fuzzed: Server, frame: bytes, edits: list[tuple[int, bytes]], cut: int | None, tail: bytes, logged_in: bool
) -> None:
    raw = bytearray(frame[:cut] + tail)
    for at, new in edits:
        raw[at : at + len(new)] = new
    if logged_in:
        channel = log_in(fuzzed.port)
        sock = channel._sock
    else:
        sock = socket.create_connection(("127.0.0.1", fuzzed.port))
    with sock:
        sock.settimeout(WAIT_S)
        try:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except ConnectionError:
            pass
    eventually(lambda: in_use(fuzzed) == 0 and fuzzed._shared.budget.used == 0)
    with log_in(fuzzed.port)._sock:
        assert fuzzed.healthy


def resealed(
    head: bytes, payload_bytes: int = 0, version: int = protocol.VERSION, head_bytes: int | None = None
) -> bytes:
    fields = protocol._FIELDS.pack(
        b"LMCS", version, 0, len(head) if head_bytes is None else head_bytes, 0, payload_bytes
    )
    return fields + protocol._CHECKSUM.pack(protocol.xxhash.xxh3_64_intdigest(fields + head)) + head


KEYS = join_keys([make_key(0), make_key(1)])
NONSENSE = {
    "version": (resealed(b"", version=7), "version 7"),
    "head of 4 GiB": (resealed(b"", head_bytes=2**32 - 1), "a head of 4294967295 bytes"),
    "payload without put": (resealed(encode_frame(protocol.Remove(KEYS))[PREFIX_BYTES:], 2**63), "with a payload"),
    "payload of another size": (encode_frame(protocol.Put(KEYS, [10, 20], False), 2**60), "a payload of"),
    "sizes of 2**63": (
        resealed(protocol._encoder.encode({"type": "Put", "keys": KEYS, "sizes": [2**63], "durable": False})),
        "cannot be read",
    ),
    "size of zero": (
        resealed(protocol._encoder.encode({"type": "Get", "keys": KEYS, "sizes": [0, 1]})),
        "cannot be read",
    ),
    "missing sizes": (encode_frame(protocol.Get(KEYS, [10])), "1 sizes for 2 keys"),
    "half a key": (encode_frame(protocol.Sizes(KEYS[:-1])), "64 bytes each"),
    "unknown field": (
        resealed(protocol._encoder.encode({"type": "Clear", "fingerprint": None, "x": 1})),
        "cannot be read",
    ),
    "short fingerprint": (encode_frame(protocol.Clear(b"x")), "fingerprint has 16 bytes"),
    "http": (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + bytes(64), "wrong magic"),
    "checksum": (encode_frame(protocol.Sizes(KEYS))[:-1] + b"!", "checksum"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_answered_logged_once_and_costs_no_memory(
    open_server: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = open_server()
    raw, complaint = NONSENSE[name]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            channel = log_in(server.port)
            channel._send([memoryview(raw)])
            reply = channel.receive_frame(protocol.REPLY, MAX_HEAD_BYTES)[0]
            assert isinstance(reply, protocol.Failed)
            assert (reply.code, complaint in reply.message) == ("protocol", True), reply
            channel.close()
            eventually(lambda: server.stats()["connections"] == 0)
    assert len([r for r in caplog.records if "protocol" in r.message]) == 1
    assert server.stats()["used_bytes"] == 0


def test_who_says_nothing_or_too_little_is_cut_off(open_server: Any) -> None:
    server = open_server(login_timeout_s=0.1, request_timeout_s=0.1, busy_timeout_s=0.05)
    silent = socket.create_connection(("127.0.0.1", server.port))
    slow = log_in(server.port)
    slow._send([memoryview(encode_frame(protocol.Sizes(KEYS))[:20])])
    midway = log_in(server.port)
    midway.send_head(protocol.Put(KEYS, [CHUNK, CHUNK], False), 2 * (CHUNK + SEAL_BYTES))
    midway._send([memoryview(data(0))])
    eventually(lambda: server.stats()["connections"] == 0)
    assert (server._shared.budget.used, server.stats()["used_bytes"]) == (0, 0)
    silent.close()
    slow.close()
    midway.close()


def test_a_client_that_does_not_read_holds_nothing_for_long(open_server: Any, connect: Any) -> None:
    server = open_server(request_timeout_s=0.3, storage={"memory": {"capacity": "64MiB"}})
    big = [memoryview(bytearray(4 << 20)) for _ in range(4)]
    keys = [make_key(n) for n in range(4)]
    assert connect(server).put(keys, big) == 4
    stuck = log_in(server.port)
    stuck._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.send_frame(protocol.Get(join_keys(keys), [4 << 20] * 4))
    eventually(lambda: server._shared.budget.used > 0)
    eventually(lambda: server._shared.budget.used == 0 and in_use(server) == 0)
    stuck.close()


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_dies_midway_leaves_nothing(open_server: Any, reset: bool) -> None:
    server = open_server()
    for sent in (0, 10, CHUNK, CHUNK + 8, CHUNK + SEAL_BYTES, CHUNK + SEAL_BYTES + 5):
        channel = log_in(server.port)
        channel.send_head(protocol.Put(KEYS, [CHUNK, CHUNK], False), 2 * (CHUNK + SEAL_BYTES))
        value = data(0) + protocol.seal(make_key(0), CHUNK, protocol.xxhash.xxh3_64_intdigest(data(0)))
        channel._send([memoryview((value * 2)[:sent])] if sent else [])
        if reset:
            channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        channel.close()
        eventually(lambda: server.stats()["connections"] == 0)
        assert (server._shared.budget.used, in_use(server)) == (0, 0)
    assert server.stats()["chunks"] <= 1, "what came whole may be held"


# -- tokens and TLS


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("open sesame\n")
    return file


def test_only_who_knows_the_token_is_served(open_server: Any, connect: Any, token: Path, tmp_path: Path) -> None:
    server = open_server(token_file=token)
    assert put(connect(server, token_file=token), 0) == 1
    other = tmp_path / "other"
    other.write_text("open barley")
    for options in ({}, {"token_file": other}):
        start = time.monotonic()
        with pytest.raises(StorageError, match="token is missing or wrong"):
            get(connect(server, **options), 0)
        assert time.monotonic() - start < 5, "and it is not tried again"


def test_requests_before_the_login_are_refused(open_server: Any, token: Path) -> None:
    server = open_server(token_file=token)
    channel = Channel(socket.create_connection(("127.0.0.1", server.port)))
    channel.start(WAIT_S)
    channel.receive_frame(protocol.HELLO, 1024)
    channel.send_frame(protocol.Sizes(KEYS))
    reply = channel.receive_frame(protocol.REPLY, 1024)[0]
    assert isinstance(reply, protocol.Failed)
    channel.close()


def test_a_server_that_does_not_know_the_token_is_not_believed(open_server: Any, connect: Any, token: Path) -> None:
    with pytest.raises(StorageError, match="does not know our token"):
        put(connect(open_server(), token_file=token), 0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"openssl makes no certificate here: {error}")
    return cert, key


def test_tls_serves_and_checks_certificates(open_server: Any, connect: Any, certificates: tuple[Path, Path]) -> None:
    cert, key = certificates
    server = open_server(tls={"cert_file": cert, "key_file": key, "client_ca_file": cert}, login_timeout_s=1)
    client = connect(server, "lms", ca_file=cert, cert_file=cert, key_file=key)
    assert put(client, 0, 1) == 2
    assert get(client, 0, 1) == [data(0), data(1)]
    for scheme, options in (("lms", {}), ("lms", {"ca_file": cert}), ("lm", {"connect_timeout_s": 0.2})):
        with pytest.raises(StorageError):
            get(connect(server, scheme, attempts=1, **options), 0)
    assert get(client, 0) == [data(0)]


# -- the client and its faults


def test_nobody_listens(connect: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(StorageError, match="refused"):
        get(connect(port), 0)


@pytest.fixture
def impostor() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """A server that does something else."""
    listeners, threads, stop = [], [], threading.Event()

    def start(behave: Callable[[socket.socket], None]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(0.05)
        listeners.append(listener)

        def serve() -> None:
            while not stop.is_set():
                try:
                    sock = listener.accept()[0]
                except TimeoutError:
                    continue
                with sock:
                    sock.settimeout(WAIT_S)
                    behave(sock)
                    stop.wait(0.05)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return int(listener.getsockname()[1])

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()


def greet(sock: socket.socket) -> None:
    sock.sendall(encode_frame(protocol.Hello(bytes(32), False)))
    sock.recv(1000)
    sock.sendall(encode_frame(protocol.Welcome(b"", True)))
    sock.recv(1000)


def value(n: int) -> bytes:
    return data(n) + protocol.seal(make_key(n), CHUNK, protocol.xxhash.xxh3_64_intdigest(data(n)))


IMPOSTORS: dict[str, Callable[[socket.socket], object]] = {
    "silent": lambda s: s.recv(1),
    "garbage": lambda s: s.sendall(b"x" * 4096),
    "closes after the greeting": greet,
    "another version": lambda s: s.sendall(resealed(b"", version=9)),
    "hangs in the payload": lambda s: (
        greet(s),
        s.sendall(encode_frame(protocol.Found([CHUNK]), CHUNK + 16)),
        s.recv(1),
    ),
    "closes in the payload": lambda s: (
        greet(s),
        s.sendall(encode_frame(protocol.Found([CHUNK]), CHUNK + 16) + bytes(99)),
    ),
    "another length": lambda s: (
        greet(s),
        s.sendall(encode_frame(protocol.Found([CHUNK - 1]), CHUNK + 15) + bytes(CHUNK)),
    ),
    "too many": lambda s: (
        greet(s),
        s.sendall(encode_frame(protocol.Found([CHUNK] * 2), 2 * CHUNK + 32) + value(0) * 2),
    ),
    "endless": lambda s: (greet(s), s.sendall(encode_frame(protocol.Found([], True)) * 5)),
    "another answer": lambda s: (greet(s), s.sendall(encode_frame(protocol.Count(3)))),
    "a head of 4 GiB": lambda s: (greet(s), s.sendall(resealed(b"", head_bytes=2**32 - 1))),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_a_broken_server_is_an_error_within_the_deadline(impostor: Any, connect: Any, name: str) -> None:
    client = connect(impostor(IMPOSTORS[name]), timeout_s=0.4, connect_timeout_s=0.2, attempts=2)
    start = time.monotonic()
    with pytest.raises(StorageError):
        get(client, 0)
    assert time.monotonic() - start < 2
    assert client._idle == [], "a connection whose exchange broke is never used again"


def test_wrong_bytes_from_a_server_are_a_miss(impostor: Any, connect: Any) -> None:
    def lie(sock: socket.socket) -> None:
        greet(sock)
        sock.sendall(encode_frame(protocol.Found([CHUNK]), CHUNK + 16) + value(1))
        sock.recv(1000)
        sock.sendall(encode_frame(protocol.Count(1)))

    assert get(connect(impostor(lie)), 0) == []


def test_the_pool_of_connections_is_bounded_and_waits(open_server: Any, connect: Any) -> None:
    server = open_server()
    client = connect(server, connections=2)
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(5):
            if put(client, n) != 1 or get(client, n) != [data(n)]:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, server.stats()["connections"])
        threads[0].join(0.01)
    assert (wrong, most <= 2) == ([], True)


def test_closing_the_client_ends_calls_under_way(impostor: Any, connect: Any) -> None:
    reached = threading.Event()

    def hang(sock: socket.socket) -> None:
        greet(sock)
        reached.set()
        sock.recv(1)

    client = connect(impostor(hang), timeout_s=WAIT_S)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            get(client, 0)
        except (StorageError, ClosedError) as error:
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(WAIT_S)
    client.close()
    thread.join(5)
    assert len(failure) == 1
    with pytest.raises(ClosedError):
        get(client, 0)


# -- processes: crashes, restarts, shutdown, pages


def test_sigkill_loses_no_durable_chunk(tmp_path: Path, connect: Any) -> None:
    dice, acknowledged = random.Random(2), list[int]()
    process = ServerProcess("storage.memory.capacity=16MiB", f"storage.tiers=[{{type: disk, path: {tmp_path}}}]")
    client = connect(process, durable=True, attempts=1, connections=2)
    try:
        for round_ in range(5):
            killer = threading.Timer(dice.uniform(0.02, 0.2), process.process.kill)
            killer.start()
            try:
                for n in range(round_ * 1000, round_ * 1000 + 1000):
                    if put(client, n):
                        acknowledged.append(n)
            except StorageError:
                pass
            killer.join()
            process.kill()
            process.start()
            # Whatever was acknowledged is there, over a connection that the client has to open anew.
            for n in acknowledged:
                assert get(client, n) == [data(n)]
    finally:
        process.terminate()
    assert acknowledged


def test_a_restart_is_survived_by_the_client(connect: Any) -> None:
    process = ServerProcess("storage.memory.capacity=16MiB")
    client = connect(process)
    assert put(client, 0) == 1
    process.kill()
    with pytest.raises(StorageError):
        get(client, 0)
    process.start()
    assert get(client, 0) == []
    assert put(client, 0) == 1
    assert process.terminate()[0] == 0


def test_sigterm_finishes_what_is_under_way_and_writes_what_is_queued(tmp_path: Path, connect: Any) -> None:
    process = ServerProcess("storage.memory.capacity=64MiB", f"storage.tiers=[{{type: disk, path: {tmp_path}}}]")
    assert put(connect(process), *range(50)) == 50
    idle = log_in(process.port)
    channel = log_in(process.port)
    channel.send_head(protocol.Put(join_keys([make_key(99)]), [CHUNK], False), CHUNK + SEAL_BYTES)
    channel._send([memoryview(value(99)[:1000])])
    probe = Client(ClientConfig(url=f"lm://127.0.0.1:{process.port}", attempts=1))
    assert probe.sizes([make_key(0)]) == [CHUNK]  # the server has read the head before this, as far as one can tell
    process.process.terminate()
    assert idle.readable(WAIT_S), "idle connections are closed at once"
    channel._send([memoryview(value(99)[1000:])])
    assert channel.receive_frame(protocol.REPLY, MAX_HEAD_BYTES)[0] == protocol.Count(1)
    status, said = process.terminate()
    assert (status, "stopped" in said) == (0, True), said
    assert len(list(tmp_path.rglob("*.kv"))) == 51
    for end in (idle, channel, probe):
        end.close()


def test_sigterm_does_not_wait_for_ever(connect: Any) -> None:
    process = ServerProcess("storage.memory.capacity=16MiB", "drain_timeout_s=0.2")
    channel = log_in(process.port)
    channel.send_head(protocol.Put(KEYS, [CHUNK, CHUNK], False), 2 * (CHUNK + SEAL_BYTES))
    channel._send([memoryview(data(0))])
    connect(process).sizes([make_key(0)])
    start = time.monotonic()
    status, said = process.terminate()
    assert time.monotonic() - start < 10
    assert (status, "were not done" in said) == (2, True), said
    channel.close()


def test_metrics_health_and_systemd(tmp_path: Path, connect: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(WAIT_S)
        process = ServerProcess(
            "storage.memory.capacity=16MiB", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        assert systemd.recv(100) == b"READY=1"
        put(connect(process), 0)
        base = f"http://127.0.0.1:{process.http_port}"
        with urllib.request.urlopen(f"{base}/health", timeout=WAIT_S) as page:
            health = json.load(page)
        assert (health["status"], health["chunks"], health["in_flight_bytes"]) == ("ok", 1, 0)
        with urllib.request.urlopen(f"{base}/metrics", timeout=WAIT_S) as page:
            text = page.read().decode()
        assert 'lmcache_server_requests_total{request="put"} 1.0' in text
        with pytest.raises(urllib.error.HTTPError, match="404") as missing:
            urllib.request.urlopen(f"{base}/", timeout=WAIT_S)
        missing.value.close()
        assert process.terminate()[0] == 0
        assert systemd.recv(100) == b"STOPPING=1"


def test_slow_readers_of_pages_do_not_keep_others_out(open_server: Any) -> None:
    server = open_server()
    pages = StatusPages(server, "127.0.0.1", 0)
    stuck = [socket.create_connection(("127.0.0.1", pages.port)) for _ in range(4)]
    with urllib.request.urlopen(f"http://127.0.0.1:{pages.port}/health", timeout=WAIT_S) as page:
        assert page.status == 200
    for sock in stuck:
        sock.close()
    pages.close()


# -- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prot": 1}, "unknown key prot; known: host, port"),
        ({"host": "0.0.0.0"}, "set token_file"),
        ({"durable": True}, "durable needs a tier"),
        ({"storage": {"codec": "int8"}}, "codec: only an engine has that"),
        ({"storage": {"memroy": {}}}, "unknown key memroy"),
    ],
)
def test_a_wrong_server_configuration_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ServerConfig, options, "server")


@pytest.mark.parametrize(
    "url", ["lm://", "lm://host:0", "lm://host:99999", "http://host", "lm://u:p@host", "lm://host/x"]
)
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected lm://host:port"):
        build(ClientConfig, {"url": url}, "client")


def test_a_client_that_asks_for_durability_where_there_is_none_is_told(open_server: Any, connect: Any) -> None:
    with pytest.raises(StorageError, match="no tier below memory"):
        put(connect(open_server(), durable=True), 0)


def test_a_port_in_use_is_a_config_error(open_server: Any) -> None:
    server = open_server()
    with pytest.raises(ConfigError, match="cannot listen"):
        Server(ServerConfig(port=server.port))


def test_missing_files_are_config_errors(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match="cannot read the token"):
        Server(ServerConfig(port=0, token_file=missing))
    with pytest.raises(ConfigError, match="certificates"):
        Server(build(ServerConfig, {"port": 0, "tls": {"cert_file": missing}}, "x"))
    with pytest.raises(ConfigError, match="certificates"):
        Client(ClientConfig(url="lms://127.0.0.1", ca_file=missing))
