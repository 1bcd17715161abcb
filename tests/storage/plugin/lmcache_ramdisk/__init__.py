"""A backend of a third party: chunks in this process's memory, each behind its header, oldest out first."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import CorruptChunkError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header


class RamdiskConfig(Config):
    """Options of ``{type: ramdisk, ...}``."""

    capacity: ByteSize = Field(ByteSize(1 << 30), gt=0, description="bytes of chunks, headers included")


class RamdiskBackend(StorageBackend):
    """Forgets everything when it is closed."""

    name: ClassVar[str] = "ramdisk"
    Config: ClassVar[type[Config]] = RamdiskConfig

    def __init__(self, config: RamdiskConfig) -> None:
        self._capacity = int(config.capacity)
        self._chunks: dict[ChunkKey, bytes] = {}
        self._lock = threading.Lock()

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        found: list[int] = []
        for key in keys:
            if (chunk := self._chunks.get(key)) is None:
                break
            found.append(len(chunk) - HEADER_BYTES)
        return found

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            chunk = self._chunks.get(key)
            if chunk is None or len(chunk) != HEADER_BYTES + buffer.nbytes:
                return count
            buffer.view[:] = memoryview(chunk)[HEADER_BYTES:]
            try:
                check_chunk(chunk[:HEADER_BYTES], key, buffer.view)
            except CorruptChunkError:
                metrics.CORRUPT_CHUNKS.labels(self.name).inc()
                self.remove([key])
                return count
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        held = 0
        for key, buffer in zip(keys, buffers, strict=True):
            chunk = encode_header(key, buffer.view) + bytes(buffer.view)
            with self._lock:
                self._chunks.setdefault(key, chunk)
                while sum(map(len, self._chunks.values())) > self._capacity:
                    del self._chunks[next(iter(self._chunks))]
                held += key in self._chunks
        return held

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        with self._lock:
            return sum(self._chunks.pop(key, None) is not None for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        with self._lock:
            gone = [key for key in self._chunks if fingerprint in (None, key.fingerprint)]
            for key in gone:
                del self._chunks[key]
        return len(gone)

    def close(self) -> None:
        self.clear()
