"""Which chunks an administrator means: those of a format, of a tenant, or all."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lmcache.keys import FINGERPRINT_BYTES, ChunkKey
from lmcache.storage.base import StorageBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """fingerprint: of one KVFormat, or any. tags: the tag part of a namespace (its last 16 bytes), or any."""

    fingerprint: bytes | None = None
    tags: bytes | None = None

    def matches(self, key: ChunkKey) -> bool:
        return self.fingerprint in (None, key.fingerprint) and (
            self.tags is None or key.namespace[FINGERPRINT_BYTES:] == self.tags
        )


def clear_backend(backend: StorageBackend, selection: Selection) -> int:
    """Remove what is selected; more, where the place cannot list its keys: what must go is gone, the rest a miss."""
    if selection.tags is not None:
        if (keys := backend.keys()) is not None:
            return backend.remove([key for key in keys if selection.matches(key)])
        logger.warning("tier %s cannot list its keys: more than the chunks of the tenant is cleared", backend.name)
    return backend.clear(selection.fingerprint)
