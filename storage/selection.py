"""Which chunks an administrator means: those of a format, of a tenant, or all."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend


@dataclass(frozen=True)
class Selection:
    """fingerprint: of one KVFormat, or any. tenant: ``tenant_id`` of one tenant's name, or any."""

    fingerprint: bytes | None = None
    tenant: bytes | None = None

    def matches(self, key: ChunkKey) -> bool:
        return self.fingerprint in (None, key.fingerprint) and self.tenant in (None, key.tenant)


def clear_backend(backend: StorageBackend, selection: Selection) -> int:
    """Remove what is selected; more, where the place cannot list its keys: what must go is gone, the rest a miss."""
    if selection.tenant is None:
        return backend.clear(selection.fingerprint)
    return backend.clear_tenant(selection.tenant, selection.fingerprint)
