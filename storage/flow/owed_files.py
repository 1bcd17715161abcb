"""Clears that a tier owes, kept on disk: a process that starts again goes on with them before it reads.

One empty file each, whose name says everything, so that it is there whole or not at all:

    <place>.<format>.<tenant>.<who>    each 16 to 64 hex digits, or "any"
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

from lmcache.storage.selection import Selection

logger = logging.getLogger(__name__)

FOLDER = ".owed"
ANY = "any"


class OwedFiles:
    """Those of one tier. Thread-safe; an owed clear that cannot be kept is said once, and owed until the process ends.

    folders: where they lie. New ones go to the first that can be written.
    place: what tells this tier from others that use the same folders, in every process the same.
    """

    def __init__(self, folders: Sequence[Path], place: str) -> None:
        self._folders = folders
        self._place = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
        self._who = secrets.token_hex(8)
        self._files: dict[Selection, set[Path]] = {}
        self._lock = threading.Lock()
        self._said = False

    def load(self) -> list[Selection]:
        """What was owed when the last process ended. A name that says nothing readable stands for everything."""
        for folder in self._folders:
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.error("%s: owed clears cannot be read, so all of the tier is: %s", folder, error)
                self._files.setdefault(Selection(), set())
                continue
            for name in names:
                if name.startswith(self._place + "."):
                    self._files.setdefault(_selection(name), set()).add(folder / name)
        return list(self._files)

    def add(self, selection: Selection) -> None:
        """It is owed from now on, also after this process."""
        parts = [part.hex() if part else ANY for part in dataclasses.astuple(selection)]
        name = ".".join([self._place, *parts, self._who])
        with self._lock:
            if any(path.name == name for path in self._files.get(selection, ())):
                return
            for folder in self._folders:
                try:
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _make(folder, name)
                    self._files.setdefault(selection, set()).add(folder / name)
                    return
                except OSError as error:
                    failure = error
            if not self._said:
                self._said = True
                logger.error("an owed clear cannot be kept, and ends with this process: %s", failure)

    def done(self, selection: Selection) -> None:
        """It is owed no more."""
        with self._lock:
            for path in self._files.pop(selection, ()):
                with contextlib.suppress(FileNotFoundError):
                    try:
                        path.unlink()
                    except OSError as error:
                        logger.warning("%s cannot be removed: its clear is done once more at the next start", error)


def _make(folder: Path, name: str) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileExistsError):
        os.close(os.open(folder / name, flags, 0o600))
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _selection(name: str) -> Selection:
    parts = name.split(".")[1:-1]
    try:
        return Selection(*(None if part == ANY else bytes.fromhex(part) for part in parts))
    except (ValueError, TypeError):
        logger.warning("%s: this owed clear cannot be read, so all of the tier is cleared", name)
        return Selection()
