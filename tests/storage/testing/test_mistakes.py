"""Mistakes of a configuration are errors or said, and places that are too small say so."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from managers import Open, open_manager, settle
from typer.testing import CliRunner

from lmcache import metrics
from lmcache.cli import app
from lmcache.errors import ConfigError
from lmcache.storage.memory.limits import room
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend, check_backend
from lmcache.storage.testing import make_key, take

__all__ = ["open_manager"]

CHUNK = 16 << 10


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("memory.eviction=lruu", "memory.eviction: unknown eviction policy 'lruu'; known: "),
        ("tiers=[{type: dsik, path: /nope}]", "tiers[0]: unknown storage backend 'dsik'; known: audit, disk"),
        ("tiers=[{type: redis}]", 'write {type: remote, url: "redis://..."}'),
        ("tiers=[{type: remote, url: 'http://h'}]", "tiers[0].url: unknown remote scheme 'http'"),
        ("tiers=[{type: disk, path: /nope, capcity: 1GiB}]", "capcity"),
        ("tiers=[{type: disk, path: /nope, eviction: lruu}]", "tiers[0] (disk): eviction: unknown eviction policy"),
        ("tiers=[{type: metered, inner: {type: dsik}}]", "tiers[0].inner: unknown storage backend"),
        ("codec={type: int44}", "int44"),
    ],
)
def test_the_config_command_looks_into_tiers_policies_and_codec(setting: str, message: str) -> None:
    result = CliRunner().invoke(app, ["config", setting])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize(
    ("kind", "package", "module", "extra"),
    [
        ("encrypted", "cryptography", "encryption", "encryption"),
        ("zstd", "zstandard", "compression", "zstd"),
    ],
)
def test_a_tier_whose_package_is_missing_says_that_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str, module: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"lmcache.storage.wrappers.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        check_backend({"type": kind}, "tiers[0]")
    assert str(caught.value) == f"tiers[0]: {kind} needs {package}; in your clone: pip install -e '.[{extra}]'"


def test_the_config_command_opens_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["config", f"tiers=[{{type: disk, path: {tmp_path}/kv}}]"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "kv").exists()


def test_memory_that_cannot_be_had_is_an_error_before_it_is_touched() -> None:
    available = room()
    assert available is not None
    with pytest.raises(ConfigError, match=r"memory\.capacity is \d+ bytes .*, of which only \d+ are available"):
        PinnedPool(4 * available.nbytes)


def test_a_tier_too_small_for_its_chunks_is_said_once_and_counted(
    open_manager: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = build_backend({"type": "disk", "path": str(tmp_path / "kv"), "capacity": CHUNK // 2}, "tiers[0]")
    manager = open_manager(tier)
    counter = metrics.TIER_REFUSED_CHUNKS.labels("disk")
    before = counter._value.get()
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            buffer = manager.allocate(CHUNK)
            assert buffer is not None
            manager.put(make_key(number), buffer)
        settle(lambda: counter._value.get() == before + 3, "three chunks were not refused")
    said = [record.getMessage() for record in caplog.records if "did not take" in record.getMessage()]
    assert len(said) == 1
    assert f"{CHUNK} bytes" in said[0]


def test_a_queue_smaller_than_a_chunk_is_said_once(
    open_manager: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = build_backend({"type": "disk", "path": str(tmp_path / "kv")}, "tiers[0]")
    manager = open_manager(tier, write_queue=CHUNK // 2)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            buffer = manager.allocate(CHUNK)
            assert buffer is not None
            manager.put(make_key(number), buffer)
    assert sum("raise write_queue" in record.getMessage() for record in caplog.records) == 1


def test_a_shared_folder_does_not_count_what_it_evicted_for_the_rest_of_a_put(tmp_path: Path) -> None:
    backend = build_backend({"type": "remote", "url": f"fs://{tmp_path}", "capacity": 2 << 20}, "tiers[0]")
    pool = PinnedPool(4 << 20)
    keys, buffers = [make_key(number) for number in range(4)], [take(pool, 1 << 20) for _ in range(4)]
    held = backend.put(keys, buffers)
    assert held == sum(backend.contains([key]) for key in keys) == len(backend.keys() or []) < 4
    for buffer in buffers:
        buffer.release()
    pool.close()
    backend.close()


def test_clearing_a_tenant_leaves_the_others_on_disk(tmp_path: Path) -> None:
    backend = build_backend({"type": "disk", "path": str(tmp_path / "kv")}, "tiers[0]")
    other = build_backend({"type": "disk", "path": str(tmp_path / "kv")}, "tiers[1]")
    pool = PinnedPool(1 << 20)
    buffer = take(pool, CHUNK)
    keys = [make_key(number) for number in range(3)]
    assert backend.put(keys[:2], [buffer, buffer]) == 2
    assert other.put(keys[2:], [buffer]) == 1
    assert sorted(backend.keys() or []) == sorted(keys)
    buffer.release()
    pool.close()
    backend.close()
    other.close()


def test_the_config_command_prints_no_secrets() -> None:
    result = CliRunner().invoke(app, ["config", "tiers=[{type: remote, url: 'redis://:hunter2@h', password: hunter3}]"])
    assert "hunter" not in result.output
