"""A folder that hosts share, and the place that holds nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from in_files import InFiles

from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.keys import NAMESPACE_BYTES, ChunkKey
from lmcache.storage.backends.blackhole import BlackholeBackend
from lmcache.storage.backends.fs import SharedFolderBackend
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, fill, make_key, take

put, get = BackendTests.put, BackendTests.get
ROOT = Path(__file__).resolve().parents[3]
CHUNK = 20_000


def open_folder(path: Path, **options: Any) -> SharedFolderBackend:
    backend = build_backend({"type": "remote", "url": f"fs://{path}", **options}, "test")
    assert isinstance(backend, SharedFolderBackend)
    return backend


class TestSharedFolder(InFiles):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: open_folder(tmp_path / "kv")

    @pytest.fixture
    def open_small_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: open_folder(tmp_path / "small", capacity=1 << 20)


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


def corrupt_count() -> float:
    return metrics.CORRUPT_CHUNKS.labels("shared_folder")._value.get()


DAMAGE: dict[str, Callable[[bytearray], bytes]] = {
    "empty header": lambda raw: bytes(raw[:HEADER_BYTES]),
    "one byte": lambda raw: b"x",
    "truncated by a byte": lambda raw: bytes(raw[:-1]),
    "half": lambda raw: bytes(raw[: len(raw) // 2]),
    "longer": lambda raw: bytes(raw) + b"x",
    "zeros": lambda raw: bytes(len(raw)),
    "bit in the header": lambda raw: bytes([raw[0] ^ 1]) + bytes(raw[1:]),
    "bit in the payload": lambda raw: bytes(raw[:-1]) + bytes([raw[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_counted_and_removed(tmp_path: Path, pool: PinnedPool, damage: str) -> None:
    folder = open_folder(tmp_path)
    put(folder, pool, make_key(1), CHUNK, seed=1)
    file = folder._path(make_key(1))
    file.write_bytes(DAMAGE[damage](bytearray(file.read_bytes())))
    before = corrupt_count()
    folder.sizes([make_key(1)])
    assert get(folder, pool, make_key(1), CHUNK) is None
    assert not file.exists()
    assert corrupt_count() == before + 1
    data = put(folder, pool, make_key(1), CHUNK, seed=1)
    assert get(folder, pool, make_key(1), CHUNK) == data


def test_asking_for_a_wrong_length_does_not_remove_a_good_file(tmp_path: Path, pool: PinnedPool) -> None:
    folder = open_folder(tmp_path)
    data = put(folder, pool, make_key(1), CHUNK, seed=1)
    assert get(folder, pool, make_key(1), CHUNK - 1) is None
    assert get(folder, pool, make_key(1), CHUNK) == data


def test_hosts_see_what_others_write_and_remove_at_once(tmp_path: Path, pool: PinnedPool) -> None:
    one, two = open_folder(tmp_path), open_folder(tmp_path)
    data = put(one, pool, make_key(1), CHUNK, seed=1)
    assert two.sizes([make_key(1)]) == [CHUNK]
    assert get(two, pool, make_key(1), CHUNK) == data
    assert two.remove([make_key(1)]) == 1
    assert one.contains([make_key(1)]) == 0
    assert get(one, pool, make_key(1), CHUNK) is None


def test_many_keys_are_looked_up_by_one_listing(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, count = open_folder(tmp_path), 500
    buffer = take(pool, 16)
    keys = [
        ChunkKey(bytes(NAMESPACE_BYTES), hashlib.blake2b(bytes([n % 256, n // 256]), digest_size=32).digest())
        for n in range(count)
    ]
    assert folder.put(keys, [buffer] * count) == count
    buffer.release()
    asked: list[ChunkKey] = []
    stat = folder._stat
    monkeypatch.setattr(folder, "_stat", lambda key: asked.append(key) or stat(key))
    assert folder.sizes(keys) == [16] * count
    assert len(asked) == 64
    for gone in (499, 300, 64, 63, 0):
        folder.remove([keys[gone]])
        assert folder.contains(keys) == gone


def test_a_capacity_removes_the_least_recently_used(tmp_path: Path, pool: PinnedPool) -> None:
    size = HEADER_BYTES + CHUNK
    folder = open_folder(tmp_path, capacity=4 * size)
    for n in range(3):
        put(folder, pool, make_key(n), CHUNK, seed=n)
        os.utime(folder._path(make_key(n)), ns=(n, n))
    assert get(folder, pool, make_key(0), CHUNK) is not None  # used, so 1 is the oldest now
    put(folder, pool, make_key(3), CHUNK, seed=3)
    assert [folder.contains([make_key(n)]) for n in range(4)] == [1, 0, 1, 1]
    folder = open_folder(tmp_path, capacity=size)
    assert len(list(tmp_path.rglob("*.kv"))) == 1
    buffer = take(pool, 2 * CHUNK)
    assert folder.put([make_key(9)], [buffer]) == 0  # larger than the capacity
    buffer.release()


def test_old_unfinished_files_are_removed_and_others_are_left_alone(tmp_path: Path, pool: PinnedPool) -> None:
    put(open_folder(tmp_path), pool, make_key(1), CHUNK, seed=1)
    old, new = tmp_path / ".writing" / "host-1-0", tmp_path / ".writing" / "host-2-0"
    mine = [tmp_path / "notes.txt", tmp_path / "00" / "x.kv", tmp_path / "00" / "00" / "y.kv"]
    mine[2].parent.mkdir(parents=True)
    for file in (old, new, *mine):
        file.write_text("mine")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    folder = open_folder(tmp_path)
    assert not old.exists()
    assert new.exists()
    assert folder.clear() == 1
    assert all(file.read_text() == "mine" for file in mine)


WRITER = """
import sys
from lmcache.storage.registry import build_backend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import fill, make_key
folder = build_backend({"type": "remote", "url": "fs://" + sys.argv[1]}, "x"); pool = PinnedPool(1 << 20)
buffer = pool.allocate(300_000)
for n in range(10**9):
    fill(buffer, n % 8); folder.remove([make_key(n % 8)]); folder.put([make_key(n % 8)], [buffer])
    print(n, flush=True)
"""


def test_sigkill_of_a_writer_leaves_only_whole_chunks(tmp_path: Path, pool: PinnedPool) -> None:
    for turns in (1, 5, 12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        for _ in range(turns):
            last = int(writer.stdout.readline())
        writer.kill()
        writer.wait()
        writer.stdout.close()
        before = corrupt_count()
        folder = open_folder(tmp_path)
        buffer = take(pool, 300_000)
        for n in range(8):
            expected = fill(buffer, n)
            assert get(folder, pool, make_key(n), 300_000) in (None, expected)
        buffer.release()
        assert corrupt_count() == before
        assert last >= turns - 1


@pytest.mark.parametrize("url", ["fs://host/path", "fs://", "fs:///", "fs:relative://x"])
def test_a_url_without_a_folder_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        build_backend({"type": "remote", "url": url}, "test")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file/kv"):
        open_folder(tmp_path / "file" / "kv")


def test_a_folder_that_turns_into_something_else_is_an_error_on_writing(tmp_path: Path, pool: PinnedPool) -> None:
    folder = open_folder(tmp_path / "kv")
    (tmp_path / "kv" / ".writing").rmdir()
    buffer = take(pool, CHUNK)
    with pytest.raises(StorageError, match="cannot write"):
        folder.put([make_key(1)], [buffer])
    buffer.release()
    assert get(folder, pool, make_key(1), CHUNK) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(small_disk: Path, pool: PinnedPool) -> None:
    folder = open_folder(small_disk)
    data = put(folder, pool, make_key(1), 100_000, seed=1)
    buffer = take(pool, 400_000)
    with pytest.raises(StorageError, match="No space left"):
        folder.put([make_key(2)], [buffer])
    buffer.release()
    assert not list((small_disk / ".writing").iterdir())
    assert get(folder, pool, make_key(1), 100_000) == data


def test_the_blackhole_takes_everything_and_has_nothing(pool: PinnedPool) -> None:
    hole = build_backend({"type": "remote", "url": "blackhole://"}, "test")
    assert isinstance(hole, BlackholeBackend)
    buffer = take(pool, CHUNK)
    assert hole.put([make_key(1)], [buffer]) == 0
    assert (hole.contains([make_key(1)]), hole.get([make_key(1)], [buffer]), hole.remove([make_key(1)])) == (0, 0, 0)
    assert hole.clear() == 0
    hole.close()
    buffer.release()
