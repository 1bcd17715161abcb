"""What test_gds.py runs beside a stand-in for libcuda.so.1: KvikIO's host path, against real files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.storage.backends.gds import GdsBackend
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, fill, make_key, take

if not os.environ.get("LMCACHE_TEST_GDS"):
    pytest.skip("run by test_gds.py", allow_module_level=True)

CHUNK = 20_000
put, get = BackendTests.put, BackendTests.get


def open_gds(path: Path, **options: Any) -> GdsBackend:
    backend = build_backend({"type": "gds", "path": str(path), **options}, "test")
    assert isinstance(backend, GdsBackend)
    return backend


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


class TestGds(BackendTests):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: open_gds(tmp_path / "kv")


def test_a_batch_is_read_at_once(tmp_path: Path, pool: PinnedPool) -> None:
    backend = open_gds(tmp_path)
    buffers = [take(pool, CHUNK + n) for n in range(40)]
    data = [fill(buffer, seed) for seed, buffer in enumerate(buffers)]
    keys = [make_key(n) for n in range(40)]
    assert backend.put(keys, buffers) == 40
    for buffer in buffers:
        buffer.view[:] = bytes(buffer.nbytes)
    assert backend.get(keys, buffers) == 40
    assert [bytes(buffer.view) for buffer in buffers] == data
    for buffer in buffers:
        buffer.release()


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("damage", ["cut", "grown", "header", "payload"])
def test_a_damaged_file_is_a_miss_counted_and_removed(
    tmp_path: Path, pool: PinnedPool, damage: str, reopen: bool
) -> None:
    backend = open_gds(tmp_path)
    put(backend, pool, make_key(1), CHUNK, seed=1)
    (file,) = tmp_path.rglob("*.kv")
    raw = bytearray(file.read_bytes())
    if damage in ("header", "payload"):
        raw[20 if damage == "header" else -1] ^= 1
    file.write_bytes({"cut": raw[:-1], "grown": raw + b"x"}.get(damage, raw))
    if reopen:
        backend = open_gds(tmp_path)
    before = metrics.CORRUPT_CHUNKS.labels("gds")._value.get()
    assert get(backend, pool, make_key(1), CHUNK) is None
    assert metrics.CORRUPT_CHUNKS.labels("gds")._value.get() == before + 1
    assert not file.exists()
    assert backend.used_bytes == 0


def test_capacity_holds_across_restarts_and_the_oldest_goes_first(tmp_path: Path, pool: PinnedPool) -> None:
    size = HEADER_BYTES + CHUNK
    backend = open_gds(tmp_path, capacity=3 * size)
    for n in range(3):
        put(backend, pool, make_key(n), CHUNK, seed=n)
    for n, file in enumerate(sorted(tmp_path.rglob("*.kv"))):
        os.utime(file, ns=(n, n))
    assert get(backend, pool, make_key(0), CHUNK) is not None  # used, so 1 is the oldest now
    backend = open_gds(tmp_path, capacity=3 * size)
    put(backend, pool, make_key(3), CHUNK, seed=3)
    assert [backend.contains([make_key(n)]) for n in range(4)] == [1, 0, 1, 1]
    assert len(list(tmp_path.rglob("*.kv"))) == 3


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path: Path, pool: PinnedPool) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return  # file systems cannot be mounted here; test_nixl.py says so
    try:
        backend = open_gds(folder)
        data = put(backend, pool, make_key(1), 100_000, seed=1)
        buffer = take(pool, 400_000)
        with pytest.raises(StorageError, match="No space left"):
            backend.put([make_key(2)], [buffer])
        buffer.release()
        assert not list(folder.rglob(".tmp-*"))
        assert get(backend, pool, make_key(1), 100_000) == data
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        open_gds(tmp_path / "file" / "kv")
