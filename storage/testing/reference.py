"""A backend to compare others with, and to break on purpose: one file a chunk, and nothing clever."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ClosedError, CorruptChunkError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.naming import chunk_key, chunk_path


class FolderConfig(Config):
    """Options of ``FolderBackend``."""

    path: Path = Field(description="folder of the files, which no other process uses")
    capacity: ByteSize = Field(ByteSize(1 << 30), gt=0, description="bytes of files, headers included")


class FolderBackend(StorageBackend):
    """A file is written under another name and renamed. The lock is held for names and books, not for bytes."""

    name: ClassVar[str] = "folder"
    Config: ClassVar[type[Config]] = FolderConfig

    def __init__(self, config: FolderConfig) -> None:
        self._root = config.path
        self._capacity = int(config.capacity)
        self._sizes: dict[ChunkKey, int] = {}  # payload bytes, in the order in which they are evicted
        self._used = 0
        self._serial = itertools.count()
        self._lock = threading.RLock()
        self._closed = False
        self._root.mkdir(parents=True, exist_ok=True)
        self._scan()

    def file_of(self, key: ChunkKey) -> Path:
        """Where the chunk is, or would be."""
        return self._root / chunk_path(key)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        with self._working():
            return list(itertools.takewhile(bool, (self._sizes.get(key, 0) for key in keys)))

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        with self._working():
            for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
                if self._sizes.get(key) != buffer.nbytes or not self._load(key, buffer):
                    return count
            return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        with self._working():
            for key, buffer in zip(keys, buffers, strict=True):
                if key not in self._sizes and HEADER_BYTES + buffer.nbytes <= self._capacity:
                    self._store(key, buffer)
            with self._lock:  # the last ones may have pushed out the first ones
                return sum(key in self._sizes for key in keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        with self._working(), self._lock:
            return sum(self._drop(key) for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        with self._working(), self._lock:
            return sum(self._drop(key) for key in list(self._sizes) if fingerprint in (None, key.fingerprint))

    def keys(self) -> list[ChunkKey] | None:
        with self._working(), self._lock:
            return list(self._sizes)

    def close(self) -> None:
        self._closed = True

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Around every call: ClosedError after close(), StorageError for what the system raises."""
        if self._closed:
            raise ClosedError("the folder backend is closed")
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{self._root}: {error}") from error

    def _scan(self) -> None:
        for file in self._root.rglob("*.kv"):
            if (key := chunk_key(file.relative_to(self._root).as_posix())) is not None:
                self._add(key, file.stat().st_size - HEADER_BYTES)

    def _load(self, key: ChunkKey, buffer: Buffer) -> bool:
        try:
            with self.file_of(key).open("rb") as file:
                header = file.read(HEADER_BYTES)
                file.readinto(buffer.view)
            check_chunk(header, key, buffer.view)
        except FileNotFoundError:
            return False  # it was removed meanwhile
        except CorruptChunkError:
            metrics.CORRUPT_CHUNKS.labels(self.name).inc()
            with self._lock:
                self._drop(key)
            return False
        return True

    def _store(self, key: ChunkKey, buffer: Buffer) -> None:
        temporary = self._root / f"{next(self._serial)}.tmp"
        self._write(temporary, key, buffer)
        with self._lock:
            if key in self._sizes:
                temporary.unlink()  # another thread was faster
                return
            self.file_of(key).parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(self.file_of(key))
            self._add(key, buffer.nbytes)

    def _write(self, path: Path, key: ChunkKey, buffer: Buffer) -> None:
        with path.open("wb") as file:
            file.write(encode_header(key, buffer.view))
            file.write(buffer.view)

    def _add(self, key: ChunkKey, nbytes: int) -> None:
        """Know a chunk, with the lock held, and evict the oldest for it."""
        self._sizes[key] = nbytes
        self._used += HEADER_BYTES + nbytes
        while self._used > self._capacity:
            self._drop(next(iter(self._sizes)))

    def _drop(self, key: ChunkKey) -> bool:
        """Forget a chunk, with the lock held; whether it was there."""
        if key not in self._sizes:
            return False
        self.file_of(key).unlink(missing_ok=True)
        self._used -= HEADER_BYTES + self._sizes.pop(key)
        return True
