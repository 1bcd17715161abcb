"""A file that remembers which chunks lie in a place that cannot be listed.

0   4       5         85       93        101
LMJ2 +or-   chunk key  bytes    xxh3-64            one record after the other; a later one of a key counts

Processes that share a place share the journal: records are appended whole, and what others append is read when it is
asked for. A record that is not whole, because a writer was killed or the disk was full, is skipped.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import threading
from pathlib import Path

import xxhash

from lmcache.errors import ConfigError, OddFileError, StorageError
from lmcache.keys import KEY_BYTES, ChunkKey
from lmcache.storage.files.regular_files import create_regular, open_regular

MAGIC = b"LMJ2"
_FIELDS = struct.Struct(f"<4sc{KEY_BYTES}sQ")
_RECORD = struct.Struct(f"<4sc{KEY_BYTES}sQQ")
MOST_READ = 1 << 20
"""Bytes read at once."""


class Journal:
    """Thread-safe. ConfigError when the file cannot be opened or is another file."""

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser().absolute()
        self._sizes: dict[ChunkKey, int] = {}
        self._lock = threading.Lock()
        self._offset = 0
        self._tail = b""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file, links = _open(self._path)
        except OSError as error:
            raise ConfigError(f"cannot open the index {self._path}: {error}") from error
        if os.pread(self._file, len(MAGIC), 0) not in (b"", MAGIC):
            os.close(self._file)
            raise ConfigError(f"{self._path} is no index of chunks; give the name of a new file")
        self._refresh()
        try:
            self._compact(anew=links > 1)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"cannot write the index {self._path} anew: {error}") from error

    def items(self) -> list[tuple[ChunkKey, int]]:
        """Every key and its size, the oldest first."""
        with self._lock:
            self._refresh()
            return list(self._sizes.items())

    def size(self, key: ChunkKey) -> int:
        """0 for a key that is not there."""
        with self._lock:
            self._refresh()
            return self._sizes.get(key, 0)

    def add(self, key: ChunkKey, size: int) -> None:
        self._append(b"+", key, size)

    def remove(self, key: ChunkKey) -> bool:
        """Whether it was there."""
        if there := bool(self.size(key)):
            self._append(b"-", key, 0)
        return there

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def _append(self, operation: bytes, key: ChunkKey, size: int) -> None:
        record = _record(operation, key, size)
        with self._lock:
            if self._file < 0:
                raise StorageError(f"the index {self._path} is closed")
            try:
                if os.write(self._file, record) != len(record):
                    raise OSError("it was not written whole")
            except OSError as error:
                raise StorageError(f"cannot write the index {self._path}: {error}") from error
            self._refresh()

    def _refresh(self) -> None:
        """Read what has been appended since the last time."""
        if self._file < 0:
            return
        while data := os.pread(self._file, MOST_READ, self._offset):
            self._offset += len(data)
            self._tail = self._apply(self._tail + data)

    def _apply(self, data: bytes) -> bytes:
        """Apply the records in ``data``; the rest, that may be the beginning of a record."""
        at = 0
        while (at := data.find(MAGIC, at)) >= 0 and len(data) - at >= _RECORD.size:
            _, operation, raw, size, checksum = _RECORD.unpack_from(data, at)
            if checksum != xxhash.xxh3_64_intdigest(data[at : at + _FIELDS.size]):
                at += 1
                continue
            at += _RECORD.size
            key = ChunkKey.from_bytes(raw)
            self._sizes.pop(key, None)
            if operation == b"+":
                self._sizes[key] = size
        return data[at:] if at >= 0 else data[-len(MAGIC) + 1 :]

    def _compact(self, *, anew: bool) -> None:
        """Write it anew when half of it is history and nobody else has it open; hold it as one who has it open.

        anew: in any case, as the file has a second name, in a copy of its folder that is made of links for example.
        """
        records = self._offset // _RECORD.size
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if anew:
                raise OSError("it has another name (a hard link), and another process has it open") from error
            fcntl.flock(self._file, fcntl.LOCK_SH)
            return
        if anew or (records > 64 and records > 2 * len(self._sizes)):
            temporary = self._path.with_name(f"{self._path.name}.new")
            temporary.unlink(missing_ok=True)  # of one that was killed, or a link to anywhere
            new = create_regular(str(temporary), os.O_RDWR | os.O_APPEND)
            try:
                data = b"".join(_record(b"+", key, size) for key, size in self._sizes.items())
                if os.write(new, data) != len(data):
                    raise OSError("it was not written whole")
                temporary.rename(self._path)
            except BaseException:
                os.close(new)
                temporary.unlink(missing_ok=True)
                raise
            os.close(self._file)
            self._file, self._offset, self._tail = new, len(data), b""
        fcntl.flock(self._file, fcntl.LOCK_SH)


def _open(path: Path) -> tuple[int, int]:
    """The descriptor and the number of names of the file, which is made if need be."""
    flags = os.O_RDWR | os.O_APPEND
    try:
        file, _ = open_regular(str(path), flags | os.O_CREAT)
        return file, 1
    except OddFileError:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise
        # A second name is no harm in reading; whoever asked writes to a new file.
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        return file, os.fstat(file).st_nlink


def _record(operation: bytes, key: ChunkKey, size: int) -> bytes:
    fields = _FIELDS.pack(MAGIC, operation, key.to_bytes(), size)
    return fields + xxhash.xxh3_64_intdigest(fields).to_bytes(8, "little")
