"""NIXL's lines of storage_bench: chunk files against raw O_DIRECT on files of the same size."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.storage_case import Case
from lmcache.storage.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import make_key

CHUNK, COUNT = 4 << 20, 16
HEADER = 4096


def cases() -> Iterator[Case]:
    """Nothing where NIXL is not installed."""
    if importlib.util.find_spec("nixl") is not None:
        yield from _files()


def _files() -> Iterator[Case]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        backend = build_backend({"type": "nixl", "path": f"{folder}/kv"}, "bench")
        pool = PinnedPool((CHUNK + HEADER) * (COUNT + 1))
        buffers = [buffer for _ in range(COUNT) if (buffer := pool.allocate(CHUNK)) is not None]
        header = pool.allocate(HEADER)
        assert header is not None
        for number, buffer in enumerate(buffers):
            buffer.view[:] = os.urandom(1 << 20) * (CHUNK >> 20)
            buffer.view[0] = number
        keys = [make_key(number) for number in range(COUNT)]
        raw = [Path(folder) / f"{number}.raw" for number in range(COUNT)]

        def put() -> None:
            backend.remove(keys)
            assert backend.put(keys, buffers) == COUNT

        def get() -> None:
            assert backend.get(keys, buffers) == COUNT

        def transfer(flags: int, call: Callable[..., int]) -> None:
            for path, buffer in zip(raw, buffers, strict=True):
                if flags & os.O_CREAT:
                    path.unlink(missing_ok=True)
                file = os.open(path, flags | os.O_DIRECT, 0o600)
                assert call(file, [header.view, buffer.view], 0) == HEADER + CHUNK
                os.close(file)

        def write() -> None:
            transfer(os.O_WRONLY | os.O_CREAT, os.pwritev)

        def read() -> None:
            transfer(os.O_RDONLY, os.preadv)

        put()
        write()
        size = f"{COUNT} x 4 MiB"
        yield Case("nixl POSIX put", size, COUNT * CHUNK, put, write, "raw O_DIRECT write, one thread")
        yield Case("nixl POSIX get", size, COUNT * CHUNK, get, read, "raw O_DIRECT read, one thread")
        backend.close()
        for buffer in [*buffers, header]:
            buffer.release()
        pool.close()
