"""The disk tier: conformance, damage, real full disks, SIGKILL, sharing."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from in_files import InFiles

from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.eviction.base import LRU
from lmcache.storage.index import ChunkIndex, Entry
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import BackendMachine, BackendTests, make_key, take

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 20_000


def open_disk(path: Path, capacity: int = 1 << 30) -> DiskBackend:
    return DiskBackend(DiskConfig(path=path, capacity=capacity))


class TestDisk(InFiles):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: open_disk(tmp_path / "kv")

    @pytest.fixture
    def open_small_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: open_disk(tmp_path / "small", 1 << 20)


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


put, get = BackendTests.put, BackendTests.get


def corrupt_count() -> float:
    return metrics.CORRUPT_CHUNKS.labels("disk")._value.get()


def the_file(path: Path) -> Path:
    (file,) = path.rglob("*.kv")
    return file


DAMAGE: dict[str, Callable[[bytearray], bytes]] = {
    "empty": lambda raw: b"",
    "header only": lambda raw: bytes(raw[:HEADER_BYTES]),
    "truncated by a byte": lambda raw: bytes(raw[:-1]),
    "half": lambda raw: bytes(raw[: len(raw) // 2]),
    "longer": lambda raw: bytes(raw) + b"x",
    "foreign": lambda raw: b"x" * len(raw),
    "zeros": lambda raw: bytes(len(raw)),
}
# A bit in every field of the header, in its zero padding, and in the payload.
FLIPS = [0, 7, 8, 16, 48, 79, 80, 111, 112, 119, 120, 127, 128, 135, 136, 4095, 4096, 4096 + CHUNK // 2, 4095 + CHUNK]


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("damage", [*DAMAGE, *FLIPS])
def test_a_damaged_file_is_a_miss_counted_and_removed(
    tmp_path: Path, pool: PinnedPool, damage: str | int, reopen: bool
) -> None:
    disk = open_disk(tmp_path)
    put(disk, pool, make_key(1), CHUNK, seed=1)
    file = the_file(tmp_path)
    raw = bytearray(file.read_bytes())
    if isinstance(damage, int):
        raw[damage] ^= 0x10
    file.write_bytes(raw if isinstance(damage, int) else DAMAGE[damage](raw))
    before = corrupt_count()
    if reopen:
        disk = open_disk(tmp_path)
    assert get(disk, pool, make_key(1), CHUNK) is None
    assert not file.exists()
    assert corrupt_count() == before + 1
    assert disk.used_bytes == 0
    data = put(disk, pool, make_key(1), CHUNK, seed=1)
    assert get(disk, pool, make_key(1), CHUNK) == data


def test_the_chunk_of_another_key_under_this_name_is_a_miss(tmp_path: Path, pool: PinnedPool) -> None:
    disk = open_disk(tmp_path)
    put(disk, pool, make_key(1), CHUNK, seed=1)
    file = the_file(tmp_path)
    file.rename(disk.file_of(make_key(2)))
    assert get(disk, pool, make_key(2), CHUNK) is None
    assert not list(tmp_path.rglob("*.kv"))


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "00" / "00"
    folder.mkdir(parents=True)
    names = [tmp_path / "notes.txt", folder / "x.kv", folder / ".tmp-me", folder / "y.bin"]
    for name in names:
        name.write_text("mine")
    disk = open_disk(tmp_path)
    disk.clear()
    assert all(name.read_text() == "mine" for name in names)


def test_leftovers_of_dead_writers_are_removed_and_those_of_live_ones_are_not(tmp_path: Path, pool: PinnedPool) -> None:
    put(open_disk(tmp_path), pool, make_key(1), CHUNK, seed=1)
    folder = the_file(tmp_path).parent
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / f".tmp-{dead.pid}-0").write_text("half")
    (folder / f".tmp-{os.getpid()}-0").write_text("half")  # of a killed process that had our pid
    (folder / f".tmp-{os.getppid()}-99").write_text("half")
    disk = open_disk(tmp_path)
    assert {f.name for f in folder.glob(".tmp-*")} == {f".tmp-{os.getppid()}-99"}
    put(disk, pool, make_key(2), CHUNK, seed=2)


def test_two_backends_of_one_process_write_to_one_folder_at_once(tmp_path: Path, pool: PinnedPool) -> None:
    buffer = take(pool, CHUNK)
    held: list[int] = []

    def work(number: int) -> None:
        disk = open_disk(tmp_path)
        held.append(sum(disk.put([make_key(1000 * number + n)], [buffer]) for n in range(200)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    buffer.release()
    assert held == [200, 200]


def test_capacity_holds_across_restarts_and_the_oldest_goes_first(tmp_path: Path, pool: PinnedPool) -> None:
    size = HEADER_BYTES + CHUNK
    disk = open_disk(tmp_path, 3 * size)
    for n in range(3):
        put(disk, pool, make_key(n), CHUNK, seed=n)
        os.utime(disk.file_of(make_key(n)), ns=(n, n))
    assert get(disk, pool, make_key(0), CHUNK) is not None  # used, so 1 is the oldest now
    disk = open_disk(tmp_path, 3 * size)
    put(disk, pool, make_key(3), CHUNK, seed=3)
    assert [disk.contains([make_key(n)]) for n in range(4)] == [1, 0, 1, 1]
    assert open_disk(tmp_path, size).used_bytes == size
    assert len(list(tmp_path.rglob("*.kv"))) == 1


def test_a_chunk_larger_than_the_capacity_is_not_held_and_evicts_nothing(tmp_path: Path, pool: PinnedPool) -> None:
    disk = open_disk(tmp_path, 2 * (HEADER_BYTES + CHUNK))
    put(disk, pool, make_key(1), CHUNK, seed=1)
    buffer = take(pool, 3 * CHUNK)
    assert disk.put([make_key(2)], [buffer]) == 0
    buffer.release()
    assert disk.contains([make_key(1)]) == 1


def test_two_backends_share_a_folder(tmp_path: Path, pool: PinnedPool) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    data = put(one, pool, make_key(1), CHUNK, seed=1)
    assert two.contains([make_key(1)]) == 1
    assert get(two, pool, make_key(1), CHUNK) == data
    assert one.remove([make_key(1)]) == 1
    assert get(two, pool, make_key(1), CHUNK) is None
    assert two.used_bytes == 0


@pytest.mark.parametrize("capacity", [1, HEADER_BYTES])
def test_a_capacity_that_holds_no_chunk_is_refused(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(ValueError, match="greater than 4096"):
        DiskConfig(path=tmp_path, capacity=capacity)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file/kv"):
        open_disk(tmp_path / "file" / "kv")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    folder = tmp_path / "mounted"
    folder.mkdir()

    def do(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield do
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def test_a_read_only_folder_is_refused(mount: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="Read-only file system"):
        open_disk(mount("ro"))


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(mount: Callable[[str], Path], pool: PinnedPool) -> None:
    folder = mount("size=256k")
    disk = open_disk(folder)
    data = put(disk, pool, make_key(1), 100_000, seed=1)
    buffer = take(pool, 400_000)
    with pytest.raises(StorageError, match="No space left"):
        disk.put([make_key(2)], [buffer])
    buffer.release()
    assert not list(folder.rglob(".tmp-*"))
    assert disk.used_bytes == HEADER_BYTES + 100_000
    assert get(disk, pool, make_key(1), 100_000) == data


def test_a_file_size_limit_is_an_error_that_leaves_nothing_behind(tmp_path: Path, pool: PinnedPool) -> None:
    disk = open_disk(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    buffer = take(pool, 100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            disk.put([make_key(1)], [buffer])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    buffer.release()
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == [".account"]
    assert disk.used_bytes == 0


@pytest.mark.parametrize("call", ["take", "unlink"])
def test_a_chunk_that_is_looked_for_while_it_is_evicted_is_forgotten(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    disk = open_disk(tmp_path, 2 * (HEADER_BYTES + CHUNK))
    put(disk, pool, make_key(1), CHUNK, seed=1)
    put(disk, pool, make_key(2), CHUNK, seed=2)
    (folder,) = disk._folders
    evict = getattr(folder, call)

    def looked_for(victim: ChunkKey, *rest: ChunkKey) -> object:
        disk.sizes([victim])
        return evict(victim, *rest)

    monkeypatch.setattr(folder, call, looked_for)
    # One victim's file is written over; a small chunk's victim goes as it is.
    size = CHUNK if call == "take" else CHUNK // 4
    data = put(disk, pool, make_key(3), size, seed=3)
    assert disk.sizes([make_key(1)]) == []
    assert len(disk) == len(list(tmp_path.rglob("*.kv"))) == 2
    assert disk.remove([make_key(2)])
    assert len(disk) == 1
    assert get(disk, pool, make_key(3), size) == data


def test_a_chunk_that_was_written_again_while_it_was_evicted_can_be_evicted_again() -> None:
    index, old, new = ChunkIndex(LRU()), Entry(0, 100, 1), Entry(0, 100, 2)
    index.add(make_key(1), old)
    assert index.candidates(0, 1) == [(make_key(1), old)]
    index.add(make_key(1), new)
    assert index.forget(make_key(1), old) is None
    assert index.candidates(0, 1) == [(make_key(1), new)]


WRITER = """
import sys; from pathlib import Path
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import fill, make_key
disk = DiskBackend(DiskConfig(path=Path(sys.argv[1]), capacity=40 * 300_000)); pool = PinnedPool(1 << 20)
buffer = pool.allocate(300_000 - 4096 - 8)
for n in range(int(sys.argv[2]), 10**9):
    fill(buffer, n % 64); disk.remove([make_key(n % 64)]); disk.put([make_key(n % 64)], [buffer])
    print(n, flush=True)
"""


def test_sigkill_at_any_moment_leaves_only_whole_chunks(tmp_path: Path, pool: PinnedPool) -> None:
    dice, written = random.Random(3), 0
    nbytes = 300_000 - HEADER_BYTES - 8
    for _ in range(5):  # most of the time goes into starting a process
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(written)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        for _ in range(dice.randint(1, 40)):
            written = int(writer.stdout.readline()) + 1
        writer.kill()
        writer.wait()
        writer.stdout.close()
        disk = open_disk(tmp_path, 40 * 300_000)
        assert not list(tmp_path.rglob(".tmp-*"))
        assert disk.used_bytes <= 40 * 300_000
        before = corrupt_count()
        for n in range(64):
            expected = random.Random(n).randbytes(nbytes)
            assert get(disk, pool, make_key(n), nbytes) in (None, expected)
        assert corrupt_count() == before, "a kill must not leave damaged chunks"
        # What was acknowledged last is there.
        assert get(disk, pool, make_key((written - 1) % 64), nbytes) is not None


CAPACITY = 6 * (HEADER_BYTES + 9_000)
SETTINGS = settings(max_examples=40, stateful_step_count=25, deadline=None)


class SmallDisk(BackendMachine(lambda folder: open_disk(folder / "kv", CAPACITY))):
    """Random work, restarts, garbled files and I/O errors on a tier that evicts, against a dict."""

    breakable = True
    faults: ExitStack | None = None

    def break_place(self) -> None:
        self.mend_place()
        self.faults = ExitStack()
        for call in ("preadv", "pwritev"):
            error = OSError(errno.EIO, os.strerror(errno.EIO))
            self.faults.enter_context(unittest.mock.patch.object(os, call, side_effect=error))

    def mend_place(self) -> None:
        if self.faults is not None:
            self.faults.close()

    @rule(number=st.integers(0, 9), at=st.integers(0, 1 << 16), payload=st.booleans())
    def garble(self, number: int, at: int, payload: bool) -> None:
        if files := sorted(self.folder.rglob("*.kv")):
            file = files[number % len(files)]
            raw = bytearray(file.read_bytes())
            first = HEADER_BYTES if payload else 0
            raw[first + at % (len(raw) - first)] ^= 1
            file.write_bytes(raw)

    def check(self) -> None:
        files = list(self.folder.rglob("*.kv"))
        assert sum(f.stat().st_size for f in files) == self.backend.used_bytes <= CAPACITY
        assert len(files) == len(self.backend)
        assert not list(self.folder.rglob(".tmp-*"))


class LargeStripedDisk(
    BackendMachine(lambda folder: DiskBackend(DiskConfig(paths=(folder / "a", folder / "b", folder / "c"))))
):
    """Nothing is lost where there is room."""

    lossless = True


class SharedDisk(BackendMachine(lambda folder: open_disk(folder / "kv", CAPACITY))):
    """Two backends on one folder take turns."""

    exact = False
    other: DiskBackend | None = None

    @rule()
    def switch(self) -> None:
        self.backend, self.other = self.other or open_disk(self.folder / "kv", CAPACITY), self.backend

    def check(self) -> None:
        files = list(self.folder.rglob("*.kv"))
        assert sum(f.stat().st_size for f in files) == self.backend.used_bytes <= CAPACITY
        assert not list(self.folder.rglob(".tmp-*"))


SmallDisk.TestCase.settings = LargeStripedDisk.TestCase.settings = SharedDisk.TestCase.settings = SETTINGS
TestSmallDisk, TestLargeStripedDisk, TestSharedDisk = SmallDisk.TestCase, LargeStripedDisk.TestCase, SharedDisk.TestCase
