"""Files in a folder where others can write too: regular ones with one link, by a way without symbolic links.

    root        as configured, so symbolic links on the way to it are the user's
      a/b       each opened from the one before (openat, O_NOFOLLOW): what it leads to stays inside root
        name    looked at, opened, renamed and removed by its name in the open folder

A name may mean something else from one call to the next, an open file does not. So a file is opened first, without
following and without waiting, then looked at (fstat), and what was looked at is what is read or written.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lmcache import metrics
from lmcache.errors import OddFileError
from lmcache.storage.naming import FORMAT_LENGTH, TAGS_LENGTH

logger = logging.getLogger(__name__)

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""What a file that was removed, perhaps by another host, answers."""
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
"""The process, or the machine, has too many files open: this passes, and says nothing of the place."""
FRESH_S = 1.0
"""For how long an open folder is used before its way is gone anew: somebody may have moved or replaced it."""
MOST_OPEN, MOST_SAID, TRIES = 64, 1000, 8
# O_PATH: on NFS this asks the server nothing, and it needs no right to list.
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def oddity(found: os.stat_result) -> str:
    """Why a file is none of ours, by ``lstat`` or ``fstat``; empty when it is regular and has no second link."""
    if not stat.S_ISREG(found.st_mode):
        return _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
    # 0: it was removed while we have it open, or the file system does not count.
    return f"a file with {found.st_nlink} hard links" if found.st_nlink > 1 else ""


def open_regular(path: str, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> tuple[int, os.stat_result]:
    """A file's descriptor and what it is. OddFileError unless it is regular with one link; follows no link there.

    Does not wait: not for the other end of a FIFO, nor for who has a lease (BlockingIOError).
    The descriptor is O_NONBLOCK, which means nothing to reads and writes of a regular file, but to io_uring.
    """
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    except OSError as error:
        # A link answers ELOOP, a socket ENXIO, a folder EISDIR or, with O_DIRECT, EINVAL: by the error one cannot tell.
        if why := _oddity_of(path, dir_fd):
            raise OddFileError(f"{why}, not a file of ours") from error
        raise
    try:
        found = os.fstat(file)
        if why := oddity(found):
            raise OddFileError(f"{why}, not a file of ours")
    except BaseException:
        os.close(file)
        raise
    return file, found


def create_regular(path: str, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
    """Make and open a file. FileExistsError when anything has the name."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=dir_fd)


def _oddity_of(path: str, dir_fd: int | None) -> str:
    try:
        return oddity(os.stat(path, dir_fd=dir_fd, follow_symlinks=False))
    except OSError:
        return ""


class OpenFolder:
    """An open folder. It is closed when nobody refers to it any more, as threads share it."""

    __slots__ = ("file", "fresh_until", "path")

    def __init__(self, file: int, path: str) -> None:
        self.file, self.path = file, path
        self.fresh_until = time.monotonic() + FRESH_S

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.file)

    @property
    def removed(self) -> bool:
        return os.fstat(self.file).st_nlink == 0

    def open(self) -> int:
        """Another descriptor of it, to list or to sync it."""
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.file)


class Spot(NamedTuple):
    """A name in an open folder, and whatever it stands for at the moment. Methods raise OSError."""

    folder: OpenFolder
    name: str

    def __str__(self) -> str:
        return f"{self.folder.path}/{self.name}"

    def stat(self) -> os.stat_result:
        """Of the name itself, be it a link."""
        return os.stat(self.name, dir_fd=self.folder.file, follow_symlinks=False)

    def open(self, flags: int) -> tuple[int, os.stat_result]:
        """See ``open_regular``."""
        return open_regular(self.name, flags, dir_fd=self.folder.file)

    def create(self, flags: int, mode: int = 0o600) -> int:
        """See ``create_regular``."""
        return create_regular(self.name, flags, mode, dir_fd=self.folder.file)

    def rename(self, to: Spot) -> None:
        """Also over what ``to`` stands for, if that is no folder."""
        os.rename(self.name, to.name, src_dir_fd=self.folder.file, dst_dir_fd=to.folder.file)

    def remove(self) -> bool:
        """Whether this call removed it: a name of a file, never what a link leads to; or a folder that is empty."""
        try:
            os.unlink(self.name, dir_fd=self.folder.file)
        except IsADirectoryError:
            try:
                os.rmdir(self.name, dir_fd=self.folder.file)
            except OSError:
                return False  # what is inside is somebody's
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        return True


class Folders:
    """The folders below a root, by relative paths. Thread-safe. Those used lately are kept open.

    odd: what stands in a folder's place is told to.
    """

    def __init__(self, root: str, odd: Oddities) -> None:
        self._root, self._odd = root, odd
        self._open: dict[str, OpenFolder] = {}

    def get(self, name: str) -> OpenFolder:
        """An error of ``GONE`` when it is not there, or is something else. Empty: the root."""
        known = self._open.get(name)
        if known is not None and time.monotonic() < known.fresh_until:
            return known
        return self._walk(name, make=False)

    def make(self, name: str) -> OpenFolder:
        """The folder, made where it is not there; what else stands in its place is removed."""
        self._open.clear()  # those above it may have been removed too
        os.makedirs(self._root, exist_ok=True)
        return self._walk(name, make=True)

    def spots(self, name: str) -> list[Spot]:
        """What is in the folder now; nothing where there is no folder."""
        try:
            folder = self._walk(name, make=False)
            file = folder.open()
        except OSError as error:
            if error.errno in GONE:
                return []
            raise
        try:
            return [Spot(folder, entry) for entry in os.listdir(file)]
        finally:
            os.close(file)

    def namespaces(self, fingerprint: str | None = None) -> Iterator[str]:
        """The folders that chunks are in, of one format or of all."""
        for outer in self.spots(""):
            if len(outer.name) == FORMAT_LENGTH and fingerprint in (None, outer.name):
                for inner in self.spots(outer.name):
                    if len(inner.name) == TAGS_LENGTH:
                        yield f"{outer.name}/{inner.name}"

    def close(self) -> None:
        """Open no folder any more that nobody uses. Others are opened when they are asked for."""
        self._open.clear()

    def _walk(self, name: str, *, make: bool) -> OpenFolder:
        folder = OpenFolder(os.open(self._root, _FOLDER), self._root)
        for part in name.split("/") if name else ():
            folder = self._enter(Spot(folder, part), make)
        if len(self._open) >= MOST_OPEN:
            self._open.clear()
        self._open[name] = folder
        return folder

    def _enter(self, spot: Spot, make: bool) -> OpenFolder:
        for attempt in range(TRIES):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(spot.name, dir_fd=spot.folder.file)
            try:
                return OpenFolder(os.open(spot.name, _FOLDER | os.O_NOFOLLOW, dir_fd=spot.folder.file), str(spot))
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                why = "something else than a folder"
                if make and self._odd.remove(spot, why) and attempt < TRIES - 1:
                    continue
                self._odd.found(str(spot), why, removed=False)
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(spot)) from error
        raise AssertionError("TRIES is at least 1")


class Oddities:
    """Counts what stands in the place of a tier's files, and says each once."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._said: set[str] = set()

    def remove(self, spot: Spot, why: str) -> bool:
        """Remove, and say so, or that it stays: as it may where the folder is sticky, and its owner somebody else."""
        try:
            removed = spot.remove()
        except OSError:
            removed = False
        self.found(str(spot), why, removed=removed)
        return removed

    def found(self, path: str, why: str, *, removed: bool) -> None:
        """What is left alone is found again and again; what was removed is not."""
        if not removed:
            if path in self._said or len(self._said) >= MOST_SAID:
                return
            self._said.add(path)
        metrics.CORRUPT_CHUNKS.labels(self._tier).inc()
        logger.warning("%s %s: %s", "removed" if removed else "left alone", path, why)


def open_to_read(spot: Spot, flags: int, odd: Oddities) -> tuple[int, os.stat_result]:
    """``spot.open``, where what is wrong with one file says nothing about others.

    OddFileError when it should be removed, an error of ``GONE`` when it is not there or cannot be had now.
    """
    try:
        return spot.open(flags)
    except BlockingIOError as error:  # somebody has a lease on it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(spot)) from error
    except PermissionError as error:
        found = spot.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & stat.S_IRUSR:
            raise OddFileError("a file that may not be read") from error
        odd.found(str(spot), f"it may not be read: {error.strerror}", removed=False)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(spot)) from error
