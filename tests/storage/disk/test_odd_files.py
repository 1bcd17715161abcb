"""Files that are not what they should be, in every backend that keeps files; see odd_file_tests.py."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from managers import Open, keys, open_manager, read, store
from odd_file_tests import CHUNK, KINDS, SECRET, SIZE, OddFileTests, get, plant, put, tree, within

from lmcache.errors import ConfigError
from lmcache.storage.backends.disk import account as disk_account
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.backends.disk.folder import Folder, Spare
from lmcache.storage.base import StorageBackend
from lmcache.storage.files import chunk_files
from lmcache.storage.files.journal import Journal
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import make_key, take

__all__ = ["open_manager"]


def open_disk(path: Path, **options: Any) -> DiskBackend:
    return DiskBackend(DiskConfig(path=path, **options))


class TestDisk(OddFileTests):
    tier = "disk"

    def open(self, path: Path, **options: Any) -> StorageBackend:
        return open_disk(path, **options)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_takes_a_victims_place_before_it_is_written_over_is_not(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        disk, real = open_disk(tmp_path / "kv", capacity=SIZE), Folder.take
        put(disk, pool, make_key(1), CHUNK, seed=1)
        swapped = []

        def swap(self: Folder, *arguments: Any) -> Spare | None:
            spare = real(self, *arguments)
            assert spare is not None
            (file,) = (tmp_path / "kv").rglob(".tmp-*")
            plant(kind, file, outside)
            swapped.append(file)
            return spare

        monkeypatch.setattr(Folder, "take", swap)
        data = within(10, lambda: put(disk, pool, make_key(2), CHUNK, seed=2))
        assert get(disk, pool, make_key(2), CHUNK) == data
        assert swapped
        disk.close()

    def test_another_file_in_a_victims_place_is_not_written_over(
        self, tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk, real = open_disk(tmp_path / "kv", capacity=SIZE), Folder.take
        put(disk, pool, make_key(1), CHUNK, seed=1)
        (tmp_path / "mine").write_bytes(SECRET)
        mine = (tmp_path / "mine").open("rb")

        def swap(self: Folder, *arguments: Any) -> Spare | None:
            spare = real(self, *arguments)
            (file,) = (tmp_path / "kv").rglob(".tmp-*")
            (tmp_path / "mine").rename(file)
            return spare

        monkeypatch.setattr(Folder, "take", swap)
        data = put(disk, pool, make_key(2), CHUNK, seed=2)
        assert get(disk, pool, make_key(2), CHUNK) == data
        assert mine.read() == SECRET
        mine.close()
        disk.close()

    def test_another_users_file_is_not_written_over(self, tmp_path: Path, pool: PinnedPool) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        disk = open_disk(tmp_path / "kv", capacity=SIZE)
        put(disk, pool, make_key(1), CHUNK, seed=1)
        file = disk.file_of(make_key(1))
        os.chown(file, 65534, 65534)
        with file.open("rb") as opened:
            before = opened.read()
            data = put(disk, pool, make_key(2), CHUNK, seed=2)
            opened.seek(0)
            assert opened.read() == before
        assert get(disk, pool, make_key(2), CHUNK) == data
        disk.close()

    def test_a_chunk_that_cannot_be_removed_is_passed_over(self, tmp_path: Path, pool: PinnedPool) -> None:
        disk = open_disk(tmp_path / "kv", capacity=3 * SIZE)
        data = [put(disk, pool, make_key(n), CHUNK, seed=n) for n in range(3)]
        file = disk.file_of(make_key(0))
        if subprocess.run(["chattr", "+i", file], capture_output=True, check=False).returncode:
            pytest.skip("files cannot be made immutable here")
        try:
            for n in range(3, 8):
                data.append(put(disk, pool, make_key(n), CHUNK, seed=n))
                assert get(disk, pool, make_key(n), CHUNK) == data[n]
            assert get(disk, pool, make_key(0), CHUNK) == data[0]
            assert disk.used_bytes <= 3 * SIZE
        finally:
            subprocess.run(["chattr", "-i", file], check=True)
        disk.close()

    def test_a_probe_is_a_new_file(self, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The names of temporary files can be foreseen by who has seen one."""
        plant("link", tmp_path / "kv" / ".tmp-1-abc-0", outside)
        monkeypatch.setattr(chunk_files, "temporary_name", lambda: ".tmp-1-abc-0")
        with pytest.raises(ConfigError, match="cannot write to"):
            open_disk(tmp_path / "kv")

    @pytest.mark.parametrize("kind", KINDS)
    def test_in_the_place_of_the_account_it_is_replaced_or_left_alone(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        plant(kind, tmp_path / "kv" / disk_account.NAME, outside)
        disks = [within(10, lambda: open_disk(tmp_path / "kv", capacity=3 * SIZE)) for _ in range(2)]
        for n in range(6):
            put(disks[n % 2], pool, make_key(n), CHUNK, seed=n)
        if kind != "folder" and kind != "full folder":
            assert disks[0].used_bytes == disks[1].used_bytes == 3 * SIZE
        for disk in disks:
            disk.close()

    @pytest.mark.parametrize("change", ["linked", "removed", "replaced"])
    def test_processes_that_have_the_account_open_go_on_to_share_one(
        self, tmp_path: Path, pool: PinnedPool, change: str
    ) -> None:
        one, two = open_disk(tmp_path / "kv", capacity=9 * SIZE), open_disk(tmp_path / "kv", capacity=9 * SIZE)
        put(one, pool, make_key(0), CHUNK, seed=0)
        put(two, pool, make_key(1), CHUNK, seed=1)
        account, copy = tmp_path / "kv" / disk_account.NAME, tmp_path / "copy"
        if change == "linked":
            os.link(account, copy)
        else:
            account.rename(copy)
            if change == "replaced":
                shutil.copy(copy, account)
        before = copy.read_bytes()
        for n in range(2, 6):
            put((one, two)[n % 2], pool, make_key(n), CHUNK, seed=n)
            assert (one, two)[n % 2].used_bytes == (n + 1) * SIZE
        assert copy.read_bytes() == before
        one.close()
        two.close()

    def test_a_batch_that_lacks_descriptors_for_some_is_not_called_full(
        self, tmp_path: Path, open_manager: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        disk, real = open_disk(tmp_path / "kv", threads=1), os.open
        manager = open_manager(disk, retry__attempts=1)

        def some(path: str, flags: int, *arguments: Any, **names: Any) -> int:
            if flags & os.O_CREAT and not (flags & os.O_DIRECTORY):
                made.append(path)
                if len(made) % 2:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(path, flags, *arguments, **names)

        made: list[str] = []
        store(manager, 0)
        assert manager.flush(10)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", some)
            for first in (1, 5):
                store(manager, *range(first, first + 4))
                assert manager.flush(10)
        said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert any("Too many open files" in message for message in said)
        assert not any("full" in message for message in said)
        store(manager, 20)
        assert manager.flush(10)
        manager.remove(keys(20), tier="memory")
        assert read(manager, 20) == 1, "it passes"


class TestSharedFolder(OddFileTests):
    tier = "shared_folder"

    def open(self, path: Path, **options: Any) -> StorageBackend:
        return build_backend({"type": "remote", "url": f"fs://{path}", **options}, "test")

    def test_a_link_in_the_place_of_unfinished_files_costs_nobody_his(self, tmp_path: Path, outside: Path) -> None:
        (tmp_path / "kv").mkdir()
        (tmp_path / "kv" / ".writing").symlink_to(outside)
        self.open(tmp_path / "kv").close()  # the fixture sees whether the old file outside is still there


class TestNixl(OddFileTests):
    tier = "nixl"

    def open(self, path: Path, **options: Any) -> StorageBackend:
        pytest.importorskip("nixl", reason="NIXL is not installed: pip install -e '.[nixl]'")
        return build_backend({"type": "nixl", "path": str(path), **options}, "test")


class CuFile:
    """KvikIO's class as far as it is used here: it opens files by a path."""

    def __init__(self, path: str, mode: str) -> None:
        self._file = os.open(path, os.O_RDONLY if mode == "r" else os.O_RDWR)

    def __enter__(self) -> CuFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def pread(self, view: memoryview, nbytes: int, offset: int) -> types.SimpleNamespace:
        done = os.preadv(self._file, [view], offset)
        return types.SimpleNamespace(get=lambda: done)

    def pwrite(self, view: memoryview, nbytes: int, offset: int) -> types.SimpleNamespace:
        done = os.pwritev(self._file, [view], offset)
        return types.SimpleNamespace(get=lambda: done)


class TestGds(OddFileTests):
    """With a KvikIO of our own, as the real one needs a driver; test_gds.py has the real one where it is installed."""

    tier = "gds"

    @pytest.fixture(autouse=True)
    def kvikio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module, defaults = types.ModuleType("kvikio"), types.ModuleType("kvikio.defaults")
        module.CuFile, module.defaults, defaults.set = CuFile, defaults, lambda options: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kvikio", module)
        monkeypatch.setitem(sys.modules, "kvikio.defaults", defaults)

    def open(self, path: Path, **options: Any) -> StorageBackend:
        return build_backend({"type": "gds", "path": str(path), **options}, "test")

    @pytest.mark.parametrize("operation", ["READ", "WRITE"])
    def test_the_library_is_given_the_file_that_was_looked_at(
        self, tmp_path: Path, outside: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, operation: str
    ) -> None:
        backend: Any = self.open(tmp_path / "kv")
        data = put(backend, pool, make_key(1), CHUNK, seed=1)
        real = backend._medium.move

        def swap(operation: str, items: Any, headers: Any) -> Any:
            for item in items:
                plant("link", Path(item.path), outside)
            return real(operation, items, headers)

        monkeypatch.setattr(backend._medium, "move", swap)
        if operation == "READ":
            assert get(backend, pool, make_key(1), CHUNK) == data
        else:
            buffer = take(pool, CHUNK)
            backend.put([make_key(2)], [buffer])
            buffer.release()
        backend.close()


# The index of a bucket


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hard link"])
def test_in_the_place_of_an_index_it_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"")
    plant(kind, tmp_path / "index", tmp_path / "outside")
    before = tree(tmp_path / "outside")
    with pytest.raises(ConfigError, match=r"cannot open the index .* not a file of ours"):
        within(10, lambda: Journal(tmp_path / "index"))
    assert tree(tmp_path / "outside") == before


def test_an_index_with_a_second_name_is_written_anew(tmp_path: Path) -> None:
    one = Journal(tmp_path / "index")
    one.add(make_key(1), 100)
    os.link(tmp_path / "index", tmp_path / "copy")
    with pytest.raises(ConfigError, match="another process has it open"):
        Journal(tmp_path / "index")
    one.close()
    before = (tmp_path / "copy").read_bytes()
    again = Journal(tmp_path / "index")
    again.add(make_key(2), 200)
    assert again.items() == [(make_key(1), 100), (make_key(2), 200)]
    assert (tmp_path / "copy").read_bytes() == before
    again.close()
    assert Journal(tmp_path / "index").items() == [(make_key(1), 100), (make_key(2), 200)]


def test_an_index_is_written_anew_into_a_new_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "index")
    for _ in range(100):
        journal.add(make_key(1), 100)
    journal.close()
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "index.new").symlink_to(tmp_path / "secret")
    again = Journal(tmp_path / "index")
    assert again.items() == [(make_key(1), 100)]
    again.add(make_key(2), 200)
    assert (tmp_path / "secret").read_bytes() == SECRET
    assert (tmp_path / "index").stat().st_size < 1000
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o600
    again.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "folder" not in kind and kind != "device"])
def test_in_the_place_of_an_audit_log_it_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    plant(kind, tmp_path / "log", tmp_path / "outside")
    inner = {"type": "disk", "path": str(tmp_path / "kv")}
    with pytest.raises(ConfigError, match=r"audit: cannot write .* not a file of ours"):
        within(10, lambda: build_backend({"type": "audit", "log": str(tmp_path / "log"), "inner": inner}, "test"))
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]
