"""Keys, bytes and buffers for tests of storage."""

from __future__ import annotations

import random
from collections.abc import Callable

from lmcache.keys import DIGEST_BYTES, FINGERPRINT_BYTES, KEY_BYTES, TAGS_BYTES, ChunkKey, tenant_id
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer


def make_key(number: int, *, format: int = 0, tags: int = 0, tenant: str = "") -> ChunkKey:
    """A distinct key for every number, format, tag and tenant."""
    fingerprint = format.to_bytes(FINGERPRINT_BYTES, "big")
    namespace = fingerprint + tenant_id(tenant) + tags.to_bytes(TAGS_BYTES, "big")
    return ChunkKey(namespace, number.to_bytes(DIGEST_BYTES, "big"))


def similar_keys() -> list[ChunkKey]:
    """Keys that a place may mistake for each other: one bit apart, at every byte, or with parts in other places.

    The bits are those that tell letters of two cases, ASCII from the rest, and neighbours.
    """
    raw, half = random.Random(0).randbytes(KEY_BYTES), KEY_BYTES // 2
    keys = [raw, raw[half:] + raw[:half]]
    for at in range(len(raw)):
        keys += [raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :] for bit in (0x01, 0x20, 0x80)]
    return [ChunkKey.from_bytes(key) for key in keys]


def fill(buffer: PoolBuffer, seed: int) -> bytes:
    """Random bytes, the same for the same seed; returns a copy."""
    data = random.Random(seed).randbytes(buffer.nbytes)
    buffer.view[:] = data
    return data


def take(pool: PinnedPool, nbytes: int) -> PoolBuffer:
    """A buffer that the test knows to fit."""
    buffer = pool.allocate(nbytes)
    assert buffer is not None
    return buffer


class WatchedBuffer:
    """A handle that calls ``touched`` just before a backend gets at the bytes."""

    def __init__(self, buffer: PoolBuffer, touched: Callable[[], object]) -> None:
        self._buffer = buffer
        self._touched = touched
        self.nbytes = buffer.nbytes

    @property
    def view(self) -> memoryview:
        self._touched()
        return self._buffer.view

    @property
    def address(self) -> int:
        self._touched()
        return self._buffer.address

    @property
    def region(self) -> tuple[int, int]:
        return self._buffer.region

    def share(self) -> PoolBuffer:
        self._touched()
        return self._buffer.share()

    def release(self) -> None:
        self._buffer.release()
