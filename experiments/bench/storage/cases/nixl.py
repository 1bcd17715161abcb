"""NIXL's lines of storage_bench: chunk files against raw O_DIRECT on files of the same size, and objects of one
SeaweedFS against the bare agent on as many objects, without header, checksum or copy.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ByteSize, SecretStr

from experiments.bench.storage.case import Case
from lmcache.storage.backends.nixl.agent import Agent
from lmcache.storage.backends.nixl.backend import NixlBackend, NixlConfig, object_parameters
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import fill, make_key, take

CHUNK, COUNT = 4 << 20, 16
HEADER = 4096


def cases() -> Iterator[Case]:
    """Nothing where NIXL is not installed."""
    if importlib.util.find_spec("nixl") is not None:
        import nixl  # noqa: F401  # it sets its logger up, which writes to standard output

        logging.getLogger("nixl").setLevel(logging.WARNING)
        yield from _files()
        yield from _objects()


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


def _objects() -> Iterator[Case]:
    from lmcache.testing.objects import ACCESS_KEY, SECRET_KEY, SeaweedFS, weed

    if weed() is None:
        return
    with tempfile.TemporaryDirectory(prefix="lmcache-bench-", ignore_cleanup_errors=True) as folder:
        server = SeaweedFS(Path(folder))
        config = NixlConfig(
            plugin="OBJ",
            path=Path(folder) / "index",
            bucket=server.bucket,
            endpoint=server.endpoint,
            access_key=ACCESS_KEY,
            secret_key=SecretStr(SECRET_KEY),
            staging=ByteSize(COUNT * (CHUNK + HEADER)),
        )
        backend, agent = NixlBackend(config), Agent("OBJ", object_parameters(config))
        pool = PinnedPool(COUNT * CHUNK)
        buffers = [take(pool, CHUNK) for _ in range(COUNT)]
        for number, buffer in enumerate(buffers):
            fill(buffer, number)
        keys, names = [make_key(number) for number in range(COUNT)], [f"raw/{number}" for number in range(COUNT)]
        memory = [(buffer.address, CHUNK, 0) for buffer in buffers]

        def put() -> None:
            backend.clear()
            assert backend.put(keys, buffers) == COUNT

        def get() -> None:
            assert backend.get(keys, buffers) == COUNT

        def move(operation: str) -> None:
            with agent.registrations.of(buffers):
                remote = [(0, CHUNK, number + 1) for number in range(COUNT)]
                assert agent.begin(operation, memory, remote, names).wait(60.0)

        def write() -> None:
            with agent.registrations.of(buffers):
                for name in names:  # as put() is measured: a byte to each of those that go
                    agent.begin("WRITE", [(buffers[0].address, 1, 0)], [(0, 1, 1)], [name]).wait(60.0)
            move("WRITE")

        put()
        write()
        size, nbytes = f"{COUNT} x {CHUNK >> 20} MiB", COUNT * CHUNK
        yield Case("nixl OBJ put", size, nbytes, put, write, "bare NIXL agent")
        yield Case("nixl OBJ get", size, nbytes, get, lambda: move("READ"), "bare NIXL agent")
        backend.close()
        agent.close()
        for buffer in buffers:
            buffer.release()
        pool.close()
        server.kill()
