"""The client against broken servers, tokens, TLS, configuration."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server_harness import CHUNK, KEYS, WAIT_S, data, get, put, resealed, value

from lmcache.config import build
from lmcache.errors import ClosedError, ConfigError, StorageError
from lmcache.server.config import ServerConfig
from lmcache.server.server import Server
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.channel import Channel
from lmcache.storage.backends.lm.client import Client, ClientConfig
from lmcache.storage.backends.lm.protocol import encode_frame


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
            get(connect(server, scheme, **options), 0)
    assert get(client, 0) == [data(0)]


def test_who_meets_the_other_kind_of_server_is_told(
    open_server: Any, connect: Any, impostor: Any, certificates: tuple[Path, Path]
) -> None:
    cert, key = certificates
    plain, secure = open_server(), open_server(tls={"cert_file": cert, "key_file": key}, login_timeout_s=1)
    with pytest.raises(StorageError, match=rf"127\.0\.0\.1:{plain.port}: the server has no TLS: use lm://"):
        get(connect(plain, "lms"), 0)
    silent = impostor(IMPOSTORS["silent"])
    doubt = r": is it an lmcache server, and does it speak TLS \(lms://\)\?"
    for port in (secure.port, silent):
        with pytest.raises(StorageError, match=rf"no greeting from 127\.0\.0\.1:{port}{doubt}"):
            get(connect(port, connect_timeout_s=0.2), 0)
    silent = impostor(lambda s: (s.recv(1 << 16), s.recv(1)))
    with pytest.raises(StorageError, match=rf"no TLS handshake with 127\.0\.0\.1:{silent}"):
        get(connect(silent, "lms", connect_timeout_s=0.2), 0)


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
    client = connect(impostor(IMPOSTORS[name]), timeout_s=0.4, connect_timeout_s=0.2)
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


def test_a_call_that_fails_is_not_tried_again(impostor: Any, connect: Any) -> None:
    came: list[int] = []
    client = connect(impostor(lambda sock: (came.append(1), greet(sock))))
    with pytest.raises(StorageError, match="the other side closed the connection"):
        get(client, 0)
    assert len(came) == 1, "the manager tries again, and nobody else"


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prot": 1}, "unknown key prot; known: host, port"),
        ({"host": "0.0.0.0"}, "set token_file"),
        ({"durable": True}, "durable needs a tier"),
        ({"storage": {"codec": "int8"}}, "codec: only an engine has that"),
        ({"storage": {"blend": {}}}, "blend: only an engine has that"),
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
    with pytest.raises(ConfigError, match=rf"cannot read the cert_file {missing}: No such file"):
        Server(build(ServerConfig, {"port": 0, "tls": {"cert_file": missing}}, "x"))
    with pytest.raises(ConfigError, match=rf"cannot read the ca_file {missing}: No such file"):
        Client(ClientConfig(url="lms://127.0.0.1", ca_file=missing))
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    with pytest.raises(ConfigError, match=rf"cannot use the cert_file {rubbish}: "):
        Server(build(ServerConfig, {"port": 0, "tls": {"cert_file": rubbish}}, "x"))
    with pytest.raises(ConfigError, match=rf"cannot use the ca_file {rubbish}: "):
        Client(ClientConfig(url="lms://127.0.0.1", ca_file=rubbish))
