"""One folder of the disk tier: the files of chunk_files.py as we read and write them, its account and its health.

<path>/.account                                                             see account.py
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import NamedTuple

import xxhash

from lmcache import metrics
from lmcache.config import BreakerConfig
from lmcache.errors import CorruptChunkError, OddFileError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk.account import Account
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.files.chunk_files import ChunkFiles, lock
from lmcache.storage.files.direct_io import read_chunk, write_chunk
from lmcache.storage.files.regular_files import GONE, NO_DESCRIPTORS, OpenFolder, Spot, oddity
from lmcache.storage.naming import namespace_path
from lmcache.storage.run.breaker import CircuitBreaker

logger = logging.getLogger(__name__)

# The place is too small, which says nothing about what is there already.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Spare(NamedTuple):
    """A victim's file that a chunk can be written over. identity: its device and inode, when it had its old name."""

    spot: Spot
    identity: tuple[int, int]


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

    def serves(self, key: ChunkKey) -> bool:
        """Whether the chunk may be read, if it is here."""
        return self.opened and self.reads.ready and self.owed.isdisjoint((key, key.fingerprint, None))

    def close(self) -> None:
        super().close()
        self.account.close()

    def rank(self, key: ChunkKey) -> int:
        """A chunk is written to the folder that ranks highest: adding one moves only its share of the keys."""
        return xxhash.xxh3_64_intdigest(key.digest, self._seed)

    def read(self, key: ChunkKey, buffer: Buffer, used_ns: int) -> bool:
        """Fill ``buffer``, and note in the file that it was used. False: no such file, or another length is wanted.

        CorruptChunkError when it is not the chunk it should be.
        """
        return self.aligned(buffer, lambda direct: self._read(key, buffer.view, used_ns, direct))

    def write(self, key: ChunkKey, buffer: Buffer, spares: list[Spare]) -> bool:
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

    def take(self, victim: ChunkKey, key: ChunkKey) -> Spare | None:
        """Make the file of ``victim`` a temporary one for ``key``; None when it is not there any more.

        OddFileError when it is not to be written over: it has another name too, or is another user's.
        """
        try:
            spot = self.spot(victim)
            found = spot.stat()
        except OSError as error:
            if error.errno in GONE:
                return None
            raise
        if not _may_be_written_over(found):
            raise OddFileError(f"{spot} is not ours alone")
        for _ in range(2):
            temporary = self.temporary(key)
            try:
                spot.rename(temporary)
            except FileNotFoundError:
                if not temporary.folder.removed:
                    break
                self._make(namespace_path(key.namespace))
            else:
                return Spare(temporary, (found.st_dev, found.st_ino))
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
        breaker = self.reads if reading else self.writes
        if error.errno not in (*NO_ROOM, *NO_DESCRIPTORS):
            breaker.failed()
        else:
            breaker.undecided()
        if not self.failing:
            logger.warning("%s: %s", self.path, error)
        self.failing = True

    def succeeded(self, *, reading: bool = False) -> None:
        (self.reads if reading else self.writes).succeeded()
        self.failing = self.reads.failures > 0 or self.writes.failures > 0

    def _read(self, key: ChunkKey, view: memoryview, used_ns: int, direct: bool) -> bool:
        try:
            file, size = self.open_chunk(key, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        try:
            if not self.fits(key, file, size, view.nbytes):
                return False
            check_chunk(read_chunk(file, view, direct=direct), key, view)
            self.used(file, used_ns)
        except CorruptChunkError:
            if self._is(key, file):
                raise
            return False  # it was evicted meanwhile, and another chunk written over it
        finally:
            os.close(file)
        return True

    def _write(self, key: ChunkKey, header: bytes, view: memoryview, direct: bool, spare: Spare | None) -> bool:
        temporary, file, old_size = self._blank(key, os.O_WRONLY | (os.O_DIRECT if direct else 0), spare)
        try:
            try:
                size = HEADER_BYTES + view.nbytes
                if old_size < size:
                    os.ftruncate(file, size)  # so that scans of other processes count all of it
                write_chunk(file, header, view, direct=direct, old_size=max(old_size, size))
                if self._fsync:
                    os.fsync(file)
            finally:
                os.close(file)
            return self.publish(temporary, key, size)
        except BaseException:
            self.drop(temporary)
            raise

    def _blank(self, key: ChunkKey, flags: int, spare: Spare | None) -> tuple[Spot, int, int]:
        """A temporary file to write to: its name, its descriptor, its size. ``spare`` if that is still what it was."""
        if spare is not None:
            try:
                # Looked at once more, and open: under its name there may be another file now, or it another name.
                file, found = spare.spot.open(flags)
                if _may_be_written_over(found) and (found.st_dev, found.st_ino) == spare.identity:
                    lock(file)
                    return spare.spot, file, found.st_size
                os.close(file)
            except OddFileError as error:
                self.odd.found(str(spare.spot), str(error), removed=True)
            except BaseException:
                self.drop(spare.spot)
                raise
            self.drop(spare.spot)
        return *self.create(key, flags), 0

    def publish(self, temporary: Spot, key: ChunkKey, size: int) -> bool:
        new = super().publish(temporary, key, size)
        if new and self._fsync:
            try:
                _sync(temporary.folder)
            except OSError:
                self.unlink(key)
                raise
        return new

    def _make(self, name: str) -> OpenFolder:
        if not os.path.isdir(self._root):
            self.remade = True
        folder = super()._make(name)
        if self._fsync:
            for above in (os.path.dirname(name), ""):
                _sync(self._folders.get(above))
        return folder

    def _is(self, key: ChunkKey, file: int) -> bool:
        """Whether the name of ``key`` stands for this open file."""
        try:
            return os.path.samestat(self.spot(key).stat(), os.fstat(file))
        except OSError:
            return False

    def _gone(self, nbytes: int) -> None:
        self.account.change(-nbytes)


def _may_be_written_over(found: os.stat_result) -> bool:
    return not oddity(found) and found.st_nlink == 1 and found.st_uid == os.geteuid()


def _sync(folder: OpenFolder) -> None:
    file = folder.open()
    try:
        os.fsync(file)
    finally:
        os.close(file)
