"""A backend of a third party: chunks in this process's memory, each behind its header, oldest out first."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.extend import (
    HEADER_BYTES,
    Buffer,
    ChunkKey,
    ClosedError,
    Config,
    CorruptChunkError,
    StorageBackend,
    check_chunk,
    encode_header,
)


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
        self._nbytes = 0
        self._lock = threading.Lock()
        self._closed = False

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._check_open()
        found: list[int] = []
        for key in keys:
            if (chunk := self._chunks.get(key)) is None:
                break
            found.append(len(chunk) - HEADER_BYTES)
        return found

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        self._check_open()
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            chunk = self._chunks.get(key)
            if chunk is None or len(chunk) != HEADER_BYTES + buffer.nbytes:
                return count
            buffer.view[:] = memoryview(chunk)[HEADER_BYTES:]
            try:
                check_chunk(chunk[:HEADER_BYTES], key, buffer.view)
            except CorruptChunkError:
                metrics.CORRUPT_CHUNKS.labels(self.name).inc()
                with self._lock:
                    self._drop(key)
                return count
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._check_open()
        for key, buffer in zip(keys, buffers, strict=True):
            if HEADER_BYTES + buffer.nbytes > self._capacity:
                continue
            chunk = encode_header(key, buffer.view) + bytes(buffer.view)
            with self._lock:
                if key not in self._chunks:
                    self._chunks[key] = chunk
                    self._nbytes += len(chunk)
                while self._nbytes > self._capacity:
                    self._drop(next(iter(self._chunks)))
        with self._lock:  # the last ones may have pushed out the first ones
            return sum(key in self._chunks for key in keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self._check_open()
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._check_open()
        with self._lock:
            return sum(self._drop(key) for key in list(self._chunks) if fingerprint in (None, key.fingerprint))

    def _drop(self, key: ChunkKey) -> bool:
        chunk = self._chunks.pop(key, None)
        self._nbytes -= len(chunk or b"")
        return chunk is not None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._chunks.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the ramdisk is closed")
