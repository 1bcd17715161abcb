"""Backends around a backend: metered, slow, faulty, audited."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from in_files import InFiles

from lmcache import metrics
from lmcache.config import build
from lmcache.errors import ClosedError, ConfigError, StorageError
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, fill, make_key, take
from lmcache.storage.wrappers.latency import LatencyConfig

put, get = BackendTests.put, BackendTests.get
CHUNK = 20_000


def wrap(path: Path, *types: str, **options: Any) -> dict[str, Any]:
    """Options of ``types``, outermost first, around a disk; ``options`` are those of the outermost."""
    inner: dict[str, Any] = {"type": "disk", "path": str(path)}
    for name in reversed(types):
        inner = {"type": name, "inner": inner}
    return {**inner, **options}


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


@pytest.fixture
def opened() -> Iterator[Callable[[dict[str, Any]], StorageBackend]]:
    backends: list[StorageBackend] = []

    def make(options: dict[str, Any]) -> StorageBackend:
        backends.append(build_backend(options, "test"))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


Opened = Callable[[dict[str, Any]], StorageBackend]


class WrapperTests(InFiles):
    types: tuple[str, ...]

    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: build_backend(wrap(tmp_path / "kv", *self.types), "test")

    @pytest.fixture
    def open_small_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        def options(*types: str) -> dict[str, Any]:
            disk = {"type": "disk", "path": str(tmp_path / "small"), "capacity": 1 << 20}
            return {"type": types[0], "inner": options(*types[1:])} if types else disk

        return lambda: build_backend(options(*self.types), "test")


class TestMetered(WrapperTests):
    types = ("metered",)


class TestLatency(WrapperTests):
    types = ("latency",)


class TestFaults(WrapperTests):
    types = ("faults",)


class TestAudit(WrapperTests):
    types = ("audit",)


class TestAllOfThem(WrapperTests):
    types = ("audit", "metered", "latency", "faults")


def test_a_wrapper_names_the_options_it_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key fixd_s; known: inner, fixed_s, bytes_per_s, jitter, seed"):
        build_backend(wrap(tmp_path, "latency", fixd_s=1), "test")
    with pytest.raises(ConfigError, match=r"unknown storage backend 'dsik'"):
        build_backend({"type": "metered", "inner": {"type": "dsik"}}, "test")
    with pytest.raises(ConfigError, match="inner"):
        build_backend({"type": "metered"}, "test")


# -- metered -----------------------------------------------------------------------------------------------------------


def value(metric: Any, label: str, operation: str, suffix: str) -> float:
    samples = [s for m in metric.collect() for s in m.samples]
    labels = {"backend": label, "operation": operation}
    return sum(s.value for s in samples if s.labels == labels and s.name.endswith(suffix))


def test_calls_bytes_and_errors_are_counted(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    backend = opened(wrap(tmp_path, "metered", label="counted"))
    put(backend, pool, make_key(1), CHUNK, seed=1)
    get(backend, pool, make_key(1), CHUNK)
    get(backend, pool, make_key(2), CHUNK)
    backend.sizes([make_key(1)])
    counts = [value(metrics.BACKEND_SECONDS, "counted", op, "_count") for op in ("put", "get", "sizes", "clear")]
    assert counts == [1, 2, 1, 0]
    assert value(metrics.BACKEND_BYTES, "counted", "get", "_sum") == CHUNK  # the miss moved nothing
    assert value(metrics.BACKEND_BYTES, "counted", "put", "_sum") == CHUNK
    failing = wrap(tmp_path, "faults", error_rate=1, operations=["remove"])
    backend = opened({"type": "metered", "label": "failing", "inner": failing})
    with pytest.raises(StorageError, match="injected"):
        backend.remove([make_key(1)])
    assert value(metrics.BACKEND_ERRORS, "failing", "remove", "_total") == 1


# -- latency -----------------------------------------------------------------------------------------------------------


@pytest.mark.serial
def test_every_call_takes_longer_by_what_was_asked_for(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    backend = opened(wrap(tmp_path, "latency", fixed_s=0.05, bytes_per_s=CHUNK * 10, jitter=0.1))
    assert build(LatencyConfig, {"inner": {}, "bytes_per_s": "2GiB"}, "test").bytes_per_s == 2 << 30
    begun = time.monotonic()
    backend.sizes([make_key(1)])
    assert 0.045 <= time.monotonic() - begun < 1
    begun = time.monotonic()
    put(backend, pool, make_key(1), CHUNK, seed=1)
    assert 0.135 <= time.monotonic() - begun < 1


def test_closing_ends_a_wait(tmp_path: Path, opened: Opened) -> None:
    for options in (
        wrap(tmp_path, "latency", fixed_s=60),
        wrap(tmp_path, "faults", hang_rate=1, hang_s=60),
    ):
        backend = opened(options)
        with ThreadPoolExecutor(1) as executor:
            asking = executor.submit(backend.sizes, [make_key(1)])
            backend.close()
            assert isinstance(asking.exception(timeout=5), ClosedError)


# -- faults ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_faults(tmp_path: Path, opened: Opened) -> None:
    def outcomes(seed: int) -> list[bool]:
        backend = opened(wrap(tmp_path, "faults", error_rate=0.3, seed=seed, operations=["sizes"]))
        results = []
        for _ in range(60):
            try:
                backend.sizes([make_key(1)])
                results.append(True)
            except StorageError:
                results.append(False)
        backend.remove([make_key(1)])  # not among the operations
        return results

    assert outcomes(1) == outcomes(1) != outcomes(2)
    assert 5 < outcomes(1).count(False) < 35


def test_a_corrupted_read_differs_in_one_bit_and_a_short_one_in_its_second_half(
    tmp_path: Path, pool: PinnedPool, opened: Opened
) -> None:
    data = put(opened(wrap(tmp_path, "metered")), pool, make_key(1), CHUNK, seed=1)
    got = get(opened(wrap(tmp_path, "faults", corrupt_rate=1)), pool, make_key(1), CHUNK)
    assert got is not None
    assert sum((a ^ b).bit_count() for a, b in zip(data, got, strict=True)) == 1
    buffer = take(pool, CHUNK)
    buffer.view[:] = b"x" * CHUNK
    assert opened(wrap(tmp_path, "faults", short_rate=1)).get([make_key(1)], [buffer]) == 1
    assert bytes(buffer.view) == data[: CHUNK // 2] + b"x" * (CHUNK // 2)
    buffer.release()


# -- audit -------------------------------------------------------------------------------------------------------------


def audit_failures() -> float:
    return metrics.AUDIT_FAILURES.labels("faults")._value.get()


@pytest.mark.parametrize("fault", ["corrupt_rate", "short_rate"])
def test_an_audit_finds_what_is_not_what_was_put(tmp_path: Path, pool: PinnedPool, opened: Opened, fault: str) -> None:
    backend = opened({"type": "audit", "inner": wrap(tmp_path, "faults", **{fault: 1})})
    put(backend, pool, make_key(1), CHUNK, seed=1)
    before = audit_failures()
    with pytest.raises(StorageError, match="wrong payload"):
        get(backend, pool, make_key(1), CHUNK)
    assert audit_failures() == before + 1


def test_an_audit_finds_a_wrong_size_and_lets_what_it_does_not_know_pass(
    tmp_path: Path, pool: PinnedPool, opened: Opened
) -> None:
    folder = {"type": "remote", "url": f"fs://{tmp_path}"}  # which knows nothing by heart
    backend, other = opened({"type": "audit", "inner": folder}), opened(folder)
    put(backend, pool, make_key(1), CHUNK, seed=1)
    other.remove([make_key(1)])
    put(other, pool, make_key(1), CHUNK - 1, seed=2)
    put(other, pool, make_key(2), CHUNK, seed=2)
    with pytest.raises(StorageError, match="wrong size"):
        backend.sizes([make_key(1)])
    assert get(backend, pool, make_key(2), CHUNK) is not None


def test_an_audit_takes_either_of_two_payloads_until_the_key_is_removed(
    tmp_path: Path, pool: PinnedPool, opened: Opened
) -> None:
    backend = opened(wrap(tmp_path, "audit"))
    for seed in range(30):
        put(backend, pool, make_key(1), CHUNK, seed=seed)
    assert get(backend, pool, make_key(1), CHUNK) is not None
    backend.remove([make_key(1)])
    backend.clear()
    data = put(backend, pool, make_key(1), CHUNK, seed=99)
    assert get(backend, pool, make_key(1), CHUNK) == data


def test_an_audit_forgets_the_oldest_beyond_its_entries(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    backend = opened(wrap(tmp_path, "audit", entries=3))
    for n in range(10):
        put(backend, pool, make_key(n), 100, seed=n)
    assert len(backend._known) == 3  # type: ignore[attr-defined]


def test_an_audit_writes_a_line_for_each_call(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    log = tmp_path / "audit.jsonl"
    inner = wrap(tmp_path / "kv", "faults", error_rate=1, operations=["remove"])
    backend = opened({"type": "audit", "log": str(log), "inner": inner})
    put(backend, pool, make_key(1), CHUNK, seed=1)
    get(backend, pool, make_key(1), CHUNK)
    backend.contains([make_key(1), make_key(2)])
    with pytest.raises(StorageError):
        backend.remove([make_key(1)])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["operation"], line.get("result"), line["bytes"]) for line in lines] == [
        ("put", 1, CHUNK),
        ("get", 1, CHUNK),
        ("contains", 1, 0),
        ("remove", None, 0),
    ]
    assert lines[2]["keys"] == [make_key(n).to_bytes().hex() for n in (1, 2)]
    assert "injected" in lines[3]["error"]
    with pytest.raises(ConfigError, match="cannot write"):
        build_backend(wrap(tmp_path / "kv", "audit", log=str(tmp_path)), "test")


def test_threads_write_whole_lines(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    log = tmp_path / "audit.jsonl"
    backend = opened(wrap(tmp_path / "kv", "audit", log=str(log)))
    threads = [
        threading.Thread(target=lambda: [backend.contains([make_key(n) for n in range(100)]) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 200


def test_buffers_are_back_when_a_wrapped_call_fails(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    backend = opened({"type": "zstd", "inner": wrap(tmp_path, "faults", error_rate=1)})
    buffer = take(pool, CHUNK)
    fill(buffer, 1)
    for _ in range(3):
        for call in (backend.get, backend.put):
            with pytest.raises(StorageError):
                call([make_key(1)], [buffer])
    assert backend._scratch._pool.used_bytes == 0  # type: ignore[attr-defined]
    buffer.release()
