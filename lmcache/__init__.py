"""LMCache, Triton edition: a KV-cache layer for LLM inference.

Nothing heavy is imported here: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BlendEngine": "lmcache.blend.standalone",
    "Blender": "lmcache.blend.blender",
    "CacheEngine": "lmcache.engine.engine",
    "ChunkKey": "lmcache.keys",
    "KVFormat": "lmcache.keys",
    "LMCacheConfig": "lmcache.config",
    "LMCacheError": "lmcache.errors",
    "PagedCache": "lmcache.engine.layout",
    "StorageManager": "lmcache.storage.manager",
    "load_config": "lmcache.config",
}

__all__ = [
    "BlendEngine",
    "Blender",
    "CacheEngine",
    "ChunkKey",
    "KVFormat",
    "LMCacheConfig",
    "LMCacheError",
    "PagedCache",
    "StorageManager",
    "load_config",
]

if TYPE_CHECKING:
    from lmcache.blend.blender import Blender
    from lmcache.blend.standalone import BlendEngine
    from lmcache.config import LMCacheConfig, load_config
    from lmcache.engine.engine import CacheEngine
    from lmcache.engine.layout import PagedCache
    from lmcache.errors import LMCacheError
    from lmcache.keys import ChunkKey, KVFormat
    from lmcache.storage.manager import StorageManager


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
