"""How many bytes the chunks of a folder have, counted by all the processes that share it.

    <folder>/.account     bytes, sum of all changes (8 bytes each, little-endian), xxh3-64 of both; changed under flock

A process reserves bytes here before it writes them; the one whose unlink succeeds gives them back. A process that is
killed leaves its reservations behind until the next scan of the folder, at the start of any process or when one of them
runs out of room, sets the count right, to within what is being written meanwhile. Where files cannot be locked, each
process counts for itself, which is said once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lmcache.errors import OddFileError
from lmcache.storage.files.regular_files import NO_DESCRIPTORS, TRIES, create_regular, oddity, open_regular

logger = logging.getLogger(__name__)

NAME = ".account"
LOCK_TIMEOUT_S = 1.0
_COUNTS = struct.Struct("<qq")
_RECORD = struct.Struct("<qqQ")


class Account:
    """The count of one folder. Thread-safe. No fault of the file raises: the count is then this process's own."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / NAME)
        self._lock = threading.Lock()
        self._file = -1
        self._identity = 0, 0
        self._last = 0, 0
        self._shared = True

    def open(self) -> None:
        """Open the file, or make it; again after the folder was removed and made anew."""
        with self._lock:
            try:
                self._reopen()
            except OSError as error:
                if self._file < 0 or error.errno not in NO_DESCRIPTORS:
                    self._unshared(error)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._close()

    def read(self) -> int:
        """Bytes of the folder's chunks, those that are being written included."""
        with self._lock:
            return self._load()[0]

    def change(self, nbytes: int) -> None:
        """Add; negative for what is gone."""
        with self._changing() as (used, changes):
            self._store(used + nbytes, changes + nbytes)

    def reserve(self, nbytes: int, share: int, room: int, gone: int = 0) -> int:
        """Take off what is ``gone``, then add ``nbytes`` if the count stays within ``share`` and grows by ``room``
        at most. Returns how many bytes are missing for that: 0 when they were added.
        """
        with self._changing() as (used, changes):
            used, changes = used - gone, changes - gone
            missing = max(0, used + nbytes - min(share, used + room))
            if not missing:
                used, changes = used + nbytes, changes + nbytes
            if gone or not missing:
                self._store(used, changes)
            return missing

    def changes(self) -> int:
        """The sum of all changes by anybody, for ``correct``."""
        with self._lock:
            return self._load()[1]

    def correct(self, changes_before: int, found: int, slack: int) -> None:
        """Set the count to what a scan ``found``, plus what came and went since ``changes()`` before it.

        Does not count as a change, so that two scans at once do not add up.
        slack: by how many bytes the count may be too high and stay as it is.
        """
        with self._changing() as (used, changes):
            found += changes - changes_before
            if not found <= used <= found + slack:
                self._store(found, changes)

    def __del__(self) -> None:
        self._close()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[int, int]]:
        with self._lock:
            locked = self._flock()
            if self._file >= 0 and not self._is_in_its_place():
                self._load()  # under its lock: it goes along into the file that takes its place
                with contextlib.suppress(OSError):  # the folder has gone: whoever makes it anew opens this anew
                    self._reopen()
                    locked = self._flock()
            try:
                yield self._load()
            finally:
                if locked:
                    fcntl.flock(self._file, fcntl.LOCK_UN)

    def _is_in_its_place(self) -> bool:
        """Not removed, not replaced, and with no second name, by which a copy of the folder would be changed too."""
        try:
            found = os.lstat(self._path)
        except OSError:
            return False
        return self._identity == (found.st_dev, found.st_ino) and not oddity(found)

    def _reopen(self) -> None:
        """Open the file that is there, or a new one, and let go of the one that is open. OSError: that stays."""
        for _ in range(TRIES):
            with contextlib.suppress(FileExistsError):
                os.close(create_regular(self._path, os.O_WRONLY))
            try:
                file, found = open_regular(self._path, os.O_RDWR)
            except FileNotFoundError:
                continue
            except OddFileError as error:
                os.unlink(self._path)
                logger.warning("removed %s: %s", self._path, error)
            else:
                self._close()
                self._file, self._identity = file, (found.st_dev, found.st_ino)
                return
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._path)

    def _flock(self) -> bool:
        """Whether the lock was had. It is held for microseconds, so whoever has it for long was stopped or is dead."""
        if self._file < 0:
            return False
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False  # an update may get lost; the next scan finds it
                time.sleep(0.0002)
            except OSError as error:
                self._unshared(error)
                return False

    def _load(self) -> tuple[int, int]:
        if self._file >= 0:
            try:
                raw = os.pread(self._file, _RECORD.size, 0)
            except OSError as error:
                self._unshared(error)
            else:
                if len(raw) == _RECORD.size:
                    used, changes, check = _RECORD.unpack(raw)
                    if check == xxhash.xxh3_64_intdigest(raw[: _COUNTS.size]):
                        self._last = used, changes
        return self._last

    def _store(self, used: int, changes: int) -> None:
        self._last = max(0, used), changes
        if self._file >= 0:
            check = xxhash.xxh3_64_intdigest(_COUNTS.pack(*self._last))
            try:
                os.pwrite(self._file, _RECORD.pack(*self._last, check), 0)
            except OSError as error:
                self._unshared(error)

    def _unshared(self, error: OSError) -> None:
        if self._shared:
            logger.warning("%s: %s; processes that share this folder each count its bytes alone", self._path, error)
        self._shared = False
        self._close()

    def _close(self) -> None:
        file, self._file = getattr(self, "_file", -1), -1
        if file >= 0:
            os.close(file)
