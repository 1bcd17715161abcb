"""What every backend must do that keeps chunk files through a library: the suite, damage, faults, random work."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from in_files import InFiles
from managers import NBYTES, Open, settle
from tier_faults import CHUNK, check_manager_goes_on, work_until_closed

from lmcache import metrics
from lmcache.errors import ClosedError, ConfigError, StorageError
from lmcache.storage.backends.indexed.backend import IndexedBackend
from lmcache.storage.backends.indexed.files import FileMedium
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendMachine, BackendTests, fill, make_key, take

ROOT = Path(__file__).resolve().parents[3]
SIZE = HEADER_BYTES + CHUNK
put, get = BackendTests.put, BackendTests.get

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "header only": lambda raw: raw[:HEADER_BYTES],
    "truncated by a byte": lambda raw: raw[:-1],
    "half": lambda raw: raw[: len(raw) // 2],
    "longer": lambda raw: raw + b"x",
    "foreign": lambda raw: b"x" * len(raw),
    "zeros": lambda raw: bytes(len(raw)),
    "a bit of the header": lambda raw: raw[:20] + bytes([raw[20] ^ 1]) + raw[21:],
    "a bit of the payload": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
}

WRITER = """
import json, sys
from lmcache.storage.registry import build_backend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import fill, make_key
backend = build_backend(json.loads(sys.argv[1]), "test"); pool = PinnedPool(1 << 20)
buffer = pool.allocate(262144)
for n in range(10**9):
    fill(buffer, n % 16); backend.remove([make_key(n % 16)]); backend.put([make_key(n % 16)], [buffer])
    print("wrote", n, flush=True)
"""


def io_error(*_: object) -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def nothing_moves(_: str, items: Sequence[object], __: object) -> list[OSError]:
    """Instead of ``FileMedium.move``."""
    return [io_error() for _ in items]


def kill_midway(options: dict[str, Any], dice: random.Random, busy: Callable[[], bool] = lambda: True) -> int:
    """Start a process that writes chunks of 262144 bytes, kill it when it is ``busy``; the last that it had put."""
    command = [sys.executable, "-c", WRITER, json.dumps(options)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert writer.stdout is not None
    told = 0
    for _ in range(dice.randint(2, 30)):
        while not (line := writer.stdout.readline()).startswith("wrote"):
            assert line, "the writer died"  # the other lines are the library's log
        told = int(line.split()[1])
    settle(busy, "no write is under way")
    writer.kill()
    # What it printed before it died was acknowledged too, and the next may be on its way.
    rest, _ = writer.communicate()
    return max([told, *(int(line.split()[1]) for line in rest.split("\n")[:-1] if line.startswith("wrote"))])


def check_a_large_batch(backend: StorageBackend, pool: PinnedPool) -> None:
    """Of more than one transfer's chunks, aligned and not."""
    sizes = [CHUNK, 4095, CHUNK, 1] * 10
    buffers = [take(pool, nbytes) for nbytes in sizes]
    data = [fill(buffer, seed) for seed, buffer in enumerate(buffers)]
    numbers = [make_key(n) for n in range(len(sizes))]
    assert backend.put(numbers, buffers) == len(numbers)
    for buffer in buffers:
        buffer.view[:] = bytes(buffer.nbytes)
    assert backend.get([*numbers, make_key(99)], [*buffers, buffers[0]]) == len(numbers)
    assert [bytes(buffer.view) for buffer in buffers] == data
    for buffer in buffers:
        buffer.release()
    backend.close()


class ChunkFileTests(InFiles):
    """Subclasses say what the options are."""

    options: ClassVar[dict[str, Any]]

    @classmethod
    def open(cls, path: Path, **more: Any) -> IndexedBackend:
        backend = build_backend({**cls.options, "path": str(path), **more}, "test")
        assert isinstance(backend, IndexedBackend)
        return backend

    @classmethod
    def corrupt(cls) -> float:
        return metrics.CORRUPT_CHUNKS.labels(cls.options["type"])._value.get()

    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: self.open(tmp_path / "kv")

    @pytest.fixture
    def open_small_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: self.open(tmp_path / "small", capacity=1 << 20)

    @pytest.fixture
    def broken(self, backend: StorageBackend) -> Callable[[], AbstractContextManager[None]]:
        assert isinstance(backend, IndexedBackend)
        medium = backend._medium

        @contextlib.contextmanager
        def failing() -> Iterator[None]:
            with unittest.mock.patch.object(medium, "move", nothing_moves):
                yield

        return failing

    @pytest.fixture
    def mount(self, tmp_path: Path) -> Iterator[Callable[..., Path]]:
        folder = tmp_path / "mounted"
        folder.mkdir()

        def do(*arguments: str) -> Path:
            done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False)
            if done.returncode:
                pytest.skip(f"file systems cannot be mounted here: {done.stderr.decode().strip()}")
            return folder

        yield do
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)

    def test_more_than_one_transfer_takes_comes_back(self, tmp_path: Path, pool: PinnedPool) -> None:
        check_a_large_batch(self.open(tmp_path), pool)

    @pytest.mark.parametrize("reopen", [False, True])
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_file_is_a_miss_counted_and_removed(
        self, tmp_path: Path, pool: PinnedPool, damage: str, reopen: bool
    ) -> None:
        backend = self.open(tmp_path)
        good = [put(backend, pool, make_key(n), CHUNK, seed=n) for n in range(3)]
        (file,) = tmp_path.rglob(f"{make_key(1).digest.hex()}.kv")
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
        before = self.corrupt()
        if reopen:
            backend.close()
            backend = self.open(tmp_path)
        buffers = [take(pool, CHUNK) for _ in range(3)]
        assert backend.get([make_key(n) for n in range(3)], buffers) == 1
        assert bytes(buffers[0].view) == good[0]
        for buffer in buffers:
            buffer.release()
        assert self.corrupt() == before + 1
        assert not file.exists()
        assert backend.used_bytes == 2 * SIZE
        assert put(backend, pool, make_key(1), CHUNK, seed=1) == get(backend, pool, make_key(1), CHUNK)
        backend.close()

    def test_a_file_that_is_cut_while_it_is_read_is_a_miss(
        self, tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = self.open(tmp_path)
        good = [put(backend, pool, make_key(n), CHUNK, seed=n) for n in range(2)]
        (file,) = tmp_path.rglob(f"{make_key(1).digest.hex()}.kv")
        medium = backend._medium
        assert isinstance(medium, FileMedium)
        real, before = medium.move, self.corrupt()

        def late(*arguments: Any) -> list[Exception | None]:
            os.truncate(file, HEADER_BYTES + 4096)
            return real(*arguments)

        monkeypatch.setattr(medium, "move", late)
        buffers = [take(pool, CHUNK) for _ in range(2)]
        assert backend.get([make_key(n) for n in range(2)], buffers) == 1
        assert bytes(buffers[0].view) == good[0]
        for buffer in buffers:
            buffer.release()
        assert self.corrupt() == before + 1
        assert not file.exists()
        backend.close()

    def test_what_another_process_removed_is_a_miss_and_can_be_put_again(
        self, tmp_path: Path, pool: PinnedPool
    ) -> None:
        one, two = self.open(tmp_path), self.open(tmp_path)
        data = put(one, pool, make_key(1), CHUNK, seed=1)
        assert get(two, pool, make_key(1), CHUNK) == data
        one.remove([make_key(1)])
        assert get(two, pool, make_key(1), CHUNK) is None
        assert two.used_bytes == 0
        put(one, pool, make_key(1), CHUNK, seed=1)
        two.remove([make_key(1)])
        assert put(one, pool, make_key(1), CHUNK, seed=1) == data, "not taken for held"
        assert get(two, pool, make_key(1), CHUNK) == data
        one.close()
        two.close()

    def test_of_two_that_write_one_key_the_first_stays(
        self, tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = self.open(tmp_path), self.open(tmp_path)
        medium, real = two._medium, two._medium.move

        def late(*arguments: Any) -> list[Exception | None]:
            monkeypatch.setattr(medium, "move", real)
            put(one, pool, make_key(1), CHUNK, seed=1)
            return list(real(*arguments))

        monkeypatch.setattr(medium, "move", late)
        put(two, pool, make_key(1), CHUNK, seed=2)
        assert get(two, pool, make_key(1), CHUNK) == random.Random(1).randbytes(CHUNK)
        assert not list(tmp_path.rglob(".tmp-*"))
        assert one.used_bytes == two.used_bytes == SIZE
        one.close()
        two.close()

    def test_capacity_holds_across_restarts_and_the_oldest_goes_first(self, tmp_path: Path, pool: PinnedPool) -> None:
        backend = self.open(tmp_path, capacity=3 * SIZE)
        for n in range(3):
            put(backend, pool, make_key(n), CHUNK, seed=n)
        for n, file in enumerate(sorted(tmp_path.rglob("*.kv"))):
            os.utime(file, ns=(n, n))
        assert get(backend, pool, make_key(0), CHUNK) is not None  # used, so 1 is the oldest now
        backend.close()
        backend = self.open(tmp_path, capacity=3 * SIZE)
        put(backend, pool, make_key(3), CHUNK, seed=3)
        assert [backend.contains([make_key(n)]) for n in range(4)] == [1, 0, 1, 1]
        assert backend.used_bytes == 3 * SIZE
        buffer = take(pool, 3 * SIZE)
        assert backend.put([make_key(4)], [buffer]) == 0
        assert len(list(tmp_path.rglob("*.kv"))) == 3
        buffer.release()
        backend.close()

    def test_a_full_disk_is_an_error_that_leaves_nothing_behind(
        self, mount: Callable[..., Path], pool: PinnedPool
    ) -> None:
        folder = mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
        backend = self.open(folder)
        data = put(backend, pool, make_key(1), 98_304, seed=1)
        buffers = [take(pool, 400_000), take(pool, 4096)]
        with pytest.raises(StorageError, match="No space left"):
            backend.put([make_key(2), make_key(3)], buffers)
        for buffer in buffers:
            buffer.release()
        assert not list(folder.rglob(".tmp-*"))
        assert [backend.contains([make_key(n)]) for n in (1, 2, 3)] == [1, 0, 1]
        assert backend.used_bytes == 2 * HEADER_BYTES + 98_304 + 4096
        assert get(backend, pool, make_key(1), 98_304) == data
        backend.close()

    def test_a_disk_that_cannot_be_read_is_an_error_and_its_chunks_stay(
        self, tmp_path: Path, mount: Callable[..., Path], pool: PinnedPool
    ) -> None:
        """A file system on a loop device whose backing file is cut: the kernel answers EIO."""
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        made = subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], capture_output=True, check=False)
        if made.returncode:
            pytest.skip(f"no file system can be made here: {made.stderr.decode().strip()}")
        backend = self.open(mount("-o", "loop", str(image)))
        data = put(backend, pool, make_key(1), CHUNK, seed=1)
        (file,) = (tmp_path / "mounted").rglob("*.kv")
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        subprocess.run(["cp", "--sparse=always", image, tmp_path / "whole"], check=True)
        before = self.corrupt()
        os.truncate(image, 0)
        for _ in range(2):
            with pytest.raises(StorageError, match="cannot read"):
                get(backend, pool, make_key(1), CHUNK)
        subprocess.run(["cp", "--sparse=always", tmp_path / "whole", image], check=True)  # into the same file
        assert get(backend, pool, make_key(1), CHUNK) == data
        assert self.corrupt() == before
        backend.close()

    @pytest.mark.parametrize("operation", ["read", "write"])
    def test_an_io_error_is_a_storage_error_that_loses_nothing_else(
        self, tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch, operation: str
    ) -> None:
        backend = self.open(tmp_path)
        data = put(backend, pool, make_key(1), CHUNK, seed=1)
        buffer = take(pool, CHUNK)
        with monkeypatch.context() as patch:
            patch.setattr(backend._medium, "move", nothing_moves)
            with pytest.raises(StorageError, match=rf"cannot {operation} .*Input/output error"):
                (backend.get if operation == "read" else backend.put)([make_key(1 + (operation == "write"))], [buffer])
        buffer.release()
        assert get(backend, pool, make_key(1), CHUNK) == data
        assert backend.used_bytes == SIZE
        assert not list(tmp_path.rglob(".tmp-*"))
        backend.close()

    def test_no_permission_is_a_storage_error(self, tmp_path: Path, pool: PinnedPool) -> None:
        backend = self.open(tmp_path)
        data = put(backend, pool, make_key(1), CHUNK, seed=1)
        (folder,) = {file.parent for file in tmp_path.rglob("*.kv")}
        if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
            pytest.skip("folders cannot be made immutable here")
        buffer = take(pool, CHUNK)
        try:
            with pytest.raises(StorageError, match=r"cannot write .*not permitted"):
                backend.put([make_key(2)], [buffer])
            with pytest.raises(StorageError, match=r"cannot remove .*not permitted"):
                backend.remove([make_key(1)])
            assert get(backend, pool, make_key(1), CHUNK) == data
        finally:
            buffer.release()
            subprocess.run(["chattr", "-i", folder], check=True)
        put(backend, pool, make_key(2), CHUNK, seed=2)
        assert backend.used_bytes == 2 * SIZE
        backend.close()

    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot write to"):
            self.open(tmp_path / "file" / "kv")

    def test_sigkill_at_any_moment_leaves_only_whole_chunks(self, tmp_path: Path, pool: PinnedPool) -> None:
        dice = random.Random(3)
        for _ in range(2):
            options = {**self.options, "path": str(tmp_path)}
            last = kill_midway(options, dice, lambda: any(tmp_path.rglob(".tmp-*")))
            backend, before = self.open(tmp_path), self.corrupt()
            assert not list(tmp_path.rglob(".tmp-*"))
            for n in range(16):
                assert get(backend, pool, make_key(n), 262144) in (None, random.Random(n).randbytes(262144))
            assert self.corrupt() == before, "a kill must not leave damaged chunks"
            assert get(backend, pool, make_key(last % 16), 262144) is not None
            backend.close()

    def test_closing_during_transfers_ends_them_whole_and_refuses_new_ones(
        self, tmp_path: Path, pool: PinnedPool
    ) -> None:
        backend = self.open(tmp_path)
        ends = work_until_closed(backend, pool, lambda: len(backend) >= 30)
        assert ends == [ClosedError] * 3
        assert not list(tmp_path.rglob(".tmp-*"))
        assert len(list(tmp_path.rglob("*.kv"))) == len(backend)
        again = self.open(tmp_path)
        assert again.used_bytes == len(backend) * SIZE
        again.close()

    def test_a_transfer_that_hangs_does_not_hold_up_closing(
        self, tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend, go, begun = self.open(tmp_path), threading.Event(), threading.Event()
        medium = backend._medium
        assert isinstance(medium, FileMedium)
        real = medium.move

        def hang(*arguments: Any) -> list[Exception | None]:
            begun.set()
            assert go.wait(20)
            return real(*arguments)

        monkeypatch.setattr(medium, "move", hang)
        writer = threading.Thread(target=lambda: put(backend, pool, make_key(1), CHUNK, seed=1))
        writer.start()
        assert begun.wait(10)
        began = time.monotonic()
        backend.close()
        assert time.monotonic() - began < 3
        go.set()
        writer.join(10)
        again = self.open(tmp_path)
        assert get(again, pool, make_key(1), CHUNK) == random.Random(1).randbytes(CHUNK)
        again.close()

    def test_the_manager_goes_on_with_another_tier(
        self, tmp_path: Path, open_manager: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = self.open(tmp_path, capacity=64 * (HEADER_BYTES + NBYTES))
        with monkeypatch.context() as patch:
            check_manager_goes_on(
                open_manager, backend, lambda: patch.setattr(backend._medium, "move", nothing_moves), patch.undo
            )


def files_machine(tests: type[ChunkFileTests]) -> type[RuleBasedStateMachine]:
    """Random work, restarts, garbled files and I/O errors on a tier that evicts, against a dict."""
    capacity = 6 * (HEADER_BYTES + 9000)

    class Files(BackendMachine(lambda folder: tests.open(folder / "kv", capacity=capacity))):
        breakable = True
        faults: ExitStack | None = None

        def break_place(self) -> None:
            self.mend_place()
            self.faults = ExitStack()
            medium = type(self.backend._medium)
            self.faults.enter_context(unittest.mock.patch.object(medium, "move", staticmethod(nothing_moves)))

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
            assert sum(file.stat().st_size for file in files) == self.backend.used_bytes <= capacity
            assert len(files) == len(self.backend)
            assert not list(self.folder.rglob(".tmp-*"))

    Files.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
    return Files
