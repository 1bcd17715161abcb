"""Cases of storage_bench for object stores, against plain obstore with as many requests at once.

Both sides talk to one SeaweedFS on this machine, so a share says what our code adds and a rate says nothing of a cloud.
The raw side reads into obstore's own memory and goes no further; ours puts the bytes into the caller's buffers and
verifies them, and writes a header and never over another's chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore

from experiments.bench.storage.case import Case
from lmcache.keys import NAMESPACE_BYTES, ChunkKey
from lmcache.storage.backends.objects.backend import ObjectStoreBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.naming import chunk_path
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import fill, take
from lmcache.testing.objects import SeaweedFS, weed

BATCH_BYTES = 64 << 20
KEYS = 10_000
FLOOR = 0.85


def cases() -> Iterator[Case]:
    """Nothing where SeaweedFS is not installed."""
    if weed() is None:
        return
    with tempfile.TemporaryDirectory(prefix="lmcache-bench-", ignore_cleanup_errors=True) as folder:
        server = SeaweedFS(Path(folder))
        try:
            for nbytes, at_once in ((4 << 20, 4), (4 << 20, 8), (16 << 20, 2)):
                yield from _transfers(server, nbytes, at_once)
            yield _lookups(server)
        finally:
            server.kill()


def _transfers(server: SeaweedFS, nbytes: int, at_once: int) -> Iterator[Case]:
    count = BATCH_BYTES // nbytes
    options = server.options(f"bench-{nbytes}-{at_once}", concurrency=at_once, in_flight=BATCH_BYTES * 2)
    backend, store = build_backend(options, "bench"), server.store()
    pool, threads = PinnedPool(BATCH_BYTES), ThreadPoolExecutor(at_once)
    buffers = [take(pool, nbytes) for _ in range(count)]
    for number, buffer in enumerate(buffers):
        fill(buffer, number)
    # Bare objects are as long as ours, header included.
    content = memoryview(bytes(HEADER_BYTES) + bytes(buffers[0].view))
    serial = itertools.count()

    def new_keys() -> list[ChunkKey]:
        return [_key(next(serial)) for _ in range(count)]

    def raw(call: Callable[[str], object], names: list[str]) -> None:
        for _ in threads.map(call, names):
            pass

    def put_raw(name: str) -> None:
        obstore.put(store, name, content, use_multipart=False)

    def close() -> None:
        threads.shutdown()
        backend.close()
        for buffer in buffers:
            buffer.release()
        pool.close()

    size = f"{count} x {nbytes >> 20} MiB, {at_once} at once"
    yield Case(
        "object store put",
        size,
        BATCH_BYTES,
        lambda: backend.put(new_keys(), buffers),
        lambda: raw(put_raw, [f"raw/{next(serial)}" for _ in range(count)]),
        "obstore put",
        FLOOR,
    )
    keys = new_keys()
    assert backend.put(keys, buffers) == count
    prefix = f"bench-{nbytes}-{at_once}"
    yield Case(
        "object store get",
        size,
        BATCH_BYTES,
        lambda: backend.get(keys, buffers),
        lambda: raw(lambda name: obstore.get(store, name).bytes(), [f"{prefix}/{chunk_path(key)}" for key in keys]),
        "obstore get",
        FLOOR,
        close=close,
    )


def _lookups(server: SeaweedFS) -> Case:
    """Cold lookups: each forgets what it knew. One HEAD after the other would be the other way."""
    pool = PinnedPool(1 << 20)
    backend = build_backend(server.options("bench-keys"), "bench")
    assert isinstance(backend, ObjectStoreBackend)
    buffer, keys = take(pool, 16), [_key(number) for number in range(KEYS)]
    assert backend.put(keys, [buffer] * KEYS) == KEYS
    buffer.release()
    pool.close()

    def run() -> None:
        backend._index.clear()
        assert backend.contains(keys) == KEYS

    return Case("object store lookup", f"{KEYS} keys, cold", 0, run, most_s=5.0, close=backend.close, repeats=5)


def _key(number: int) -> ChunkKey:
    return ChunkKey(bytes(NAMESPACE_BYTES), hashlib.blake2b(number.to_bytes(8, "big"), digest_size=32).digest())
