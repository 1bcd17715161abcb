"""Faults of the disk tier's places, and what it does about them: a miss or a StorageError, nothing left behind."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmcache import metrics
from lmcache.errors import ClosedError, ConfigError, StorageError
from lmcache.storage.backends.disk import account as disk_account
from lmcache.storage.backends.disk import folder as disk_folder
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer
from lmcache.storage.testing import BackendTests, fill, make_key, take

CHUNK = 20_000
SIZE = HEADER_BYTES + CHUNK
put, get = BackendTests.put, BackendTests.get


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


def open_disk(*paths: Path, capacity: int = 1 << 30, **options: object) -> DiskBackend:
    return DiskBackend(DiskConfig(paths=paths, capacity=capacity, **options))


def on_purpose(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def fails(number: int, call: Callable[..., int], when: Callable[..., bool]) -> Callable[..., int]:
    """``call``, or the error of that number ``when`` its arguments say so."""

    def instead(*args: object, **names: object) -> int:
        if when(*args):
            raise on_purpose(number)
        return call(*args, **names)

    return instead


def fails_below(folder: Path, number: int, call: Callable[..., object]) -> Callable[..., object]:
    """``call``, or the error of that number where it is about what is in ``folder``."""

    def instead(path: str | int, *args: object, dir_fd: int | None = None) -> object:
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if dir_fd is not None:
            where = f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"
        if where.startswith(str(folder)):
            raise on_purpose(number)
        return call(path, *args) if dir_fd is None else call(path, *args, dir_fd=dir_fd)

    return instead


def put_fails(disk: DiskBackend, pool: PinnedPool, number: int, match: str) -> None:
    buffer = take(pool, CHUNK)
    try:
        with pytest.raises(StorageError, match=match):
            disk.put([make_key(number)], [buffer])
    finally:
        buffer.release()


# O_DIRECT


def test_the_page_cache_is_bypassed_where_that_is_granted(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, flags, real = open_disk(tmp_path), [], os.open
    if not disk.direct:
        pytest.skip("the file system of the temporary folder refuses O_DIRECT")

    def spy(path: str, flag: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flag & os.O_DIRECTORY:
            flags.append(flag & os.O_DIRECT)
        return real(path, flag, mode, dir_fd=dir_fd)

    put(disk, pool, make_key(0), CHUNK, seed=0)  # its folder is there now
    monkeypatch.setattr(os, "open", spy)
    data = put(disk, pool, make_key(1), CHUNK, seed=1)
    assert get(disk, pool, make_key(1), CHUNK) == data
    assert flags == [os.O_DIRECT] * 2


@pytest.mark.parametrize("call", ["open", "pwritev", "preadv"])
def test_o_direct_that_is_refused_is_said_once_counted_and_done_without(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    if call == "preadv" and not open_disk(tmp_path / "x").direct:
        pytest.skip("the file system of the temporary folder refuses O_DIRECT")
    refused = fails(errno.EINVAL, getattr(os, call), lambda *args: _is_direct(call, *args))
    monkeypatch.setattr(os, call, refused)
    disk = open_disk(tmp_path / "kv")
    for number in range(3):
        data = put(disk, pool, make_key(number), CHUNK, seed=number)
        assert get(disk, pool, make_key(number), CHUNK) == data
    assert sum("O_DIRECT is refused" in record.message for record in caplog.records) == 1
    assert metrics.DIRECT_IO.labels(str(tmp_path / "kv"))._value.get() == 0
    assert not disk.direct


def _is_direct(call: str, target: object, flags: object = 0, *_: object) -> bool:
    if call == "open":
        return bool(int(flags) & os.O_DIRECT)  # type: ignore[call-overload]
    import fcntl

    return bool(fcntl.fcntl(int(target), fcntl.F_GETFL) & os.O_DIRECT)  # type: ignore[call-overload]


@pytest.mark.parametrize("nbytes", [1, 4095, 4097, 8192])
def test_nothing_outside_a_buffer_is_touched_or_written(tmp_path: Path, pool: PinnedPool, nbytes: int) -> None:
    disk = open_disk(tmp_path)
    pool.view[:] = b"\xee" * pool.capacity
    buffer = take(pool, nbytes)
    data = fill(buffer, 1)
    assert disk.put([make_key(1)], [buffer]) == 1
    buffer.view[:] = bytes(nbytes)
    assert disk.get([make_key(1)], [buffer]) == 1
    assert bytes(buffer.view) == data
    assert set(pool.view[nbytes:]) == {0xEE}
    buffer.release()
    assert disk.file_of(make_key(1)).stat().st_size == HEADER_BYTES + nbytes


class Odd:
    """A buffer that begins within a page, as one of somebody else's may."""

    def __init__(self, inner: PoolBuffer) -> None:
        self.view, self.address, self.nbytes = inner.view[100:], inner.address + 100, inner.nbytes - 100


def test_a_buffer_that_is_not_page_aligned_will_do(tmp_path: Path, pool: PinnedPool) -> None:
    disk, inner = open_disk(tmp_path), take(pool, CHUNK + 100)
    odd = Odd(inner)
    data = fill(odd, 1)
    assert disk.put([make_key(1)], [odd]) == 1
    assert get(disk, pool, make_key(1), CHUNK) == data
    odd.view[:] = bytes(CHUNK)
    assert disk.get([make_key(1)], [odd]) == 1
    assert bytes(odd.view) == data
    inner.release()


# Errors of the place


@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_an_io_error_is_a_storage_error_that_loses_nothing_else(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    disk = open_disk(tmp_path)
    data = put(disk, pool, make_key(1), CHUNK, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails(errno.EIO, getattr(os, call), lambda *_: True))
        if call == "pwritev":
            put_fails(disk, pool, 2, "Input/output error")
        else:
            with pytest.raises(StorageError, match=r"cannot read .*Input/output error"):
                get(disk, pool, make_key(1), CHUNK)
    assert get(disk, pool, make_key(1), CHUNK) == data
    assert disk.used_bytes == SIZE
    assert not list(tmp_path.rglob(".tmp-*"))


def test_short_reads_and_writes_go_on_where_they_stopped(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda file, views, at: write(file, [views[0][:4096]], at))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:4096]], at))
    disk = open_disk(tmp_path)
    data = put(disk, pool, make_key(1), CHUNK, seed=1)
    assert get(disk, pool, make_key(1), CHUNK) == data


def test_no_permission_is_a_storage_error(tmp_path: Path, pool: PinnedPool) -> None:
    disk = open_disk(tmp_path)
    data = put(disk, pool, make_key(1), CHUNK, seed=1)
    folder = disk.file_of(make_key(1)).parent
    if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        pytest.skip("folders cannot be made immutable here")
    try:
        put_fails(disk, pool, 2, "not permitted")
        with pytest.raises(StorageError, match="not permitted"):
            disk.remove([make_key(1)])
        assert get(disk, pool, make_key(1), CHUNK) == data
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    put(disk, pool, make_key(2), CHUNK, seed=2)


def test_a_folder_removed_under_us_is_misses_and_made_anew(tmp_path: Path, pool: PinnedPool) -> None:
    disk = open_disk(tmp_path / "kv")
    for number in range(3):
        put(disk, pool, make_key(number), CHUNK, seed=number)
    shutil.rmtree(tmp_path / "kv")
    assert get(disk, pool, make_key(0), CHUNK) is None
    data = put(disk, pool, make_key(3), CHUNK, seed=3)
    assert get(disk, pool, make_key(3), CHUNK) == data
    assert disk.contains([make_key(1)]) == 0
    assert disk.used_bytes == SIZE
    assert open_disk(tmp_path / "kv").used_bytes == SIZE


def test_a_file_system_smaller_than_the_capacity_evicts(tmp_path: Path, pool: PinnedPool) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        disk = open_disk(folder)
        for number in range(30):
            data = put(disk, pool, make_key(number), CHUNK, seed=number)
        assert get(disk, pool, make_key(29), CHUNK) == data
        assert disk.contains([make_key(0)]) == 0
        assert len(disk) >= 6
        disk.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_chunk_counts_only_when_file_and_folders_are_synced(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (synced.append(os.readlink(f"/proc/self/fd/{f}")), real(f))[1])
    disk = open_disk(tmp_path, fsync=True)
    put(disk, pool, make_key(1), CHUNK, seed=1)
    folder = disk.file_of(make_key(1)).parent
    assert ".tmp-" in synced[-2]
    assert synced[-1] == str(folder)
    assert {str(tmp_path), str(folder.parent)} <= set(synced)
    monkeypatch.setattr(os, "fsync", fails(errno.EIO, real, lambda *_: True))
    put_fails(disk, pool, 2, "Input/output error")
    assert disk.contains([make_key(2)]) == 0
    assert disk.used_bytes == SIZE


# Several folders


def numbers_in(disk: DiskBackend, folder: Path, count: int) -> list[int]:
    return [n for n in range(count) if disk.file_of(make_key(n)).is_relative_to(folder)]


def test_chunks_are_spread_over_folders_whatever_their_order(tmp_path: Path, pool: PinnedPool) -> None:
    paths = [tmp_path / name for name in "abc"]
    disk = open_disk(*paths)
    for number in range(60):
        put(disk, pool, make_key(number), 100, seed=number)
    assert all(10 <= len(list(path.rglob("*.kv"))) <= 30 for path in paths)
    for again in (open_disk(*paths[::-1]), open_disk(*paths, tmp_path / "d")):
        assert again.contains([make_key(number) for number in range(60)]) == 60
    assert open_disk(*paths[:2]).contains([make_key(n) for n in numbers_in(disk, paths[2], 60)]) == 0


def test_a_folder_that_fails_costs_only_its_chunks_and_comes_back(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / name for name in "ab"]
    disk = open_disk(*paths)
    data = {n: put(disk, pool, make_key(n), CHUNK, seed=n) for n in range(20)}
    bad = numbers_in(disk, paths[0], 20)
    with monkeypatch.context() as patch:
        for call in ("open", "unlink", "listdir"):
            patch.setattr(os, call, fails_below(paths[0], errno.EIO, getattr(os, call)))
        for n in range(20):
            assert get(disk, pool, make_key(n), CHUNK) == (None if n in bad else data[n])
        assert disk.contains([make_key(bad[0])]) == 0, "a folder that has failed repeatedly is left alone"
        fresh = {n: put(disk, pool, make_key(n), CHUNK, seed=n) for n in range(20, 40)}
        assert all(get(disk, pool, make_key(n), CHUNK) == fresh[n] for n in fresh), "the other takes its chunks"
        assert disk.remove([make_key(bad[0])]) == 0
    assert sum(str(paths[0]) in r.message and r.levelno >= logging.WARNING for r in caplog.records) == 1
    disk._folders[0].reads._open_until = disk._folders[0].writes._open_until = 0
    put(disk, pool, make_key(bad[0] + 100), CHUNK, seed=0)
    for n in range(101, 110):
        put(disk, pool, make_key(n), CHUNK, seed=0)
    assert disk.contains([make_key(bad[0])]) == 0, "what was removed meanwhile does not come back"
    assert all(get(disk, pool, make_key(n), CHUNK) == data[n] for n in bad[1:])


def test_when_every_folder_fails_that_is_an_error(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_disk(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(os, "pwritev", fails(errno.EIO, os.pwritev, lambda *_: True))
    buffers = [take(pool, CHUNK) for _ in range(20)]
    with pytest.raises(StorageError, match=r"Input/output error|every folder of the disk tier fails"):
        disk.put([make_key(n) for n in range(20)], buffers)
    for buffer in buffers:
        buffer.release()


def test_a_folder_that_is_broken_at_start_is_done_without(tmp_path: Path, pool: PinnedPool) -> None:
    (tmp_path / "file").write_text("")
    disk = open_disk(tmp_path / "file" / "kv", tmp_path / "b")
    for number in range(20):
        data = put(disk, pool, make_key(number), CHUNK, seed=number)
        assert get(disk, pool, make_key(number), CHUNK) == data
    with pytest.raises(ConfigError, match="cannot write to any of"):
        open_disk(tmp_path / "file" / "kv", tmp_path / "file" / "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path: Field required"),
        ({"path": "/x", "paths": ["/y"]}, "exclude each other"),
        ({"paths": ["/x", "/x/."]}, "inside, another"),
        ({"paths": ["/x/y", "/x"]}, "inside, another"),
        ({"path": "/x", "threads": 0}, "greater than or equal to 1"),
    ],
)
def test_folders_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiskConfig(**options)


# The account


def test_an_account_that_is_garbled_or_locked_costs_accuracy_not_progress(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    disk = open_disk(tmp_path)
    put(disk, pool, make_key(1), CHUNK, seed=1)
    (tmp_path / disk_account.NAME).write_bytes(b"garbage garbage garbage!")
    assert disk.used_bytes == SIZE
    put(disk, pool, make_key(2), CHUNK, seed=2)
    assert disk.used_bytes == 2 * SIZE == open_disk(tmp_path).used_bytes
    monkeypatch.setattr(disk_account, "LOCK_TIMEOUT_S", 0.01)
    with open(tmp_path / disk_account.NAME) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        put(disk, pool, make_key(3), CHUNK, seed=3)
    assert disk.used_bytes == 3 * SIZE


def test_where_files_cannot_be_locked_each_process_counts_alone(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOLCK, lambda *_: 0, lambda *_: True))
    disk = open_disk(tmp_path, capacity=2 * SIZE)
    for number in range(4):
        put(disk, pool, make_key(number), CHUNK, seed=number)
    assert disk.used_bytes == 2 * SIZE
    assert sum("each count" in record.message for record in caplog.records) == 1


# Threads


def test_closing_during_transfers_ends_them_whole_and_refuses_new_ones(tmp_path: Path, pool: PinnedPool) -> None:
    disk = open_disk(tmp_path)
    ends: list[BaseException] = []

    def work(first: int) -> None:
        buffers = [take(pool, CHUNK) for _ in range(3)]
        try:
            for number in range(first, first + 10**6, 3):
                keys = [make_key(number + n) for n in range(3)]
                for index, buffer in enumerate(buffers):
                    buffer.view[:8] = (number + index).to_bytes(8, "big")
                assert disk.put(keys, buffers) == 3
                assert disk.get(keys, buffers) == 3
        except (ClosedError, AssertionError) as error:
            ends.append(error)
        finally:
            for buffer in buffers:
                buffer.release()

    threads = [threading.Thread(target=work, args=(n * 10**7,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while len(disk) < 30:
        threading.Event().wait(0.001)
    disk.close()
    for thread in threads:
        thread.join(10)
    assert [type(end) for end in ends] == [ClosedError] * 3
    assert not list(tmp_path.rglob(".tmp-*"))
    assert len(list(tmp_path.rglob("*.kv"))) == len(disk)
    assert open_disk(tmp_path).used_bytes == len(disk) * SIZE


def test_a_file_that_is_written_over_while_it_is_read_is_a_miss_and_no_damage(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = open_disk(tmp_path, capacity=SIZE)
    put(disk, pool, make_key(1), CHUNK, seed=1)
    real, before = disk_folder.read_chunk, metrics.CORRUPT_CHUNKS.labels("disk")._value.get()

    def late(file: int, payload: memoryview, *, direct: bool) -> memoryview:
        monkeypatch.setattr(disk_folder, "read_chunk", real)
        inode = os.fstat(file).st_ino
        put(disk, pool, make_key(2), CHUNK, seed=2)
        assert disk.file_of(make_key(2)).stat().st_ino == inode, "the victim's file was not used again"
        return real(file, payload, direct=direct)

    monkeypatch.setattr(disk_folder, "read_chunk", late)
    assert get(disk, pool, make_key(1), CHUNK) is None
    assert metrics.CORRUPT_CHUNKS.labels("disk")._value.get() == before
    assert disk.contains([make_key(2)]) == 1
    assert disk.used_bytes == SIZE
