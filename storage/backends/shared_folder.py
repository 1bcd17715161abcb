"""L4: one file a chunk in a folder that several hosts share, over NFS for example.

    <folder>/<format fingerprint>/<tag hash>/<digest>.kv      header (4096 bytes), payload
    <folder>/.writing/                                        files that are not complete yet

What the folder says is what is so: there is no index of our own that could be wrong about other hosts' files. A file is
written beside the others and renamed, so it is there whole or not at all. There is no fsync: a server that loses power
may lose chunks, and the checksum turns what it leaves into misses.
A mount that hangs (NFS with ``hard``) hangs its caller too; the manager's deadlines are what ends that.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ConfigError, CorruptChunkError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, check_header, encode_header
from lmcache.storage.layout import chunk_key, chunk_path, namespace_path

logger = logging.getLogger(__name__)

WRITING = ".writing"
# Above so many keys one listing of their folder is cheaper than a question for each, as each is a round trip.
FEW = 64
# A sweep looks at every file, so it runs once this share of the capacity has been written since the last.
SWEEP_SHARE = 1 / 32
# What a file that was removed, perhaps by another host, answers.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
# Other hosts' processes cannot be asked whether they live.
_HOST, _TOKEN = socket.gethostname(), secrets.token_hex(4)
_serial = itertools.count()


class SharedFolderConfig(Config):
    """Options of ``{type: remote, url: "fs:///mnt/kv"}``."""

    url: str = Field(description="fs:// and the path of the folder, which is made when it is not there")
    capacity: ByteSize | None = Field(
        None, gt=HEADER_BYTES, description="bytes of files; the least recently used go. null: the folder is not bounded"
    )
    orphan_age_s: float = Field(3600.0, gt=0, description="age in seconds from which unfinished files are removed")


class SharedFolderBackend(StorageBackend):
    """Chunks as files that any host may add or remove."""

    name: ClassVar[str] = "shared_folder"
    Config = SharedFolderConfig

    def __init__(self, config: SharedFolderConfig) -> None:
        parts = urlsplit(config.url)
        if parts.netloc or not parts.path.startswith("/") or parts.path == "/":
            raise ConfigError(f"{config.url}: expected fs:///path/of/a/folder")
        self._root = Path(unquote(parts.path))
        self._writing = self._root / WRITING
        self._capacity = config.capacity
        self._orphan_age_s = config.orphan_age_s
        self._unswept = 0
        self._lock = threading.Lock()
        try:
            self._writing.mkdir(parents=True, exist_ok=True)
            probe = self._writing / _temporary_name()
            probe.write_bytes(b"")
            probe.unlink()
            self._remove_orphans()
        except OSError as error:
            raise ConfigError(f"cannot write to the shared folder {self._root}: {error}") from error
        if self._capacity is not None:
            self._sweep(self._capacity)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        listed: dict[ChunkKey, int] | None = None
        sizes: list[int] = []
        for number, key in enumerate(keys):
            if number >= FEW and listed is None:
                listed = self._list(set(keys[number:]))
            size = self._stat(key) if listed is None else listed.get(key, 0)
            if size <= HEADER_BYTES:
                if size:
                    self._damaged(key, f"{size} bytes are no chunk")
                break
            sizes.append(size - HEADER_BYTES)
        return sizes

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            try:
                if not self._read(key, buffer.view):
                    return count
            except CorruptChunkError as error:
                self._damaged(key, str(error))
                return count
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        held: list[ChunkKey] = []
        for key, buffer in zip(keys, buffers, strict=True):
            size = HEADER_BYTES + buffer.nbytes
            if self._stat(key) > HEADER_BYTES:
                held.append(key)
            elif self._capacity is None or size <= self._capacity:
                self._write(key, buffer.view)
                self._account(size)
                held.append(key)
        # Those that came first may have gone for the last ones.
        return len(held) if self._capacity is None else sum(self._stat(key) > HEADER_BYTES for key in held)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return sum(self._unlink(self._path(key)) for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        count = 0
        for path, _ in self._files(None if fingerprint is None else fingerprint.hex()):
            count += self._unlink(path)
        return count

    def keys(self) -> list[ChunkKey]:
        return [key for path, _ in self._files(None) if (key := self._key(path)) is not None]

    def close(self) -> None:
        """Nothing is open between calls."""

    def _path(self, key: ChunkKey) -> Path:
        return self._root / chunk_path(key)

    def _key(self, path: Path) -> ChunkKey | None:
        return chunk_key(path.relative_to(self._root).as_posix())

    def _stat(self, key: ChunkKey) -> int:
        """Bytes of its file, 0 where there is none."""
        try:
            return self._path(key).stat().st_size
        except OSError as error:
            if error.errno in _GONE:
                return 0
            raise StorageError(f"cannot look up {self._path(key)}: {error}") from error

    def _list(self, wanted: set[ChunkKey]) -> dict[ChunkKey, int]:
        """Bytes of the files of those that are there."""
        found: dict[ChunkKey, int] = {}
        for namespace in {key.namespace for key in wanted}:
            for path, entry in self._folder(self._root / namespace_path(namespace)):
                key = self._key(path)
                if key is not None and key in wanted:
                    with contextlib.suppress(FileNotFoundError):
                        found[key] = entry.stat().st_size
        return found

    def _read(self, key: ChunkKey, view: memoryview) -> bool:
        path = self._path(key)
        header = bytearray(HEADER_BYTES)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size
                wanted = HEADER_BYTES + view.nbytes
                done = _transfer(
                    os.preadv, file, [memoryview(header), view] if size == wanted else [memoryview(header)]
                )
            finally:
                os.close(file)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise StorageError(f"cannot read {path}: {error}") from error
        if size != wanted:
            # Who is wrong, the file or the caller? The header tells.
            if done != HEADER_BYTES or check_header(bytes(header), key)[0] != size - HEADER_BYTES:
                raise CorruptChunkError(f"file of {size} bytes, which is not what its header says")
            return False
        if done != size:
            raise CorruptChunkError(f"the file ended after {done} of {size} bytes")
        check_chunk(bytes(header), key, view)
        if self._capacity is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # the order of use, for whoever sweeps
        return True

    def _write(self, key: ChunkKey, view: memoryview) -> None:
        path, temporary = self._path(key), self._writing / _temporary_name()
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660)
            try:
                try:
                    _transfer(os.pwritev, file, [memoryview(encode_header(key, view)), view])
                finally:
                    os.close(file)  # over NFS it is this that says that a disk is full
                try:
                    temporary.rename(path)
                except FileNotFoundError:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    temporary.rename(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    def _damaged(self, key: ChunkKey, why: str) -> None:
        metrics.CORRUPT_CHUNKS.labels(self.name).inc()
        logger.warning("removed %s: %s", self._path(key), why)
        self._unlink(self._path(key))

    def _unlink(self, path: Path) -> bool:
        try:
            path.unlink()
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise StorageError(f"cannot remove {path}: {error}") from error
        return True

    def _account(self, size: int) -> None:
        if self._capacity is None:
            return
        with self._lock:
            self._unswept += size
            due = self._unswept > self._capacity * SWEEP_SHARE
            if due:
                self._unswept = 0
        if due:
            # Below the capacity by what may be written until the next sweep.
            self._sweep(int(self._capacity * (1 - SWEEP_SHARE)))

    def _sweep(self, most: int) -> None:
        """Remove the least recently used files until no more than ``most`` bytes are left."""
        files = []
        for path, entry in self._files(None):
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        used, victims = sum(size for _, size, _ in files), 0
        for _, size, path in sorted(files):
            if used <= most:
                break
            victims += self._unlink(path)
            used -= size
        metrics.EVICTED_CHUNKS.labels(self.name).inc(victims)

    def _remove_orphans(self) -> None:
        for path, entry in self._folder(self._writing):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > self._orphan_age_s:
                    path.unlink()

    def _files(self, fingerprint: str | None) -> Iterator[tuple[Path, os.DirEntry[str]]]:
        """Every chunk of one format, or of all."""
        for format_path, _ in self._folder(self._root):
            if fingerprint in (None, format_path.name):
                for tag_path, _ in self._folder(format_path):
                    for path, entry in self._folder(tag_path):
                        if self._key(path) is not None:
                            yield path, entry

    def _folder(self, folder: Path) -> Iterator[tuple[Path, os.DirEntry[str]]]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield folder / entry.name, entry
        except OSError as error:
            if error.errno not in _GONE:
                raise StorageError(f"cannot list {folder}: {error}") from error


def _temporary_name() -> str:
    return f"{_HOST}-{os.getpid()}-{_TOKEN}-{next(_serial)}"  # not those of a child by fork


def _transfer(call: Callable[[int, list[memoryview], int], int], file: int, views: list[memoryview]) -> int:
    """preadv or pwritev until every byte is done or the file ends; returns the bytes done."""
    offset = 0
    while rest := _after(views, offset):
        done = call(file, rest, offset)
        if done == 0:
            break
        offset += done
    return offset


def _after(views: list[memoryview], skip: int) -> list[memoryview]:
    rest = []
    for view in views:
        if skip < view.nbytes:
            rest.append(view[skip:])
        skip = max(0, skip - view.nbytes)
    return rest
