"""A folder of chunk files: names, who may remove what, and how a file becomes visible.

<path>/<format fingerprint>/<tenant and tags>/<digest>.kv                          header (4096 bytes), payload
<path>/<format fingerprint>/<tenant and tags>/.tmp-<pid>-<token>-<serial>          the same, while it is written
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lmcache import metrics
from lmcache.errors import CorruptChunkError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.direct_io import PAGE, probe_direct, read_header
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_header
from lmcache.storage.layout import SUFFIX, chunk_key, chunk_path

logger = logging.getLogger(__name__)

T = TypeVar("T")
TEMPORARY = ".tmp-"
# The token tells our temporary files from those of a killed process that had our pid, as in a restarted container.
_TOKEN = secrets.token_hex(4)
_serial = itertools.count()
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
Found = tuple[int, ChunkKey, int]
"""A file: when it was last used, in ns; its key; its bytes."""


class ChunkFiles:
    """The files of one folder. Thread-safe. Methods raise OSError when the place fails.

    direct: past the page cache, if that is granted. tier: its tier's name, for metrics.
    """

    def __init__(self, path: Path, *, direct: bool, tier: str) -> None:
        self.path, self.direct = path, direct
        self._root, self._tier = str(path), tier

    def open(self) -> None:
        """Make the folder, see whether it can be written, and past the page cache."""
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / temporary_name()
        try:
            probe.write_bytes(b"")
            if self.direct and (refusal := probe_direct(probe)):
                self._refuse_direct(refusal)
        finally:
            probe.unlink(missing_ok=True)

    def file_of(self, key: ChunkKey) -> str:
        return f"{self._root}/{chunk_path(key)}"

    def find(self, key: ChunkKey) -> Found | None:
        """The file of ``key``, if there is one that may be whole."""
        try:
            stat = os.stat(self.file_of(key))
        except OSError:
            return None
        return (stat.st_mtime_ns, key, stat.st_size) if stat.st_size > HEADER_BYTES else None

    def fits(self, key: ChunkKey, file: int, nbytes: int) -> bool:
        """Whether an open file has a payload of ``nbytes``; CorruptChunkError when it has not what its header says."""
        size = os.fstat(file).st_size
        if size == HEADER_BYTES + nbytes:
            return True
        if size <= HEADER_BYTES or size != HEADER_BYTES + check_header(read_header(file), key)[0]:
            raise CorruptChunkError(f"file of {size} bytes, expected {HEADER_BYTES + nbytes}")
        return False

    def used(self, file: int, used_ns: int) -> None:
        """Note in an open file when it was used: that order survives a restart, and other processes see it."""
        with contextlib.suppress(OSError):
            os.utime(file, ns=(used_ns, used_ns))

    def temporary(self, key: ChunkKey) -> str:
        """A new name beside the file of ``key``."""
        return f"{os.path.dirname(self.file_of(key))}/{temporary_name()}"

    def create(self, temporary: str, flags: int) -> int:
        """Make and open a temporary file, and the folder that it is in."""
        flags |= os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            try:
                file = os.open(temporary, flags, 0o600)
            except FileNotFoundError:
                self._make(os.path.dirname(temporary))
                file = os.open(temporary, flags, 0o600)
        except OSError as error:
            if error.errno in _REFUSED:
                self.drop(temporary)  # some systems make the file before they refuse O_DIRECT
            raise
        lock(file)
        return file

    def publish(self, temporary: str, key: ChunkKey, size: int) -> bool:
        """Give a finished file of ``size`` bytes its name. False when somebody else's, as long, is there already."""
        path = self.file_of(key)
        while not _rename_new(temporary, path):
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(path).st_size
                if old == size:
                    os.unlink(temporary)
                    return False
                os.unlink(path)  # it has been cut, or grown, so it is no chunk
                self._gone(old)
        return True

    def drop(self, temporary: str) -> None:
        """Remove a temporary file, if it is there."""
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    def unlink(self, key: ChunkKey) -> bool:
        """Remove a file; True if it was this call that did."""
        try:
            os.unlink(self.file_of(key))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def scan(self) -> tuple[list[Found], int]:
        """Every chunk, the longest unused first, and the bytes of files that others are writing.

        Reads no file. Removes temporary files of processes that have died, and files that hold no chunk.
        """
        found, writing = [], 0
        for entry in self._files():
            try:
                if entry.name.startswith(TEMPORARY):
                    writing += 0 if _remove_if_orphaned(entry) else entry.stat().st_size
                elif entry.name.endswith(SUFFIX) and (key := chunk_key(entry.path[len(self._root) + 1 :])) is not None:
                    stat = entry.stat()
                    if stat.st_size > HEADER_BYTES:
                        found.append((stat.st_mtime_ns, key, stat.st_size))
                    else:
                        os.unlink(entry.path)
                        metrics.CORRUPT_CHUNKS.labels(self._tier).inc()
                        logger.warning("removed %s: %d bytes are no chunk", entry.path, stat.st_size)
            except FileNotFoundError:
                continue  # another process was faster
        return sorted(found), writing

    def aligned(self, buffer: Buffer, call: Callable[[bool], T]) -> T:
        """``call(direct)``; once more through the page cache when O_DIRECT turns out not to work."""
        direct = self.direct and buffer.address % PAGE == 0
        try:
            return call(direct)
        except OSError as error:
            if not direct or error.errno not in _REFUSED:
                raise
            self._refuse_direct(error)
        return call(False)

    def _refuse_direct(self, error: OSError) -> None:
        if self.direct:
            logger.warning("%s: O_DIRECT is refused (%s): the page cache is used", self.path, error.strerror)
        self.direct = False
        metrics.DIRECT_IO.labels(self._root).set(0)

    def _make(self, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)

    def _gone(self, nbytes: int) -> None:
        """A file of so many bytes was removed on the way."""

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Every file two folders down."""
        for outer in _entries(self._root):
            for inner in _entries(outer.path):
                yield from _entries(inner.path)


def temporary_name() -> str:
    return f"{TEMPORARY}{os.getpid()}-{_TOKEN}-{next(_serial)}"


def lock(file: int) -> None:
    """Tell processes that cannot see ours, in another container or on another host, that its writer lives."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (NotADirectoryError, FileNotFoundError):
        return []


def _remove_if_orphaned(entry: os.DirEntry[str]) -> bool:
    """Remove a temporary file whose writer is gone: no process has its number, and no process locks the file."""
    pid, _, rest = entry.name.removeprefix(TEMPORARY).partition("-")
    if not pid.isdecimal() or not rest or _lives(int(pid), rest):
        return False
    file = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(entry.path)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _lives(pid: int, rest: str) -> bool:
    if pid == os.getpid():
        return rest.startswith(_TOKEN)
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
try:
    _renameat2: Callable[..., int] | None = ctypes.CDLL(None, use_errno=True).renameat2
except AttributeError:
    _renameat2 = None


def _rename_new(source: str, target: str) -> bool:
    """Rename unless ``target`` exists. Not atomic where the system cannot do that: then the last writer wins."""
    if _renameat2 is not None:
        code = _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
        if code == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            return False
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), source, None, target)
    if os.path.exists(target):
        return False
    os.rename(source, target)
    return True
