"""L4: the standalone server (``lmcache server``) as a tier; ``lm://host:port``, ``lms://`` over TLS.

Connections, deadlines and the check of every chunk are the client's (storage/backends/lm/client.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lmcache.keys import ChunkKey
from lmcache.storage.backends.lm.client import Client, ClientConfig
from lmcache.storage.base import Buffer, StorageBackend


class LMServerBackend(StorageBackend):
    """Chunks in a server that several engines share."""

    name: ClassVar[str] = "lm"
    Config = ClientConfig

    def __init__(self, config: ClientConfig) -> None:
        self._client = Client(config)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        return self._client.sizes(keys)

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        return self._client.get(keys, [buffer.view for buffer in into])

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return self._client.put(keys, [buffer.view for buffer in buffers])

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return self._client.remove(keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self._client.clear(fingerprint)

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        return self._client.clear(fingerprint, tenant)

    def close(self) -> None:
        self._client.close()
