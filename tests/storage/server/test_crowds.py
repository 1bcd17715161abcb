"""Clients that say little, or read nothing, keep nobody else out."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from server_harness import WAIT_S, data, eventually, get, log_in, put

from lmcache.errors import ConfigError
from lmcache.server import http as pages_module
from lmcache.server.http import StatusPages
from lmcache.server.limits import Budget
from lmcache.server.server import Server
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.channel import Channel
from lmcache.storage.backends.lm.protocol import SEAL_BYTES, encode_frame, join_keys
from lmcache.storage.testing import make_key

MIB = 1 << 20


@pytest.fixture
def pages(open_server: Any) -> Iterator[StatusPages]:
    pages = StatusPages(open_server(), "127.0.0.1", 0)
    yield pages
    pages.close()


@contextlib.contextmanager
def dripping(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many connections over which a byte of an endless head comes now and then."""
    stop = threading.Event()
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for sock in socks:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: ")

    def drip() -> None:
        while not stop.wait(0.1):
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield socks
    finally:
        stop.set()
        thread.join()
        for sock in socks:
            sock.close()


@pytest.mark.parametrize("count", [8, 100])
def test_clients_that_drip_bytes_do_not_keep_probes_out(pages: StatusPages, count: int) -> None:
    with dripping(pages.port, count):
        for _ in range(5):
            for path in ("health", "metrics"):
                with urllib.request.urlopen(f"http://127.0.0.1:{pages.port}/{path}", timeout=WAIT_S) as page:
                    assert page.status == 200
        assert len(pages._open) <= pages_module.CONNECTIONS


def test_a_request_has_a_deadline_as_a_whole(pages: StatusPages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "REQUEST_S", 0.5)
    with dripping(pages.port, 3) as socks:
        for sock in socks:
            sock.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        eventually(lambda: not pages._open)


def test_head_is_answered_without_a_body(pages: StatusPages) -> None:
    for path, status in (("/health", 200), ("/metrics", 200), ("/nothing", 404)):
        connection = http.client.HTTPConnection("127.0.0.1", pages.port, timeout=WAIT_S)
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (status, b"")
        assert int(answer.headers["Content-Length"]) > 0
        connection.close()


def test_closing_ends_open_connections(open_server: Any) -> None:
    pages = StatusPages(open_server(), "127.0.0.1", 0)
    with dripping(pages.port, 3) as socks:
        eventually(lambda: len(pages._open) == 3)
        began = time.monotonic()
        pages.close()
        assert time.monotonic() - began < WAIT_S
        for sock in socks:
            sock.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""


def test_an_answer_that_nobody_reads_has_a_deadline(pages: StatusPages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "REQUEST_S", 0.5)
    monkeypatch.setattr(StatusPages, "_page", lambda *_: (200, "text/plain", bytes(64 << 20)))
    with socket.create_connection(("127.0.0.1", pages.port)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        eventually(lambda: len(pages._open) == 1)
        eventually(lambda: not pages._open)


def test_pages_answer_over_ipv6_and_an_address_that_is_taken_is_an_error(open_server: Any) -> None:
    server = open_server()
    pages = StatusPages(server, "::1", 0)
    with urllib.request.urlopen(f"http://[::1]:{pages.port}/health", timeout=WAIT_S) as page:
        assert page.status == 200
    with pytest.raises(ConfigError, match=f"cannot listen on ::1:{pages.port}: .*in use"):
        StatusPages(server, "::1", pages.port)
    pages.close()
    pages.close()


@pytest.fixture
def server(open_server: Any, connect: Any) -> Server:
    """With 16 MiB for requests under way, and 12 chunks of 1 MiB, and a small one."""
    memory = {"capacity": "64MiB", "huge_pages": False}
    server: Server = open_server(busy_timeout_s=6.0, storage={"memory": memory})  # on a busy machine 2 s are not enough
    client = connect(server)
    chunks = range(100, 112)
    assert client.put([make_key(n) for n in chunks], [memoryview(data(n, MIB)) for n in chunks]) == 12
    assert put(client, 0) == 1
    return server


@contextlib.contextmanager
def stuck(server: Server, count: int, what: str) -> Iterator[list[Channel]]:
    """So many clients that ask for all chunks and never read, or announce some and send nothing of them."""
    keys = join_keys([make_key(n) for n in range(100, 112)])
    fresh = join_keys([make_key(n) for n in range(200, 212)])
    channels = []
    for number in range(count):
        channels.append(log_in(server.port))
        channels[-1]._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if what == "readers":
            channels[-1].send_frame(protocol.Get(keys, [MIB] * 12))
        else:
            size = 3 * MIB
            channels[-1].send(encode_frame(protocol.Put(fresh, [size] * 12, False), 12 * (size + SEAL_BYTES)))
        eventually(lambda n=number: len(server._shared.budget._held) > n or server._shared.budget.used > 12 * MIB)
    try:
        yield channels
    finally:
        for channel in channels:
            channel.close()
        eventually(lambda: server._shared.budget.used == 0)


@pytest.mark.parametrize("what", ["readers", "writers"])
@pytest.mark.parametrize("count", [2, 24])
def test_clients_that_are_stuck_do_not_keep_others_waiting(server: Server, connect: Any, count: int, what: str) -> None:
    client = connect(server)
    with stuck(server, count, what):
        used = server._shared.budget.used
        if count == 2:
            assert used <= server._shared.budget.nbytes // 2
            assert server.stats()["connections"] >= count
        for _ in range(3):
            assert get(client, 0) == [data(0)]
        into = bytearray(MIB)
        assert client.get([make_key(100)], [memoryview(into)]) == 1
        assert into == data(100, MIB)
        assert put(client, 1) == 1


def test_one_holder_takes_half_of_a_budget_and_then_its_share() -> None:
    class Client:
        crawls = False

        def cut_off(self) -> None:
            raise AssertionError("it does not crawl")

    budget, one, two, three = Budget(16), Client(), Client(), Client()
    assert budget.take(5, 0, one)
    assert budget.take(3, 0, one)
    assert not budget.take(1, 0, one), "what is left is for others"
    assert budget.take(2, 0, two)
    assert budget.take(2, 0, two)
    assert not budget.take(1, 0, two)
    assert budget.take(4, 0, three)
    assert not budget.take(1, 0)
    budget.give(8, one)
    assert budget.take(8, 0, one)
    for holder, nbytes in ((one, 8), (two, 4), (three, 4)):
        budget.give(nbytes, holder)
    assert budget.used == 0
    assert not budget._held
