"""Bad input, slow and dying clients, limits: nothing harms the server, nothing leaks."""

from __future__ import annotations

import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_harness import CHUNK, KEYS, WAIT_S, data, eventually, get, in_use, log_in, put, resealed

from lmcache import metrics
from lmcache.errors import StorageError
from lmcache.server.config import ServerConfig
from lmcache.server.http import StatusPages
from lmcache.server.server import Server
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.protocol import MAX_HEAD_BYTES, PREFIX_BYTES, SEAL_BYTES, encode_frame, join_keys
from lmcache.storage.testing import make_key


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
    channel.send(encode_frame(protocol.Put(join_keys([make_key(0)]), [CHUNK], False), CHUNK + SEAL_BYTES))
    channel.send(data(0), bytes(SEAL_BYTES))
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
        put(connect(server), 0)
    for channel in channels:
        channel.close()
    eventually(lambda: server.stats()["connections"] == 0)
    assert put(connect(server), 0) == 1


def test_requests_without_room_are_refused_in_time_and_nothing_leaks(open_server: Any, connect: Any) -> None:
    server = open_server(busy_timeout_s=0.05)
    client = connect(server)
    put(client, 0)
    assert server._shared.budget.take(server._shared.budget.nbytes, 0)
    assert put(client, 1) == 0
    with pytest.raises(StorageError, match="busy"):
        get(client, 0)
    server._shared.budget.give(server._shared.budget.nbytes)
    assert get(client, 0) == [data(0)]


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
    "half a key": (encode_frame(protocol.Sizes(KEYS[:-1])), "80 bytes each"),
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
            channel.send(raw)
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
    slow.send(encode_frame(protocol.Sizes(KEYS))[:20])
    midway = log_in(server.port)
    midway.send(encode_frame(protocol.Put(KEYS, [CHUNK, CHUNK], False), 2 * (CHUNK + SEAL_BYTES)))
    midway.send(data(0))
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
        channel.send(encode_frame(protocol.Put(KEYS, [CHUNK, CHUNK], False), 2 * (CHUNK + SEAL_BYTES)))
        value = data(0) + protocol.seal(make_key(0), CHUNK, protocol.xxhash.xxh3_64_intdigest(data(0)))
        channel.send((value * 2)[:sent])
        if reset:
            channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        channel.close()
        eventually(lambda: server.stats()["connections"] == 0)
        assert (server._shared.budget.used, in_use(server)) == (0, 0)
    assert server.stats()["chunks"] <= 1, "what came whole may be held"


def test_slow_readers_of_pages_do_not_keep_others_out(open_server: Any) -> None:
    server = open_server()
    pages = StatusPages(server, "127.0.0.1", 0)
    stuck = [socket.create_connection(("127.0.0.1", pages.port)) for _ in range(4)]
    with urllib.request.urlopen(f"http://127.0.0.1:{pages.port}/health", timeout=WAIT_S) as page:
        assert page.status == 200
    for sock in stuck:
        sock.close()
    pages.close()
