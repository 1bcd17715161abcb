"""What the tests of the server share."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

from managers import settle

from lmcache.server.server import Server
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.channel import Channel
from lmcache.storage.backends.lm.client import Client
from lmcache.storage.backends.lm.protocol import join_keys
from lmcache.storage.testing import make_key

CHUNK = 100_000
WAIT_S = 20.0


def eventually(condition: Callable[[], bool]) -> None:
    settle(condition, "it never comes true")


def data(seed: int, nbytes: int = CHUNK) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def put(client: Client, *numbers: int) -> int:
    return client.put([make_key(n) for n in numbers], [memoryview(data(n)) for n in numbers])


def get(client: Client, *numbers: int) -> list[bytes]:
    into = [bytearray(CHUNK) for _ in numbers]
    count = client.get([make_key(n) for n in numbers], [memoryview(b) for b in into])
    return [bytes(b) for b in into[:count]]


def in_use(server: Server) -> int:
    """Bytes of buffers that hold no chunk."""
    held = sum(-(-b.nbytes // 4096) * 4096 for b in server._shared.store._memory._buffers.values())
    return server._shared.store.pool.used_bytes - held


KEYS = join_keys([make_key(0), make_key(1)])


def log_in(port: int) -> Channel:
    channel = Channel(socket.create_connection(("127.0.0.1", port)))
    channel.start(WAIT_S)
    channel.receive_frame(protocol.HELLO, 1024)
    channel.send_frame(protocol.Login(bytes(32), b""))
    channel.receive_frame(protocol.WELCOME, 1024)
    return channel


def resealed(
    head: bytes, payload_bytes: int = 0, version: int = protocol.VERSION, head_bytes: int | None = None
) -> bytes:
    fields = protocol._FIELDS.pack(
        b"LMCS", version, 0, len(head) if head_bytes is None else head_bytes, 0, payload_bytes
    )
    return fields + protocol._CHECKSUM.pack(protocol.xxhash.xxh3_64_intdigest(fields + head)) + head


def value(n: int) -> bytes:
    return data(n) + protocol.seal(make_key(n), CHUNK, protocol.xxhash.xxh3_64_intdigest(data(n)))
