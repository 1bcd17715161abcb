"""What every backend that keeps files must do where others can write: links, FIFOs, ... in the place of its files."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lmcache import metrics
from lmcache.errors import StorageError
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.naming import chunk_path
from lmcache.storage.testing import BackendTests, make_key, take

T = TypeVar("T")
CHUNK = 20_480
SIZE = HEADER_BYTES + CHUNK
SECRET = b"not a chunk " * 4000
KINDS = ["link", "dangling link", "link to a folder", "FIFO", "socket", "device", "folder", "full folder", "hard link"]
LEFT_ALONE = ("full folder",)
put, get = BackendTests.put, BackendTests.get


def plant(kind: str, at: Path, outside: Path) -> None:
    """Put something at a path, in place of what is there."""
    at.parent.mkdir(parents=True, exist_ok=True)
    at.unlink(missing_ok=True)
    if kind == "link":
        at.symlink_to(outside / "secret")
    elif kind == "dangling link":
        at.symlink_to(outside / "nothing")
    elif kind == "link to a folder":
        at.symlink_to(outside)
    elif kind == "FIFO":
        os.mkfifo(at)
    elif kind == "socket":
        os.mknod(at, stat.S_IFSOCK | 0o600)
    elif kind == "device":
        try:
            os.mknod(at, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("devices cannot be made here")
    elif kind == "hard link":
        os.link(outside / "secret", at)
    else:
        at.mkdir()
        if kind == "full folder":
            (at / "somebody's").write_text("file")


def within(seconds: float, call: Callable[[], T]) -> T:
    """``call()``, or a failure when it does not return."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it does not return"
    if errors:
        raise errors[0]
    return results[0]


def tree(folder: Path) -> dict[str, object]:
    """What is in a folder, with contents and times of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class OddFileTests:
    """Subclasses open their backend, on a folder that chunks lie in as ``layout.py`` says."""

    tier: str

    def open(self, path: Path, **options: Any) -> StorageBackend:
        raise NotImplementedError

    @pytest.fixture
    def pool(self) -> Iterator[PinnedPool]:
        pool = PinnedPool(4 << 20)
        yield pool
        assert pool.used_bytes == 0
        pool.close()

    @pytest.fixture
    def outside(self, tmp_path: Path) -> Iterator[Path]:
        """A folder of somebody else's, that must be as it was in the end."""
        folder = tmp_path / "outside"
        folder.mkdir()
        (folder / "secret").write_bytes(SECRET)
        os.utime(folder / "secret", ns=(10**18, 10**18))
        before = tree(folder)
        yield folder
        assert tree(folder) == before

    def odd(self) -> float:
        return metrics.CORRUPT_CHUNKS.labels(self.tier)._value.get()

    def put_again(self, backend: StorageBackend, pool: PinnedPool, number: int, kind: str) -> None:
        """A chunk in whose place something stood can be put, unless that stays."""
        buffer = take(pool, CHUNK)
        held = within(10, lambda: backend.put([make_key(number)], [buffer]))
        buffer.release()
        assert held == (kind not in LEFT_ALONE)
        if held:
            data = put(backend, pool, make_key(number), CHUNK, seed=number)
            backend.remove([make_key(number)])
            assert put(backend, pool, make_key(number), CHUNK, seed=number) == data
            assert within(10, lambda: get(backend, pool, make_key(number), CHUNK)) == data

    @pytest.mark.parametrize("reopen", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_in_the_place_of_a_chunk_it_is_a_miss_said_once(
        self,
        tmp_path: Path,
        outside: Path,
        pool: PinnedPool,
        caplog: pytest.LogCaptureFixture,
        kind: str,
        reopen: bool,
    ) -> None:
        backend = self.open(tmp_path / "kv")
        direct = getattr(backend, "direct", None)
        data = [put(backend, pool, make_key(n), CHUNK, seed=n) for n in range(2)]
        file = tmp_path / "kv" / chunk_path(make_key(1))
        plant(kind, file, outside)
        before = self.odd()
        if reopen:
            backend.close()
            backend = within(10, lambda: self.open(tmp_path / "kv"))
        for _ in range(3):
            assert within(10, lambda: get(backend, pool, make_key(1), CHUNK)) is None
            assert within(10, lambda: get(backend, pool, make_key(0), CHUNK)) == data[0], "the others are served"
        assert self.odd() == before + 1
        assert sum(record.levelno >= 30 for record in caplog.records) == 1
        assert os.path.lexists(file) == (kind in LEFT_ALONE)
        self.put_again(backend, pool, 1, kind)
        assert getattr(backend, "direct", None) == direct
        backend.close()

    @pytest.mark.parametrize("kind", KINDS)
    def test_where_a_chunk_is_to_be_written_it_is_replaced_or_stays(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, kind: str
    ) -> None:
        backend = self.open(tmp_path / "kv")
        data = put(backend, pool, make_key(0), CHUNK, seed=0)
        plant(kind, tmp_path / "kv" / chunk_path(make_key(1)), outside)
        assert within(10, lambda: backend.contains([make_key(1)])) == 0
        for _ in range(2):
            self.put_again(backend, pool, 1, kind)
        assert get(backend, pool, make_key(0), CHUNK) == data
        assert not list((tmp_path / "kv").rglob(".tmp-*"))
        backend.close()

    @pytest.mark.parametrize("kind", KINDS)
    def test_when_it_is_evicted_or_removed_nothing_else_is_touched(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, kind: str
    ) -> None:
        backend = self.open(tmp_path / "kv", capacity=3 * SIZE)
        for n in range(3):
            put(backend, pool, make_key(n), CHUNK, seed=n)
        for n in (0, 1):
            plant(kind, tmp_path / "kv" / chunk_path(make_key(n)), outside)
        assert within(10, lambda: backend.remove([make_key(1)])) == (kind not in LEFT_ALONE)
        data = {n: within(10, lambda n=n: put(backend, pool, make_key(n), CHUNK, seed=n)) for n in range(3, 8)}
        assert get(backend, pool, make_key(7), CHUNK) == data[7]
        within(10, backend.clear)
        backend.close()

    def test_a_copy_of_the_folder_made_of_hard_links_stays_whole(self, tmp_path: Path, pool: PinnedPool) -> None:
        backend = self.open(tmp_path / "kv", capacity=4 * SIZE)
        for n in range(4):
            put(backend, pool, make_key(n), CHUNK, seed=n)
        subprocess.run(["cp", "-al", tmp_path / "kv", tmp_path / "copy"], check=True)
        before = tree(tmp_path / "copy")
        for n in range(4, 10):
            data = put(backend, pool, make_key(n), CHUNK, seed=n)
            assert get(backend, pool, make_key(n), CHUNK) == data
        assert tree(tmp_path / "copy") == before
        shutil.rmtree(tmp_path / "kv")
        held = [n for n in range(4) if (tmp_path / "copy" / chunk_path(make_key(n))).exists()]
        assert len(held) >= 3
        copy = self.open(tmp_path / "copy")
        assert all(get(copy, pool, make_key(n), CHUNK) is not None for n in held), "its only names now"
        copy.close()
        backend.close()

    @pytest.mark.parametrize("level", [1, 2])
    @pytest.mark.parametrize("kind", ["link to a folder", "dangling link", "FIFO", "link"])
    def test_in_the_place_of_a_folder_it_leads_nowhere(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, level: int, kind: str
    ) -> None:
        backend = self.open(tmp_path / "kv")
        put(backend, pool, make_key(0), CHUNK, seed=0)
        backend.close()
        file = tmp_path / "kv" / chunk_path(make_key(0))
        folder = file.parents[2 - level]
        # Outside is a copy of what the folder was, and something that looks as if its writer had died.
        copied = outside if level == 2 else outside / file.parent.name
        shutil.copytree(file.parent, copied, dirs_exist_ok=True)
        (copied / ".tmp-999999999-abc-0").write_text("somebody's")
        before = tree(outside)
        shutil.rmtree(folder)
        plant(kind, folder, outside)
        backend = within(10, lambda: self.open(tmp_path / "kv"))
        assert within(10, lambda: get(backend, pool, make_key(0), CHUNK)) is None
        assert within(10, lambda: backend.remove([make_key(0)])) == 0
        assert within(10, backend.clear) == 0
        data = within(10, lambda: put(backend, pool, make_key(1), CHUNK, seed=1))
        assert get(backend, pool, make_key(1), CHUNK) == data
        assert not folder.is_symlink(), "a write makes the folder"
        assert tree(outside) == before
        backend.close()
        shutil.rmtree(outside)  # what the fixture compares
        outside.mkdir()
        (outside / "secret").write_bytes(SECRET)
        os.utime(outside / "secret", ns=(10**18, 10**18))

    @pytest.mark.parametrize("kind", KINDS)
    def test_among_unfinished_files_it_does_not_keep_the_tier_from_starting(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, kind: str
    ) -> None:
        backend = self.open(tmp_path / "kv")
        data = put(backend, pool, make_key(0), CHUNK, seed=0)
        backend.close()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        for folder in {(tmp_path / "kv" / chunk_path(make_key(0))).parent, *(tmp_path / "kv").glob(".writing")}:
            plant(kind, folder / f".tmp-{dead.pid}-abc-0", outside)
            os.utime(folder / f".tmp-{dead.pid}-abc-0", ns=(1, 1), follow_symlinks=False)
        os.utime(outside / "secret", ns=(10**18, 10**18))
        backend = within(10, lambda: self.open(tmp_path / "kv"))
        assert get(backend, pool, make_key(0), CHUNK) == data
        assert within(10, backend.clear) == 1
        backend.close()

    @pytest.mark.parametrize("reopen", [False, True])
    def test_what_cannot_be_removed_is_a_miss_too(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, reopen: bool
    ) -> None:
        backend = self.open(tmp_path / "kv")
        data = [put(backend, pool, make_key(n), CHUNK, seed=n) for n in range(3)]
        file = tmp_path / "kv" / chunk_path(make_key(1))
        plant("link", file, outside)
        damaged = tmp_path / "kv" / chunk_path(make_key(2))
        damaged.write_bytes(b"x" * SIZE)
        if subprocess.run(["chattr", "+i", file.parent], capture_output=True, check=False).returncode:
            pytest.skip("folders cannot be made immutable here")
        try:
            if reopen:
                backend.close()
                backend = self.open(tmp_path / "kv")
            for _ in range(3):
                assert [get(backend, pool, make_key(n), CHUNK) for n in range(3)] == [data[0], None, None]
        finally:
            subprocess.run(["chattr", "-i", file.parent], check=True)
        self.put_again(backend, pool, 1, "link")
        backend.close()

    def test_a_file_that_may_not_be_read_is_a_miss_and_no_failure(
        self, tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend, real = self.open(tmp_path / "kv"), os.open
        data = [put(backend, pool, make_key(n), CHUNK, seed=n) for n in range(2)]
        locked = (tmp_path / "kv" / chunk_path(make_key(1))).name

        def refused(path: str, *arguments: Any, **names: Any) -> int:
            if str(path).endswith(locked):
                raise PermissionError(13, "Permission denied")
            return real(path, *arguments, **names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refused)
            for _ in range(4):
                assert get(backend, pool, make_key(1), CHUNK) is None
                assert get(backend, pool, make_key(0), CHUNK) == data[0]
        assert sum(record.levelno >= 30 for record in caplog.records) == 1
        assert get(backend, pool, make_key(1), CHUNK) == data[1], "it was left alone"
        backend.close()

    def test_without_descriptors_it_says_so_and_goes_on_when_there_are_some(
        self, tmp_path: Path, pool: PinnedPool
    ) -> None:
        backend = self.open(tmp_path / "kv")
        data = put(backend, pool, make_key(0), CHUNK, seed=0)
        buffers = [take(pool, CHUNK) for _ in range(4)]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken: list[int] = []
        gc.collect()  # what other tests left open must not be closed meanwhile
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        try:
            for _ in range(5):
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(os.open("/dev/null", os.O_RDONLY))
                with pytest.raises(StorageError, match="Too many open files"):
                    backend.put([make_key(n) for n in range(1, 5)], buffers)
        finally:
            for file in taken:
                os.close(file)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert backend.put([make_key(n) for n in range(1, 5)], buffers) == 4
        for buffer in buffers:
            buffer.release()
        assert get(backend, pool, make_key(0), CHUNK) == data
        assert not list((tmp_path / "kv").rglob(".tmp-*"))
        backend.close()
