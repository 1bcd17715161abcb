"""One folder of the disk tier: the files of chunk_files.py as we read and write them, its account and its health.

<path>/.account                                                             see disk_account.py
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import xxhash

from lmcache import metrics
from lmcache.config import BreakerConfig
from lmcache.errors import CorruptChunkError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.chunk_files import ChunkFiles, lock
from lmcache.storage.backends.direct_io import read_chunk, write_chunk
from lmcache.storage.backends.disk_account import Account
from lmcache.storage.base import Buffer
from lmcache.storage.breaker import CircuitBreaker
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header

logger = logging.getLogger(__name__)

# The place is too small, which says nothing about what is there already.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Folder(ChunkFiles):
    """Chunks as files. Thread-safe. Methods raise OSError when the place fails.

    number: which of its tier's folders it is. fsync: a file counts only when it would survive a power cut.
    """

    def __init__(self, number: int, path: Path, *, direct: bool, fsync: bool, tier: str) -> None:
        super().__init__(path, direct=direct, tier=tier)
        self.number = number
        self.account = Account(path)
        self.remade = False
        """The folder had gone and was made anew; whoever reads this scans it, and sets it back."""
        self.opened = self.failing = False
        self.owed: set[ChunkKey | bytes | None] = set()
        """What could not be removed: keys, formats, or None for everything. It is, before the folder is used again."""
        # Of a file system that has become read-only, what it holds can still be read.
        self.reads, self.writes = CircuitBreaker(BreakerConfig()), CircuitBreaker(BreakerConfig())
        self._seed = xxhash.xxh3_64_intdigest(os.fsencode(self._root))
        self._fsync = fsync

    def open(self) -> None:
        super().open()
        metrics.DIRECT_IO.labels(self._root).set(self.direct)
        self.account.open()
        self.opened = True

    @property
    def serves(self) -> bool:
        """Whether what it holds may be read."""
        return self.opened and not self.owed and self.reads.ready

    def rank(self, key: ChunkKey) -> int:
        """A chunk is written to the folder that ranks highest: adding one moves only its share of the keys."""
        return xxhash.xxh3_64_intdigest(key.digest, self._seed)

    def read(self, key: ChunkKey, buffer: Buffer, used_ns: int) -> bool:
        """Fill ``buffer``, and note in the file that it was used. False: no such file, or another length is wanted.

        CorruptChunkError when it is not the chunk it should be.
        """
        return self.aligned(buffer, lambda direct: self._read(key, buffer.view, used_ns, direct))

    def write(self, key: ChunkKey, buffer: Buffer, spares: list[str]) -> bool:
        """Write a file, there whole or not at all. False when somebody else's, as long, is there already.

        spares: files that ``take`` gave for this key; one is written over, if there is one, and gone in any case.
        """
        header = encode_header(key, buffer.view)

        def write(direct: bool) -> bool:
            return self._write(key, header, buffer.view, direct, spares.pop() if spares else None)

        try:
            return self.aligned(buffer, write)
        except FileNotFoundError:
            # The folder was removed meanwhile, or a process that cannot see ours took the temporary file for an orphan.
            return self.aligned(buffer, write)

    def take(self, victim: ChunkKey, key: ChunkKey) -> str | None:
        """Make the file of ``victim`` a temporary one for ``key``; None when it is not there any more."""
        temporary = self.temporary(key)
        for _ in range(2):
            try:
                os.rename(self.file_of(victim), temporary)
            except FileNotFoundError:
                if os.path.isdir(directory := os.path.dirname(temporary)):
                    break
                self._make(directory)
            else:
                return temporary
        return None

    def used_since(self, key: ChunkKey, used_ns: int) -> bool:
        """Whether another process used the file later than that."""
        found = self.find(key)
        return found is not None and found[0] > used_ns

    def free_bytes(self) -> int:
        """Of its file system."""
        stat = os.statvfs(self._root)
        return stat.f_bavail * stat.f_frsize

    def failed(self, error: OSError, *, reading: bool = False) -> None:
        """Count an error; say so when it is the first of a row."""
        metrics.FOLDER_ERRORS.labels(self._root).inc()
        if error.errno not in _NO_ROOM:
            (self.reads if reading else self.writes).failed()
        if not self.failing:
            logger.warning("%s: %s", self.path, error)
        self.failing = True

    def succeeded(self, *, reading: bool = False) -> None:
        (self.reads if reading else self.writes).succeeded()
        self.failing = self.reads.failures > 0 or self.writes.failures > 0

    def _read(self, key: ChunkKey, view: memoryview, used_ns: int, direct: bool) -> bool:
        path = self.file_of(key)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            if not self.fits(key, file, view.nbytes):
                return False
            check_chunk(read_chunk(file, view, direct=direct), key, view)
            self.used(file, used_ns)
        except CorruptChunkError:
            if _names(path, file):
                raise
            return False  # it was evicted meanwhile, and another chunk written over it
        finally:
            os.close(file)
        return True

    def _write(self, key: ChunkKey, header: bytes, view: memoryview, direct: bool, spare: str | None) -> bool:
        temporary = spare or self.temporary(key)
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        try:
            if spare:
                lock(file := os.open(spare, flags))
            else:
                file = self.create(temporary, flags)
            try:
                size, old_size = HEADER_BYTES + view.nbytes, os.fstat(file).st_size
                if old_size < size:
                    os.ftruncate(file, size)  # so that scans of other processes count all of it
                write_chunk(file, header, view, direct=direct, old_size=max(old_size, size))
                if self._fsync:
                    os.fsync(file)
            finally:
                os.close(file)
            return self.publish(temporary, key, HEADER_BYTES + view.nbytes)
        except BaseException:
            self.drop(temporary)
            raise

    def publish(self, temporary: str, key: ChunkKey, size: int) -> bool:
        new = super().publish(temporary, key, size)
        if new and self._fsync:
            path = self.file_of(key)
            try:
                _sync(os.path.dirname(path))
            except OSError:
                os.unlink(path)
                raise
        return new

    def _make(self, directory: str) -> None:
        if not os.path.isdir(self._root):
            self.remade = True
        super()._make(directory)
        if self._fsync:
            _sync(os.path.dirname(directory))
            _sync(self._root)

    def _gone(self, nbytes: int) -> None:
        self.account.change(-nbytes)


def _names(path: str, file: int) -> bool:
    """Whether ``path`` leads to this open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


def _sync(directory: str) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
