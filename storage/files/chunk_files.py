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
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lmcache import metrics
from lmcache.errors import CorruptChunkError, OddFileError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_header
from lmcache.storage.files.direct_io import PAGE, probe_direct, read_header
from lmcache.storage.files.regular_files import (
    GONE,
    TRIES,
    Folders,
    Oddities,
    OpenFolder,
    Spot,
    oddity,
    open_to_read,
)
from lmcache.storage.naming import chunk_key, chunk_name, chunk_path, namespace_path

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
        self.odd = Oddities(tier)
        self._folders = Folders(self._root, self.odd)

    def open(self) -> None:
        """Make the folder, see whether it can be written, and past the page cache."""
        probe = Spot(self._folders.make(""), temporary_name())
        os.close(probe.create(os.O_WRONLY))
        try:
            if self.direct and (refusal := probe_direct(probe)):
                self._refuse_direct(refusal)
        finally:
            probe.remove()

    def close(self) -> None:
        """Keep nothing open."""
        self._folders.close()

    def file_of(self, key: ChunkKey) -> str:
        """The path, for messages; files are opened by ``spot``."""
        return f"{self._root}/{chunk_path(key)}"

    def spot(self, key: ChunkKey) -> Spot:
        """Where the file of ``key`` is. An error of ``GONE`` when its folder is not there."""
        return Spot(self._folders.get(namespace_path(key.namespace)), chunk_name(key))

    def find(self, key: ChunkKey) -> Found | None:
        """The file of ``key``, if there is one that may be whole, and that may be read."""
        try:
            found = self.spot(key).stat()
        except OSError:
            return None
        return None if found.st_size <= HEADER_BYTES or oddity(found) else (found.st_mtime_ns, key, found.st_size)

    def open_chunk(self, key: ChunkKey, flags: int) -> tuple[int, int]:
        """Open the file of ``key`` to read it: its descriptor and its size.

        OddFileError when it should be removed, an error of ``GONE`` when it is not there or cannot be had now.
        """
        file, found = open_to_read(self.spot(key), flags, self.odd)
        return file, found.st_size

    def fits(self, key: ChunkKey, file: int, size: int, nbytes: int) -> bool:
        """Whether an open file of ``size`` bytes has a payload of ``nbytes``.

        CorruptChunkError when it has not what its header says.
        """
        if size == HEADER_BYTES + nbytes:
            return True
        if size <= HEADER_BYTES or size != HEADER_BYTES + check_header(read_header(file), key)[0]:
            raise CorruptChunkError(f"file of {size} bytes, expected {HEADER_BYTES + nbytes}")
        return False

    def used(self, file: int, used_ns: int) -> None:
        """Note in an open file when it was used: that order survives a restart, and other processes see it."""
        with contextlib.suppress(OSError):
            os.utime(file, ns=(used_ns, used_ns))

    def temporary(self, key: ChunkKey) -> Spot:
        """A new name beside the file of ``key``, in a folder that is made if need be."""
        name = namespace_path(key.namespace)
        try:
            folder = self._folders.get(name)
        except OSError as error:
            if error.errno not in GONE:
                raise
            folder = self._make(name)
        return Spot(folder, temporary_name())

    def create(self, key: ChunkKey, flags: int) -> tuple[Spot, int]:
        """Make and open a temporary file for ``key``, and the folder that it is in."""
        temporary = self.temporary(key)
        try:
            file = self._create(temporary, flags)
        except OSError as error:
            if error.errno not in GONE:
                raise
            # The folder that is still open has been removed.
            temporary = Spot(self._make(namespace_path(key.namespace)), temporary.name)
            file = self._create(temporary, flags)
        lock(file)
        return temporary, file

    def publish(self, temporary: Spot, key: ChunkKey, size: int) -> bool:
        """Give a finished file of ``size`` bytes its name. False when somebody else's, as long, is there already.

        OddFileError when something has the name that cannot be removed, as a folder that is not empty.
        """
        spot = Spot(temporary.folder, chunk_name(key))
        for _ in range(TRIES):
            if _rename_new(temporary, spot):
                return True
            with contextlib.suppress(FileNotFoundError):
                old = spot.stat()
                why = oddity(old)
                if not why and old.st_size == size:
                    temporary.remove()
                    return False
                # It has been cut, or grown, or is something else, so it is no chunk.
                removed = self.odd.remove(spot, f"{why}, not a file of ours") if why else spot.remove()
                if removed and stat.S_ISREG(old.st_mode):
                    self._gone(old.st_size)
                if why and not removed:
                    raise OddFileError(f"{why} stands in its place")
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(spot))

    def drop(self, temporary: Spot) -> None:
        """Remove a temporary file, if it is there."""
        with contextlib.suppress(OSError):
            temporary.remove()

    def unlink(self, key: ChunkKey) -> bool:
        """Remove a file, or what stands in its place; True if it was this call that did."""
        try:
            spot = self.spot(key)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        return spot.remove()

    def scan(self) -> tuple[list[Found], int]:
        """Every chunk, the longest unused first, and the bytes of files that others are writing.

        Reads no file. Removes temporary files of processes that have died, and what is no chunk. A file with hard
        links stays until it is asked for, or its space is needed: whoever opens a copy of the folder that is made of
        links shall not lose all of it at once.
        """
        found, writing = [], 0
        for namespace in self._folders.namespaces():
            for spot in self._folders.spots(namespace):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if spot.name.startswith(TEMPORARY):
                        writing += _bytes_being_written(spot)
                    elif (key := chunk_key(f"{namespace}/{spot.name}")) is not None:
                        status = spot.stat()
                        if stat.S_ISREG(status.st_mode) and status.st_size > HEADER_BYTES:
                            found.append((status.st_mtime_ns, key, status.st_size))
                        else:
                            why = oddity(status) or f"{status.st_size} bytes are no chunk"
                            self.odd.remove(spot, why)
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

    def _create(self, temporary: Spot, flags: int) -> int:
        try:
            return temporary.create(flags)
        except OSError as error:
            if error.errno in _REFUSED:
                self.drop(temporary)  # some systems make the file before they refuse O_DIRECT
            raise

    def _make(self, name: str) -> OpenFolder:
        return self._folders.make(name)

    def _gone(self, nbytes: int) -> None:
        """A file of so many bytes was removed on the way."""


def temporary_name() -> str:
    return f"{TEMPORARY}{os.getpid()}-{_TOKEN}-{next(_serial)}"


def lock(file: int) -> None:
    """Tell processes that cannot see ours, in another container or on another host, that its writer lives."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _bytes_being_written(temporary: Spot) -> int:
    """Of a temporary file; 0 when it was removed, as its writer is gone: no process has its number, none locks it."""
    pid, _, rest = temporary.name.removeprefix(TEMPORARY).partition("-")
    size = temporary.stat().st_size
    if not pid.isdecimal() or not rest or _lives(int(pid), rest):
        return size
    try:
        file, _ = temporary.open(os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.remove()
        finally:
            os.close(file)
    except OddFileError:
        with contextlib.suppress(PermissionError):
            temporary.remove()
    except (BlockingIOError, PermissionError):
        return size  # somebody writes it, or it is another user's
    return 0


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


_RENAME_NOREPLACE = 1
try:
    _renameat2: Callable[..., int] | None = ctypes.CDLL(None, use_errno=True).renameat2
except AttributeError:
    _renameat2 = None


def _rename_new(source: Spot, target: Spot) -> bool:
    """Rename unless ``target`` exists. Not atomic where the system cannot do that: then the last writer wins."""
    if _renameat2 is not None:
        names = os.fsencode(source.name), os.fsencode(target.name)
        code = _renameat2(source.folder.file, names[0], target.folder.file, names[1], _RENAME_NOREPLACE)
        if code == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            return False
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(source), None, str(target))
    try:
        target.stat()
    except FileNotFoundError:
        source.rename(target)
        return True
    return False
