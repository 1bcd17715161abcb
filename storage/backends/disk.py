"""L3: one file a chunk in a folder.

    <path>/<format fingerprint>/<tag hash>/<digest>.kv      header (4096 bytes), payload

A file is written under a temporary name and renamed, so it is there whole or not at all. The index is rebuilt at start
from names and sizes. There is no fsync: a power cut may lose chunks, and the checksum turns what it leaves into misses.
Several processes may share a folder: one's files are found by the others, and a file that went away is a miss.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ConfigError, CorruptChunkError, StorageError
from lmcache.keys import FINGERPRINT_BYTES, ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.registry import EVICTION_POLICIES

logger = logging.getLogger(__name__)

SUFFIX, TEMPORARY = ".kv", ".tmp-"
# The token tells our temporary files from those of a killed process that had our pid, as in a restarted container.
_TOKEN = secrets.token_hex(4)
_serial = itertools.count()


class DiskConfig(Config):
    """Options of ``{type: disk}``."""

    path: Path = Field(description="folder of the chunks; made when it is not there")
    capacity: ByteSize = Field(ByteSize(10 << 30), gt=HEADER_BYTES, description="bytes of files, for example 100GiB")
    eviction: str = Field("lru", description="name of the eviction policy")


class DiskBackend(StorageBackend):
    """Chunks as files."""

    name: ClassVar[str] = "disk"
    Config = DiskConfig

    def __init__(self, config: DiskConfig) -> None:
        self._root = config.path.expanduser()
        self._capacity = config.capacity
        self._policy = EVICTION_POLICIES.get(config.eviction)()
        self._sizes: dict[ChunkKey, int] = {}
        self._used = 0
        self._lock = threading.Lock()
        self._check_writable()
        self._rebuild_index()

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        sizes: list[int] = []
        for key in keys:
            size = self._known(key)
            if not size:
                break
            sizes.append(size - HEADER_BYTES)
        return sizes

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            try:
                if not self._read(key, buffer.view):
                    return count
            except CorruptChunkError as error:
                metrics.CORRUPT_CHUNKS.labels(self.name).inc()
                logger.warning("removed %s: %s", self._path(key), error)
                self.remove([key])
                return count
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        held = 0
        for key, buffer in zip(keys, buffers, strict=True):
            if self._known(key):
                held += 1
            elif self._reserve(HEADER_BYTES + buffer.nbytes):
                try:
                    self._write(key, buffer.view)
                except OSError as error:
                    self._unreserve(HEADER_BYTES + buffer.nbytes)
                    raise StorageError(f"cannot write {self._path(key)}: {error}") from error
                self._index(key, HEADER_BYTES + buffer.nbytes, reserved=True)
                held += 1
        return held

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        count = 0
        for key in keys:
            self._forget(key)
            try:
                self._path(key).unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"cannot remove {self._path(key)}: {error}") from error
            count += 1
        return count

    def clear(self, fingerprint: bytes | None = None) -> int:
        # By the folder and not by the index, so that what other processes wrote goes too.
        return sum(self.remove([key]) for key, _ in list(self._files()) if fingerprint in (None, key.fingerprint))

    def close(self) -> None:
        """Nothing is open between calls."""

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def used_bytes(self) -> int:
        return self._used

    def _path(self, key: ChunkKey) -> Path:
        tags = key.namespace[FINGERPRINT_BYTES:]
        return self._root / key.fingerprint.hex() / tags.hex() / f"{key.digest.hex()}{SUFFIX}"

    def _known(self, key: ChunkKey) -> int:
        """Bytes of its file, 0 where there is none."""
        with self._lock:
            if size := self._sizes.get(key, 0):
                return size
        try:
            size = self._path(key).stat().st_size
        except OSError:
            return 0
        if size <= HEADER_BYTES:
            return 0
        self._index(key, size)
        return size

    def _read(self, key: ChunkKey, view: memoryview) -> bool:
        try:
            file = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._forget(key)
            return False
        try:
            size = os.fstat(file).st_size
            if size != HEADER_BYTES + view.nbytes:
                raise CorruptChunkError(f"file of {size} bytes, expected {HEADER_BYTES + view.nbytes}")
            header = bytearray(HEADER_BYTES)
            _all(os.preadv, file, [memoryview(header), view])
        except OSError as error:
            if isinstance(error, CorruptChunkError):
                raise
            raise StorageError(f"cannot read {self._path(key)}: {error}") from error
        finally:
            os.close(file)
        check_chunk(memoryview(header), key, view)
        with self._lock:
            self._policy.touch(key)
        with contextlib.suppress(OSError):
            os.utime(self._path(key))  # the order of use survives a restart
        return True

    def _write(self, key: ChunkKey, view: memoryview) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(_temporary_name())
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                _all(os.pwritev, file, [memoryview(encode_header(key, view)), view])
            finally:
                os.close(file)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _index(self, key: ChunkKey, size: int, *, reserved: bool = False) -> None:
        with self._lock:
            old = self._sizes.get(key, 0)
            self._sizes[key] = size
            self._used += (0 if reserved else size) - old
            self._policy.add(key, size)

    def _forget(self, key: ChunkKey) -> None:
        with self._lock:
            self._used -= self._sizes.pop(key, 0)
            self._policy.remove(key)

    def _reserve(self, size: int) -> bool:
        if size > self._capacity:
            return False
        with self._lock:
            victims = []
            free = self._capacity - self._used
            for key in self._policy.victims():
                if free >= size:
                    break
                victims.append(key)
                free += self._sizes[key]
            if free < size:
                return False  # other writers have reserved what is not indexed yet
            for key in victims:
                self._used -= self._sizes.pop(key)
                self._policy.remove(key)
            self._used += size
        for key in victims:
            with contextlib.suppress(OSError):
                self._path(key).unlink(missing_ok=True)
        metrics.EVICTED_CHUNKS.labels(self.name).inc(len(victims))
        return True

    def _unreserve(self, size: int) -> None:
        with self._lock:
            self._used -= size

    def _check_writable(self) -> None:
        probe = self._root / _temporary_name()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"the disk tier cannot write to {self._root}: {error}") from error

    def _files(self) -> Iterator[tuple[ChunkKey, os.DirEntry[str]]]:
        for directory, entry in self._entries():
            if entry.name.endswith(SUFFIX) and (key := _key(directory, entry.name)) is not None:
                yield key, entry

    def _entries(self) -> Iterator[tuple[Path, os.DirEntry[str]]]:
        for directory in self._root.glob("*/*"):
            with contextlib.suppress(NotADirectoryError, FileNotFoundError), os.scandir(directory) as entries:
                for entry in entries:
                    yield directory, entry

    def _rebuild_index(self) -> None:
        found = []
        for directory, entry in self._entries():
            try:
                if entry.name.startswith(TEMPORARY):
                    _remove_if_orphaned(entry)
                elif entry.name.endswith(SUFFIX) and (key := _key(directory, entry.name)) is not None:
                    stat = entry.stat()
                    if stat.st_size <= HEADER_BYTES:
                        os.unlink(entry.path)
                        metrics.CORRUPT_CHUNKS.labels(self.name).inc()
                        logger.warning("removed %s: %d bytes are no chunk", entry.path, stat.st_size)
                    else:
                        found.append((stat.st_mtime_ns, key, stat.st_size))
            except FileNotFoundError:
                continue  # another process was faster
        for _, key, size in sorted(found):
            self._index(key, size)
        self._reserve(0)


def _key(directory: Path, name: str) -> ChunkKey | None:
    """The key that a file is named after; None for a file that is not ours."""
    try:
        return ChunkKey.from_bytes(bytes.fromhex(directory.parent.name + directory.name + name.removesuffix(SUFFIX)))
    except ValueError:
        return None


def _temporary_name() -> str:
    return f"{TEMPORARY}{os.getpid()}-{_TOKEN}-{next(_serial)}"


def _remove_if_orphaned(entry: os.DirEntry[str]) -> None:
    pid, _, rest = entry.name.removeprefix(TEMPORARY).partition("-")
    if not pid.isdecimal() or not rest:
        return  # not one of ours
    if int(pid) == os.getpid():
        orphaned = not rest.startswith(_TOKEN)
    else:
        try:
            os.kill(int(pid), 0)
            orphaned = False
        except PermissionError:
            orphaned = False
        except (ProcessLookupError, OverflowError):
            orphaned = True
    if orphaned:
        os.unlink(entry.path)


def _all(call: object, file: int, views: list[memoryview]) -> None:
    """preadv or pwritev until every byte is done; OSError when the file ends first."""
    offset, total = 0, sum(view.nbytes for view in views)
    while offset < total:
        skip, rest = offset, []
        for view in views:
            rest += [view[skip:]] if skip < view.nbytes else []
            skip = max(0, skip - view.nbytes)
        done = call(file, rest, offset)  # type: ignore[operator]
        if done == 0:
            raise OSError(f"the file ended after {offset} of {total} bytes")
        offset += done
