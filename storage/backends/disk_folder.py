"""One folder of the disk tier: names, files, what other processes do to them, and its health.

<path>/<format fingerprint>/<tag hash>/<digest>.kv                          header (4096 bytes), payload
<path>/<format fingerprint>/<tag hash>/.tmp-<pid>-<token>-<serial>          the same, while it is written
<path>/.account                                                             see disk_account.py
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

import xxhash

from lmcache import metrics
from lmcache.config import BreakerConfig
from lmcache.errors import CorruptChunkError
from lmcache.keys import FINGERPRINT_BYTES, ChunkKey
from lmcache.storage.backends.direct_io import PAGE, probe_direct, read_chunk, read_header, write_chunk
from lmcache.storage.backends.disk_account import Account
from lmcache.storage.base import Buffer
from lmcache.storage.breaker import CircuitBreaker
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, check_header, encode_header

logger = logging.getLogger(__name__)

T = TypeVar("T")
SUFFIX, TEMPORARY = ".kv", ".tmp-"
# The token tells our temporary files from those of a killed process that had our pid, as in a restarted container.
_TOKEN = secrets.token_hex(4)
_serial = itertools.count()
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
# The place is too small, which says nothing about what is there already.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Found = tuple[int, ChunkKey, int]
"""A file: when it was last used, in ns; its key; its bytes."""


class Folder:
    """Chunks as files. Thread-safe. Methods raise OSError when the place fails.

    number: which of its tier's folders it is. direct: past the page cache, if that is granted. fsync: a file counts
    only when it would survive a power cut. tier: its tier's name, for metrics.
    """

    def __init__(self, number: int, path: Path, *, direct: bool, fsync: bool, tier: str) -> None:
        self.number, self.path = number, path
        self.account = Account(path)
        self.remade = False
        """The folder had gone and was made anew; whoever reads this scans it, and sets it back."""
        self.opened = self.failing = False
        self.owed: set[ChunkKey | bytes | None] = set()
        """What could not be removed: keys, formats, or None for everything. It is, before the folder is used again."""
        self.breaker = CircuitBreaker(BreakerConfig())
        self._root = str(path)
        self._seed = xxhash.xxh3_64_intdigest(os.fsencode(self._root))
        self.direct, self._fsync, self._tier = direct, fsync, tier

    def open(self) -> None:
        """Make the folder, see whether it can be written, and past the page cache. OSError when it cannot."""
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / _temporary_name()
        try:
            probe.write_bytes(b"")
            if self.direct and (refusal := probe_direct(probe)):
                self._refuse_direct(refusal)
        finally:
            probe.unlink(missing_ok=True)
        metrics.DIRECT_IO.labels(self._root).set(self.direct)
        self.account.open()
        self.opened = True

    @property
    def serves(self) -> bool:
        """Whether what it holds may be read."""
        return self.opened and not self.owed and not self.breaker.is_open

    def rank(self, key: ChunkKey) -> int:
        """A chunk is written to the folder that ranks highest: adding one moves only its share of the keys."""
        return xxhash.xxh3_64_intdigest(key.digest, self._seed)

    def file_of(self, key: ChunkKey) -> str:
        tags = key.namespace[FINGERPRINT_BYTES:]
        return f"{self._root}/{key.fingerprint.hex()}/{tags.hex()}/{key.digest.hex()}{SUFFIX}"

    def find(self, key: ChunkKey) -> Found | None:
        """The file of ``key``, if there is one that may be whole."""
        try:
            stat = os.stat(self.file_of(key))
        except OSError:
            return None
        return (stat.st_mtime_ns, key, stat.st_size) if stat.st_size > HEADER_BYTES else None

    def read(self, key: ChunkKey, buffer: Buffer, used_ns: int) -> bool:
        """Fill ``buffer``, and note in the file that it was used. False: no such file, or another length is wanted.

        CorruptChunkError when it is not the chunk it should be.
        """
        return self._aligned(buffer, lambda direct: self._read(key, buffer.view, used_ns, direct))

    def write(self, key: ChunkKey, buffer: Buffer, spares: list[str]) -> bool:
        """Write a file, there whole or not at all. False when somebody else's, as long, is there already.

        spares: files that ``take`` gave for this key; one is written over, if there is one, and gone in any case.
        """
        header = encode_header(key, buffer.view)

        def write(direct: bool) -> bool:
            return self._write(key, header, buffer.view, direct, spares.pop() if spares else None)

        try:
            return self._aligned(buffer, write)
        except FileNotFoundError:
            # The folder was removed meanwhile, or a process that cannot see ours took the temporary file for an orphan.
            return self._aligned(buffer, write)

    def take(self, victim: ChunkKey, key: ChunkKey) -> str | None:
        """Make the file of ``victim`` a temporary one for ``key``; None when it is not there any more."""
        directory = os.path.dirname(self.file_of(key))
        temporary = f"{directory}/{_temporary_name()}"
        for _ in range(2):
            try:
                os.rename(self.file_of(victim), temporary)
            except FileNotFoundError:
                if os.path.isdir(directory):
                    break
                self._make(directory)
            else:
                return temporary
        return None

    def drop(self, temporary: str) -> None:
        """Remove what ``take`` gave."""
        with contextlib.suppress(OSError):
            os.unlink(temporary)

    def unlink(self, key: ChunkKey) -> bool:
        """Remove a file; True if it was this call that did."""
        try:
            os.unlink(self.file_of(key))
        except FileNotFoundError:
            return False
        return True

    def used_since(self, key: ChunkKey, used_ns: int) -> bool:
        """Whether another process used the file later than that."""
        found = self.find(key)
        return found is not None and found[0] > used_ns

    def free_bytes(self) -> int:
        """Of its file system."""
        stat = os.statvfs(self._root)
        return stat.f_bavail * stat.f_frsize

    def scan(self) -> tuple[list[Found], int]:
        """Every chunk, the longest unused first, and the bytes of files that others are writing.

        Reads no file. Removes temporary files of processes that have died, and files that hold no chunk.
        """
        found, writing = [], 0
        for directory, entry in self._files():
            try:
                if entry.name.startswith(TEMPORARY):
                    writing += 0 if _remove_if_orphaned(entry) else entry.stat().st_size
                elif entry.name.endswith(SUFFIX) and (key := _key(directory, entry.name)) is not None:
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

    def failed(self, error: OSError) -> None:
        """Count an error; say so when it is the first of a row."""
        metrics.FOLDER_ERRORS.labels(self._root).inc()
        if error.errno not in _NO_ROOM:
            self.breaker.failed()
        if not self.failing:
            logger.warning("%s: %s", self.path, error)
        self.failing = True

    def succeeded(self) -> None:
        self.breaker.succeeded()
        self.failing = False

    def _aligned(self, buffer: Buffer, call: Callable[[bool], T]) -> T:
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

    def _read(self, key: ChunkKey, view: memoryview, used_ns: int, direct: bool) -> bool:
        path = self.file_of(key)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            size = os.fstat(file).st_size
            if size != HEADER_BYTES + view.nbytes:
                if size <= HEADER_BYTES or size != HEADER_BYTES + check_header(read_header(file), key)[0]:
                    raise CorruptChunkError(f"file of {size} bytes, expected {HEADER_BYTES + view.nbytes}")
                return False
            check_chunk(read_chunk(file, view, direct=direct), key, view)
            with contextlib.suppress(OSError):
                os.utime(file, ns=(used_ns, used_ns))  # the order of use survives a restart, and others see it
        except CorruptChunkError:
            if _names(path, file):
                raise
            return False  # it was evicted meanwhile, and another chunk written over it
        finally:
            os.close(file)
        return True

    def _write(self, key: ChunkKey, header: bytes, view: memoryview, direct: bool, spare: str | None) -> bool:
        path = self.file_of(key)
        directory = os.path.dirname(path)
        temporary = spare or f"{directory}/{_temporary_name()}"
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        flags |= 0 if spare else os.O_CREAT | os.O_EXCL
        try:
            file = os.open(temporary, flags, 0o600)
        except FileNotFoundError:
            if spare:
                raise
            self._make(directory)
            file = os.open(temporary, flags, 0o600)
        try:
            try:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells that its writer lives
                size, old_size = HEADER_BYTES + view.nbytes, os.fstat(file).st_size
                if old_size < size:
                    os.ftruncate(file, size)  # so that scans of other processes count all of it
                write_chunk(file, header, view, direct=direct, old_size=max(old_size, size))
                if self._fsync:
                    os.fsync(file)
            finally:
                os.close(file)
            return self._publish(temporary, path, HEADER_BYTES + view.nbytes)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _publish(self, temporary: str, path: str, size: int) -> bool:
        while not _rename_new(temporary, path):
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(path).st_size
                if old == size:
                    os.unlink(temporary)
                    return False
                os.unlink(path)  # it has been cut, or grown, so it is no chunk
                self.account.change(-old)
        if self._fsync:
            try:
                _sync(os.path.dirname(path))
            except OSError:
                os.unlink(path)
                raise
        return True

    def _make(self, directory: str) -> None:
        if not os.path.isdir(self._root):
            self.remade = True
        os.makedirs(directory, exist_ok=True)
        if self._fsync:
            _sync(os.path.dirname(directory))
            _sync(self._root)

    def _files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every file two folders down, with the folder that it is in."""
        for outer in _entries(self._root):
            for inner in _entries(outer.path):
                for entry in _entries(inner.path):
                    yield inner.path, entry


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (NotADirectoryError, FileNotFoundError):
        return []


def _key(directory: str, name: str) -> ChunkKey | None:
    """The key that a file is named after; None for a file that is not ours."""
    outer, inner = directory.rsplit("/", 2)[-2:]
    try:
        return ChunkKey.from_bytes(bytes.fromhex(outer + inner + name.removesuffix(SUFFIX)))
    except ValueError:
        return None


def _names(path: str, file: int) -> bool:
    """Whether ``path`` leads to this open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


def _temporary_name() -> str:
    return f"{TEMPORARY}{os.getpid()}-{_TOKEN}-{next(_serial)}"


def _remove_if_orphaned(entry: os.DirEntry[str]) -> bool:
    """Remove a temporary file whose writer is gone: no process has its number, and no process locks the file.

    The lock is for writers that we cannot see, in another container or on another host.
    """
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


def _sync(directory: str) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


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
