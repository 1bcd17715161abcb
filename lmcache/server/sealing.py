"""Seals are made and checked beside the thread that moves bytes: a hash costs a third of what loopback does."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import xxhash

from lmcache.errors import ClosedError
from lmcache.keys import ChunkKey
from lmcache.server.protocol import seal

INLINE_BYTES: Final = 128 << 10
"""Below this a hash takes less time than handing it over does."""


class Sealer:
    """At most ``threads`` hashes at a time, started when they are first needed. Thread-safe."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(min(threads, os.cpu_count() or 1), "lmcache-seal")

    def start(self, key: ChunkKey, payload: memoryview) -> Callable[[], bytes]:
        """Begin; what is returned waits for the seal. Whoever starts one waits for it, before ``payload`` changes."""
        if payload.nbytes < INLINE_BYTES:
            made = _seal(key, payload)
            return lambda: made
        try:
            return self._threads.submit(_seal, key, payload).result
        except RuntimeError as error:
            raise ClosedError("the client is closed") from error

    def close(self) -> None:
        self._threads.shutdown(wait=False)


def _seal(key: ChunkKey, payload: memoryview) -> bytes:
    return seal(key, payload.nbytes, xxhash.xxh3_64_intdigest(payload))
