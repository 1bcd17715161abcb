"""What the package's own tests would be: the shipped suite and machine, and a start by name in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lmcache_ramdisk
import pytest
from hypothesis import settings

from lmcache.config import LMCacheConfig
from lmcache.errors import ConfigError
from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.manager import StorageManager
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendMachine, BackendTests


class TestRamdisk(BackendTests):
    durable = False

    @pytest.fixture
    def open_backend(self) -> Callable[[], StorageBackend]:
        return lambda: build_backend({"type": "ramdisk", "capacity": "64MiB"}, "tiers[0]")

    @pytest.fixture
    def open_small_backend(self) -> Callable[[], StorageBackend]:
        return lambda: build_backend({"type": "ramdisk", "capacity": "1MiB"}, "tiers[0]")

    @pytest.fixture
    def damage(self, backend: StorageBackend) -> Callable[[ChunkKey], None]:
        def change(key: ChunkKey) -> None:
            chunk = backend._chunks[key]
            backend._chunks[key] = chunk[:-1] + bytes([chunk[-1] ^ 1])

        return change


def open_in(folder: Path) -> StorageBackend:
    return build_backend({"type": "ramdisk", "capacity": "64MiB"}, "tiers[0]")  # it has no use for the folder


class RamdiskMachine(BackendMachine(open_in)):
    durable = False  # restarts forget
    lossless = True  # 64 MiB have room for all that the machine puts


RamdiskMachine.TestCase.settings = settings(max_examples=30, deadline=None)
TestRamdiskMachine = RamdiskMachine.TestCase


def test_it_is_found_by_its_name_and_checks_its_options() -> None:
    manager = StorageManager(LMCacheConfig(tiers=({"type": "ramdisk"},)))
    assert isinstance(manager._tiers[0].backend, lmcache_ramdisk.RamdiskBackend)
    manager.close()
    with pytest.raises(ConfigError, match="unknown key capactiy; known: capacity"):
        build_backend({"type": "ramdisk", "capactiy": 1}, "tiers[0]")
