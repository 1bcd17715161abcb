"""What the package's own tests would be: the shipped suite, and a start through the configuration by name."""

from __future__ import annotations

from collections.abc import Callable

import lmcache_ramdisk
import pytest

from lmcache.config import LMCacheConfig
from lmcache.errors import ConfigError
from lmcache.storage.base import StorageBackend
from lmcache.storage.manager import StorageManager
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests


class TestRamdisk(BackendTests):
    durable = False

    @pytest.fixture
    def open_backend(self) -> Callable[[], StorageBackend]:
        return lambda: build_backend({"type": "ramdisk", "capacity": "64MiB"}, "tiers[0]")

    @pytest.fixture
    def open_small_backend(self) -> Callable[[], StorageBackend]:
        return lambda: build_backend({"type": "ramdisk", "capacity": "1MiB"}, "tiers[0]")


def test_it_is_found_by_its_name_and_checks_its_options() -> None:
    manager = StorageManager(LMCacheConfig(tiers=({"type": "ramdisk"},)))
    assert isinstance(manager._tiers[0].backend, lmcache_ramdisk.RamdiskBackend)
    manager.close()
    with pytest.raises(ConfigError, match="unknown key capactiy; known: capacity"):
        build_backend({"type": "ramdisk", "capactiy": 1}, "tiers[0]")
