"""Reads and writes of a tier fare on their own: where one fails the other goes on, and health and metrics say which."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from managers import Open, keys, open_manager, plant, read, settle, store
from scripted import WAIT_S, ScriptedBackend, raising

from lmcache import metrics
from lmcache.errors import StorageError
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import make_key

__all__ = ["open_manager"]
READ_ONLY = StorageError(errno.EROFS, "read-only file system")


def fail_writes(manager: StorageManager) -> None:
    """Until their breaker opens."""
    number = iter(range(1000, 2000))

    def opens() -> bool:
        store(manager, next(number))
        assert manager.flush(WAIT_S)
        return manager.health().tiers[0].writes.breaker == "open"

    settle(opens, "writes never open their breaker")


def read_below(manager: StorageManager, *numbers: int) -> int:
    manager.remove(keys(*numbers), tier="memory")
    return sum(read(manager, number) for number in numbers)


def is_open(operation: str) -> float:
    return metrics.TIER_BREAKER_OPEN.labels("scripted", operation)._value.get()


def test_a_tier_whose_writes_fail_goes_on_to_serve_reads(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=3, breaker__cooldown_s=600)
    plant(tier, *range(16))
    tier.before["put"] = raising(READ_ONLY)
    errors = metrics.TIER_ERRORS.labels("scripted", "write")._value.get()
    fail_writes(manager)
    assert read_below(manager, *range(16)) == 16
    health = manager.health().tiers[0]
    assert (health.reads.breaker, health.reads.failures, health.reads.last_error) == ("closed", 0, None)
    assert (health.writes.failures, health.writes.last_error) == (3, "[Errno 30] read-only file system")
    assert (health.breaker, health.failures, health.last_error) == ("open", 3, "[Errno 30] read-only file system")
    assert (is_open("read"), is_open("write")) == (0, 1)
    assert metrics.TIER_ERRORS.labels("scripted", "write")._value.get() == errors + 3
    assert manager.stats()["open_breakers"] == 1
    calls = tier.calls.count("put")
    store(manager, 50)
    assert manager.flush(WAIT_S)
    assert tier.calls.count("put") == calls, "no write is tried"


def test_a_tier_whose_reads_fail_goes_on_to_be_written(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=3, breaker__cooldown_s=600)
    tier.before["sizes"] = tier.before["get"] = raising(StorageError("no"))
    for number in range(3):
        assert read(manager, number) == 0
    store(manager, 1)
    assert manager.flush(WAIT_S)
    assert tier.holds() == set(keys(1))
    health = manager.health().tiers[0]
    assert (health.reads.breaker, health.writes.breaker) == ("open", "closed")
    assert (is_open("read"), is_open("write")) == (1, 0)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    folder = tmp_path / "mounted"
    folder.mkdir()

    def do(*arguments: str) -> Path:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield do
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("folders", [1, 2])
def test_a_disk_gone_read_only_serves_what_it_holds(
    open_manager: Open, mount: Callable[..., Path], tmp_path: Path, folders: int
) -> None:
    paths = [mount("-t", "tmpfs", "-o", "size=4m", "tmpfs"), tmp_path / "other"][:folders]

    disk = DiskBackend(DiskConfig(paths=tuple(paths), capacity=64 << 20))
    manager = open_manager(disk, chunks=128)
    store(manager, *range(16), *range(20, 40))
    assert manager.flush(WAIT_S)
    damaged = [n for n in range(20, 40) if disk.file_of(make_key(n)).is_relative_to(paths[0])]
    for number in damaged:
        with disk.file_of(make_key(number)).open("r+b") as file:
            file.seek(5000)
            file.write(b"damage")
    disk._folders[0].account.close()  # no file of a read-only file system is open for writing
    mount("-o", "remount,ro")
    for number in range(100, 116):
        store(manager, number)
        assert manager.flush(WAIT_S)
    assert (manager.health().tiers[0].writes.last_error is None) == (folders == 2), "the other folder takes them"
    assert damaged
    assert read_below(manager, *damaged * 4) == 0, "and cannot be removed"
    assert manager.health().tiers[0].reads.failures == 0
    assert read_below(manager, *range(16)) == 16
