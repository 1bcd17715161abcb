"""Backends and policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcache.config import build
from lmcache.errors import ConfigError
from lmcache.registry import Registry, split_type
from lmcache.storage.base import StorageBackend
from lmcache.storage.eviction import EvictionPolicy

STORAGE_BACKENDS: Registry[type[StorageBackend]] = Registry(
    "storage backend", {"disk": "lmcache.storage.backends.disk:DiskBackend"}, "lmcache.storage_backends"
)
EVICTION_POLICIES: Registry[Callable[[], EvictionPolicy]] = Registry(
    "eviction policy", {"lru": "lmcache.storage.eviction:LRU"}, "lmcache.eviction_policies"
)


def build_backend(options: Mapping[str, Any], where: str) -> StorageBackend:
    """``{type: disk, path: ..., capacity: 10GiB}`` -> a backend. ConfigError names what is known."""
    name, rest = split_type(options, where)
    backend = STORAGE_BACKENDS.get(name)
    return backend(build(backend.Config, rest, f"{where} ({name})"))


def build_tiers(tiers: Sequence[Mapping[str, Any]]) -> list[StorageBackend]:
    """The tiers of a config, nearest first; those already open are closed when a later one is wrong."""
    built: list[StorageBackend] = []
    try:
        for index, options in enumerate(tiers):
            built.append(build_backend(options, f"tiers[{index}]"))
    except (ConfigError, OSError):
        for backend in built:
            backend.close()
        raise
    return built
