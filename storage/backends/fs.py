"""L4: one file a chunk in a folder that several hosts share, over NFS for example.

    <folder>/<format fingerprint>/<tenant and tags>/<digest>.kv      header (4096 bytes), payload
    <folder>/.writing/                                        files that are not complete yet

Every lookup asks the folder: an index here would be wrong about what other hosts add and remove. A file is written
beside the others and renamed, so it is there whole or not at all. There is no fsync: a server that loses power may lose
chunks, and the checksum turns what it leaves into misses.
A mount that hangs (NFS with ``hard``) hangs its caller too; the manager's deadlines are what ends that.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ClosedError, ConfigError, CorruptChunkError, OddFileError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, check_header, encode_header
from lmcache.storage.files.direct_io import transfer
from lmcache.storage.files.regular_files import GONE, Folders, Oddities, Spot, oddity, open_to_read
from lmcache.storage.naming import chunk_key, chunk_name, chunk_path, namespace_path

WRITING = ".writing"
# Above so many keys one listing of their folder is cheaper than a question for each, as each is a round trip.
FEW = 64
# A sweep looks at every file, so it runs once this share of the capacity has been written since the last.
SWEEP_SHARE = 1 / 32
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
        self._odd = Oddities(self.name)
        self._folders = Folders(str(self._root), self._odd)
        self._capacity = config.capacity
        self._orphan_age_s = config.orphan_age_s
        self._unswept = 0
        self._lock = threading.Lock()
        self._closed = False
        try:
            probe = Spot(self._folders.make(WRITING), _temporary_name())
            os.close(probe.create(os.O_WRONLY))
            probe.remove()
            self._remove_orphans()
        except OSError as error:
            raise ConfigError(f"cannot write to the shared folder {self._root}: {error}") from error
        if self._capacity is not None:
            self._sweep(self._capacity)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._check_open()
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
        self._check_open()
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            try:
                if not self._read(key, buffer.view):
                    return count
            except CorruptChunkError as error:
                self._damaged(key, str(error))
                return count
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._check_open()
        held: list[ChunkKey] = []
        for key, buffer in zip(keys, buffers, strict=True):
            size = HEADER_BYTES + buffer.nbytes
            if self._stat(key) > HEADER_BYTES:
                held.append(key)
            elif (self._capacity is None or size <= self._capacity) and self._write(key, buffer.view):
                self._account(size)
                held.append(key)
        # Those that came first may have gone for the last ones.
        return len(held) if self._capacity is None else sum(self._stat(key) > HEADER_BYTES for key in held)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self._check_open()
        return sum(self._unlink(key) for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._check_open()
        return sum(self._unlink(key) for key, _ in self._files(None if fingerprint is None else fingerprint.hex()))

    def keys(self) -> list[ChunkKey]:
        self._check_open()
        return [key for key, _ in self._files(None)]

    def close(self) -> None:
        """No call is under way any more, so nothing is open."""
        self._closed = True
        self._folders.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the shared folder {self._root} is closed")

    def _path(self, key: ChunkKey) -> Path:
        """For messages; files are opened by ``_spot``."""
        return self._root / chunk_path(key)

    def _spot(self, key: ChunkKey) -> Spot:
        """An error of ``GONE`` when its folder is not there."""
        return Spot(self._folders.get(namespace_path(key.namespace)), chunk_name(key))

    def _stat(self, key: ChunkKey) -> int:
        """Bytes of its file, 0 where there is none."""
        try:
            return self._size(self._spot(key))
        except OSError as error:
            if error.errno in GONE:
                return 0
            raise StorageError(f"cannot look up {self._path(key)}: {error}") from error

    def _list(self, wanted: set[ChunkKey]) -> dict[ChunkKey, int]:
        """Bytes of the files of those that are there."""
        found: dict[ChunkKey, int] = {}
        for namespace in {namespace_path(key.namespace) for key in wanted}:
            for key, spot in self._chunks(namespace):
                if key in wanted:
                    with contextlib.suppress(FileNotFoundError):
                        found[key] = self._size(spot)
        return found

    def _read(self, key: ChunkKey, view: memoryview) -> bool:
        header = bytearray(HEADER_BYTES)
        try:
            file, found = open_to_read(self._spot(key), os.O_RDONLY, self._odd)
            try:
                size = found.st_size
                wanted = HEADER_BYTES + view.nbytes
                parts = [memoryview(header), view] if size == wanted else [memoryview(header)]
                done = transfer(os.preadv, file, parts, wanted if size == wanted else HEADER_BYTES)
                if done == wanted and self._capacity is not None:
                    with contextlib.suppress(OSError):
                        os.utime(file)  # the order of use, for whoever sweeps
            finally:
                os.close(file)
        except OddFileError:
            raise
        except OSError as error:
            if error.errno in GONE:
                return False
            raise StorageError(f"cannot read {self._path(key)}: {error}") from error
        if size != wanted:
            # Who is wrong, the file or the caller? The header tells.
            if done != HEADER_BYTES or check_header(bytes(header), key)[0] != size - HEADER_BYTES:
                raise CorruptChunkError(f"file of {size} bytes, which is not what its header says")
            return False
        if done != size:
            raise CorruptChunkError(f"the file ended after {done} of {size} bytes")
        check_chunk(bytes(header), key, view)
        return True

    def _write(self, key: ChunkKey, view: memoryview) -> bool:
        """False when a folder that is not empty has its name."""
        try:
            temporary = Spot(self._folders.get(WRITING), _temporary_name())
            file = temporary.create(os.O_WRONLY, 0o660)
            parts = [memoryview(encode_header(key, view)), view]
            try:
                try:
                    transfer(os.pwritev, file, parts, HEADER_BYTES + view.nbytes)
                finally:
                    os.close(file)  # over NFS it is this that says that a disk is full
                self._publish(temporary, key)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.remove()
                raise
        except OddFileError:
            return False
        except OSError as error:
            raise StorageError(f"cannot write {self._path(key)}: {error}") from error
        return True

    def _publish(self, temporary: Spot, key: ChunkKey) -> None:
        """Give a finished file its name, whatever but a folder has that. OddFileError when a folder does, and stays."""
        namespace, name = namespace_path(key.namespace), chunk_name(key)
        for folder in (self._folders.get, self._folders.make, self._folders.make):
            try:
                spot = Spot(folder(namespace), name)
                temporary.rename(spot)
                return
            except IsADirectoryError:
                if not self._odd.remove(spot, "a folder, not a file of ours"):
                    raise OddFileError("a folder stands in its place") from None
            except OSError as error:
                if error.errno not in GONE:
                    raise
        raise FileNotFoundError(errno.ENOENT, "its folder goes as often as it is made", str(self._path(key)))

    def _damaged(self, key: ChunkKey, why: str) -> None:
        try:
            removed = self._unlink(key)
        except StorageError:  # it stays, but nobody is given it
            removed = False
        self._odd.found(str(self._path(key)), why, removed=removed)

    def _unlink(self, key: ChunkKey) -> bool:
        try:
            return self._spot(key).remove()
        except OSError as error:
            if error.errno in GONE:
                return False
            raise StorageError(f"cannot remove {self._path(key)}: {error}") from error

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
        files: list[tuple[int, int, ChunkKey]] = []
        for key, spot in self._files(None):
            with contextlib.suppress(FileNotFoundError):
                found = spot.stat()
                if stat.S_ISREG(found.st_mode):
                    files.append((found.st_mtime_ns, found.st_size, key))
        used, victims = sum(size for _, size, _ in files), 0
        for _, size, key in sorted(files):
            if used <= most:
                break
            victims += self._unlink(key)
            used -= size
        metrics.EVICTED_CHUNKS.labels(self.name).inc(victims)

    def _remove_orphans(self) -> None:
        for spot in self._folders.spots(WRITING):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - spot.stat().st_mtime > self._orphan_age_s:
                    with contextlib.suppress(PermissionError):
                        spot.remove()

    def _size(self, spot: Spot) -> int:
        """Bytes of a file; 0 of what is no file of ours, which a write replaces."""
        found = spot.stat()
        if why := oddity(found):
            self._odd.found(str(spot), f"{why}, not a file of ours", removed=False)
            return 0
        return found.st_size

    def _files(self, fingerprint: str | None) -> Iterator[tuple[ChunkKey, Spot]]:
        """What has the name of a chunk of one format, or of all."""
        with self._listing(self._root):
            namespaces = list(self._folders.namespaces(fingerprint))
        for namespace in namespaces:
            yield from self._chunks(namespace)

    def _chunks(self, namespace: str) -> list[tuple[ChunkKey, Spot]]:
        with self._listing(self._root / namespace):
            spots = self._folders.spots(namespace)
        return [(key, spot) for spot in spots if (key := chunk_key(f"{namespace}/{spot.name}")) is not None]

    @contextlib.contextmanager
    def _listing(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot list {folder}: {error}") from error


def _temporary_name() -> str:
    return f"{_HOST}-{os.getpid()}-{_TOKEN}-{next(_serial)}"  # not those of a child by fork
