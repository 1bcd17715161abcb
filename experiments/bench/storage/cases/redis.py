"""What storage_bench measures of the Redis family: against a raw socket client on the same Valkey server.

The raw client sends one SET or GET after another, from and into the same buffers, which are used again in every round;
no header, no checksum, no batches. Ours moves the same payloads with a header that is made and checked.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

from experiments.bench.storage.case import Case
from lmcache.storage.backends.redis.backend import RedisBackend
from lmcache.storage.backends.redis.servers import RedisConfig
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer
from lmcache.storage.testing import make_key, take
from lmcache.testing.redis import RedisServer, valkey_binary

FLOOR = 0.8
LOOKUP_KEYS = 10_000


class RawClient:
    """The least that can be done with a socket."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 30.0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set(self, name: bytes, view: memoryview) -> None:
        start = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(view))
        parts = [memoryview(start), view, memoryview(b"\r\n")]
        while parts:
            sent = self._socket.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]
        assert self._socket.recv(16) == b"+OK\r\n"

    def get(self, name: bytes, view: memoryview) -> None:
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
        head, end = bytearray(len(b"$%d\r\n" % len(view))), bytearray(2)
        parts = [memoryview(head), view, memoryview(end)]
        while parts:
            got = self._socket.recvmsg_into(parts)[0]
            assert got
            while parts and got >= len(parts[0]):
                got -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][got:]
        assert head.startswith(b"$%d" % len(view))
        assert end == b"\r\n"

    def close(self) -> None:
        self._socket.close()


def cases() -> Iterator[Case]:
    """Nothing where there is no Valkey."""
    if (binary := valkey_binary()) is None:
        return
    yield from _transfers(binary, 1 << 20, 64)
    yield from _transfers(binary, 4 << 20, 16)
    yield _lookup(binary)


def _transfers(binary: str, nbytes: int, count: int) -> Iterator[Case]:
    server = RedisServer(binary)
    backend = RedisBackend(RedisConfig(url=f"valkey://127.0.0.1:{server.port}"))
    pool = PinnedPool(count * (nbytes + 4096))
    raw = RawClient(server.port)
    keys = [make_key(number) for number in range(count)]
    buffers: list[PoolBuffer] = []
    for number in range(count):
        buffer = take(pool, nbytes)
        buffer.view[:] = random.Random(number).randbytes(nbytes)
        buffers.append(buffer)
    names = [b"raw:%d" % number for number in range(count)]

    def set_raw() -> None:
        server.ask("UNLINK", *names)  # as put() is measured: of keys that are not there
        for name, buffer in zip(names, buffers, strict=True):
            raw.set(name, buffer.view)

    def get_raw() -> None:
        for name, buffer in zip(names, buffers, strict=True):
            raw.get(name, buffer.view)

    def put() -> None:
        backend.remove(keys)
        assert backend.put(keys, buffers) == count

    def get() -> None:
        assert backend.get(keys, buffers) == count

    def close() -> None:
        raw.close()
        backend.close()
        for buffer in buffers:
            buffer.release()
        pool.close()
        server.stop()

    size = f"{count} x {nbytes >> 20} MiB"
    floor = FLOOR if nbytes == 4 << 20 else None
    yield Case("valkey put", size, count * nbytes, put, set_raw, "raw socket SET", floor)
    yield Case("valkey get", size, count * nbytes, get, get_raw, "raw socket GET", floor, close=close)


def _lookup(binary: str) -> Case:
    server = RedisServer(binary)
    backend = RedisBackend(RedisConfig(url=f"valkey://127.0.0.1:{server.port}"))
    pool = PinnedPool(1 << 20)
    small = take(pool, 64)
    keys = [make_key(number) for number in range(LOOKUP_KEYS)]
    assert backend.put(keys, [small] * LOOKUP_KEYS) == LOOKUP_KEYS

    def look() -> None:
        assert backend.contains(keys) == LOOKUP_KEYS

    def close() -> None:
        backend.close()
        small.release()
        pool.close()
        server.stop()

    return Case("valkey lookup", f"{LOOKUP_KEYS} keys", 0, look, most_s=0.5, close=close)
