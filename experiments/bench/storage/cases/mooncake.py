"""Mooncake's lines of storage_bench: ours and the bare client against one master, the memory in a second process.

Its data ports listen on every address, so all of it runs in a network namespace that has loopback only. The bare client
moves the same payloads from and into the same registered memory, without header, checksum or lookup.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.bench.storage.case import Case
from lmcache.errors import ConfigError
from lmcache.storage.backends.mooncake import MooncakeBackend, MooncakeConfig
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import fill, make_key, take
from lmcache.testing.mooncake import MooncakeMaster, MooncakeOwner

CHUNK, COUNT = 4 << 20, 16
PORT = 15051
_CLONE_NEWNET = 0x40000000


def cases() -> Iterator[Case]:
    try:
        from mooncake.store import MooncakeDistributedStore  # noqa: F401
    except ImportError as error:
        raise FileNotFoundError(f"no Mooncake client: {error}") from error
    with (
        _loopback_only(),
        tempfile.TemporaryDirectory(prefix="lmcache-bench-") as folder,
        MooncakeMaster(PORT, Path(folder)),
        MooncakeOwner(PORT, segment=512 << 20),
    ):
        yield from _transfers()


def _transfers() -> Iterator[Case]:
    from mooncake.store import MooncakeDistributedStore

    backend = MooncakeBackend(MooncakeConfig(url=f"mooncake://127.0.0.1:{PORT}"))
    bare = MooncakeDistributedStore()
    if bare.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", f"127.0.0.1:{PORT}"):
        raise ConfigError("the bare client cannot be set up")
    pool = PinnedPool(CHUNK * COUNT)
    buffers = [take(pool, CHUNK) for _ in range(COUNT)]
    for number, buffer in enumerate(buffers):
        fill(buffer, number)
    assert bare.register_buffer(*buffers[0].region) == 0
    keys, names = [make_key(number) for number in range(COUNT)], [f"raw/{number}" for number in range(COUNT)]
    addresses, sizes = [buffer.address for buffer in buffers], [CHUNK] * COUNT

    def put() -> None:
        backend.remove(keys)
        assert backend.put(keys, buffers) == COUNT

    def get() -> None:
        assert backend.get(keys, buffers) == COUNT

    def put_raw() -> None:
        bare.batch_remove(names, True)
        assert set(bare.batch_put_from(names, addresses, sizes)) == {0}

    def get_raw() -> None:
        assert bare.batch_get_into(names, addresses, sizes) == sizes

    def put_singly() -> None:
        bare.batch_remove(names, True)
        for name, address in zip(names, addresses, strict=True):
            assert bare.put_from(name, address, CHUNK) == 0

    def get_singly() -> None:
        for name in names:
            assert bare.get_buffer(name).size() == CHUNK

    def close() -> None:
        backend.close()
        bare.close()
        for buffer in buffers:
            buffer.release()
        pool.close()

    put_raw()
    put()
    size, nbytes = f"{COUNT} x {CHUNK >> 20} MiB", COUNT * CHUNK
    lines: list[tuple[str, Callable[[], None], Callable[[], None], str]] = [
        ("mooncake put", put, put_raw, "bare client, batch_put_from"),
        ("mooncake put", put, put_singly, "bare client, put_from one by one"),
        ("mooncake get", get, get_raw, "bare client, batch_get_into"),
        ("mooncake get", get, get_singly, "bare client, get_buffer one by one"),
    ]
    for name, run, limit, limit_name in lines[:-1]:
        yield Case(name, size, nbytes, run, limit, limit_name)
    name, run, limit, limit_name = lines[-1]
    yield Case(name, size, nbytes, run, limit, limit_name, close=close)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """This thread, and whatever it starts, in a network namespace of its own. FileNotFoundError where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET):
            raise FileNotFoundError(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            libc.setns(before, _CLONE_NEWNET)
    finally:
        os.close(before)
