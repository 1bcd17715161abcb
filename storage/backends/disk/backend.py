"""L3: one file a chunk, in one folder or striped over several (folder.py has their layout).

A file is written under a temporary name and renamed, so it is there whole or not at all, whatever is killed when. The
index is rebuilt at start from names and sizes. Without ``fsync`` a power cut may lose chunks, and the checksum turns
what it leaves into misses; with it a chunk counts as held when file and folder are on the medium.

Several processes may share folders: one's files are found by the others, a file that went away is a miss, the bytes are
counted together (account.py), and a chunk that another process used lately is not evicted as old here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import ByteSize, Field, model_validator

from lmcache.config import Config
from lmcache.errors import ConfigError, CorruptChunkError, OddFileError, StorageError
from lmcache.forks import Home
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk.folder import NO_ROOM, Folder, Spare
from lmcache.storage.backends.disk.space import DiskSpace
from lmcache.storage.base import Buffer, StorageBackend, distinct
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.files.regular_files import NO_DESCRIPTORS
from lmcache.storage.index import ChunkIndex, Entry
from lmcache.storage.registry import EVICTION_POLICIES, PolicyName
from lmcache.storage.run.budget import ByteBudget
from lmcache.storage.run.threads import Threads

CLOSE_TIMEOUT_S = 1.0
MOST_OWED = 10_000
Outcome = bool | OSError | None
"""Of one chunk: whether it was read or written, or what went wrong; None when it was left out."""


class DiskConfig(Config):
    """Options of ``{type: disk}``."""

    path: Path | None = Field(None, description="folder of the chunks; made when it is not there")
    paths: tuple[Path, ...] = Field((), description="several of them instead, best on a disk each; chunks are spread")
    capacity: ByteSize = Field(
        ByteSize(10 << 30), gt=HEADER_BYTES, description="bytes of files over all folders and processes, e.g. 100GiB"
    )
    eviction: PolicyName = Field("lru", description="name of the eviction policy")
    direct: bool = Field(True, description="bypass the page cache (O_DIRECT) where the file system grants it")
    fsync: bool = Field(False, description="a chunk counts as held only when it would survive a power cut")
    threads: int = Field(4, ge=1, le=64, description="threads that read and write")
    in_flight: ByteSize = Field(ByteSize(64 << 20), gt=0, description="bytes that they read and write at once")

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.path is None and not self.paths:
            raise ValueError("path: Field required (or paths)")
        if self.path is not None and self.paths:
            raise ValueError("path and paths exclude each other")
        folders = [os.path.realpath(path) + "/" for path in self.folders]
        for index, one in enumerate(folders):
            if any(one.startswith(other) for other in folders[:index] + folders[index + 1 :]):
                raise ValueError(f"paths: {self.folders[index]} is, or is inside, another of them")
        return self

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders, however they were given."""
        return tuple(path.expanduser() for path in ((self.path,) if self.path is not None else self.paths))


class DiskBackend(StorageBackend):
    """Chunks as files. A folder that fails costs its chunks; StorageError is raised when every folder fails."""

    name: ClassVar[str] = "disk"
    Config = DiskConfig

    def __init__(self, config: DiskConfig) -> None:
        self._home = Home("this disk tier")
        policy = EVICTION_POLICIES.get(config.eviction)()
        self._folders = [
            Folder(number, path.absolute(), direct=config.direct, fsync=config.fsync, tier=self.name)
            for number, path in enumerate(config.folders)
        ]
        self._alone = len(self._folders) == 1
        self._index = ChunkIndex(policy, len(self._folders))
        self._space = DiskSpace(self._index, len(self._folders), config.capacity // len(self._folders), self.name)
        self._io = Threads("disk", config.threads)
        self._in_flight = ByteBudget(config.in_flight)
        self._open()

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._home.check()
        self._io.check_open()
        sizes: list[int] = []
        for key in keys:
            entry = self._locate(key)
            if entry is None:
                break
            sizes.append(entry.size - HEADER_BYTES)
        return sizes

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        now = time.time_ns()
        # The head of a prefix, without which the rest is worth nothing, counts as used last.
        calls = [
            functools.partial(self._get, key, buffer, now - index)
            for index, (key, buffer) in enumerate(zip(keys, into, strict=True))
        ]
        outcomes = self._io.run(calls, ends=lambda outcome: outcome is not True)
        self._raise_if_all_fail(outcomes)
        count = next((index for index, outcome in enumerate(outcomes) if outcome is not True), len(keys))
        self._index.touch(reversed(keys[:count]), now)
        return count

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        written: dict[ChunkKey, Entry] = {}
        wanted = distinct(keys, buffers)
        try:
            outcomes = self._io.run([functools.partial(self._put, *chunk, written) for chunk in wanted.items()])
        finally:
            for key in reversed(wanted):
                if (entry := written.pop(key, None)) is not None:
                    self._index.add(key, entry)
                    self._space.settle(entry.folder, entry.size)
        self._raise_if_all_fail(outcomes)
        self._raise_if_not_for_room(outcomes)
        # What was held before may have been evicted for the rest of the batch; and what another process wrote at the
        # same moment is there, though the index does not have it yet.
        held = {key for key, outcome in zip(wanted, outcomes, strict=True) if outcome is True and self._locate(key)}
        return sum(key in held for key in keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self._home.check()
        self._io.check_open()
        count, failure = 0, None
        for key in keys:
            there = False
            entry = self._index.find(key)
            for folder in self._folders:
                try:
                    there |= self._space.unlink(folder, key, entry if entry and entry.folder == folder.number else None)
                except OSError as error:
                    failure = self._owe(folder, key, error) or failure
            self._forget(key, entry)
            count += there
        if failure is not None:
            raise StorageError(f"cannot remove chunks from {self._folders[0].path}: {failure}") from failure
        return count

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._home.check()
        self._io.check_open()
        count = 0
        for folder in self._folders:
            try:
                count += self._clear(folder, fingerprint)
            except OSError as error:
                if self._owe(folder, fingerprint, error):
                    raise StorageError(f"cannot clear {folder.path}: {error}") from error
        return count

    def keys(self) -> list[ChunkKey]:
        """By the folders, as other processes write to them too."""
        self._home.check()
        self._io.check_open()
        try:
            return [key for folder in self._folders if folder.opened for _, key, _ in folder.scan()[0]]
        except OSError as error:
            raise StorageError(f"cannot list the chunks of {self._folders[0].path}: {error}") from error

    def close(self) -> None:
        """Waits a moment for transfers that run; new ones raise ClosedError."""
        if self._home.left:
            return
        self._io.close(CLOSE_TIMEOUT_S)
        for folder in self._folders:
            folder.close()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def used_bytes(self) -> int:
        """Of all files, those of other processes included."""
        return sum(folder.account.read() for folder in self._folders)

    @property
    def direct(self) -> bool:
        """Whether all folders are read and written past the page cache."""
        return all(folder.direct for folder in self._folders)

    def file_of(self, key: ChunkKey) -> Path:
        """Where the chunk is, or would be put."""
        entry = self._index.find(key)
        folder = self._ranked(key)[0] if entry is None else self._folders[entry.folder]
        return Path(folder.file_of(key))

    def _ranked(self, key: ChunkKey) -> list[Folder]:
        """The folders that a chunk may be in, the likeliest first."""
        return self._folders if self._alone else sorted(self._folders, key=lambda folder: -folder.rank(key))

    def _locate(self, key: ChunkKey) -> Entry | None:
        entry = self._index.find(key)
        if entry is not None and (self._alone or self._folders[entry.folder].serves(key)):
            return entry
        for folder in self._ranked(key):
            if (self._alone or folder.serves(key)) and (found := folder.find(key)) is not None:
                entry = Entry(folder.number, found[2], found[0])
                self._index.add(key, entry)
                if folder.find(key) is not None:
                    return entry
                self._index.forget(key, entry)  # evicted between the two looks
        return None

    def _get(self, key: ChunkKey, buffer: Buffer, used_ns: int) -> bool:
        with self._in_flight.of(HEADER_BYTES + buffer.nbytes):
            return self._read(key, buffer, used_ns)

    def _read(self, key: ChunkKey, buffer: Buffer, used_ns: int) -> bool:
        entry = self._locate(key)
        if entry is None:
            return False
        folder = self._folders[entry.folder]
        try:
            found = folder.read(key, buffer, used_ns)
        except CorruptChunkError as error:
            self._remove_damaged(folder, key, str(error))
            return False
        except OSError as error:
            folder.failed(error, reading=True)
            raise StorageError(f"cannot read {folder.file_of(key)}: {error}") from error
        folder.succeeded(reading=True)
        if not found and folder.find(key) is None:
            self._index.forget(key)
        return found

    def _remove_damaged(self, folder: Folder, key: ChunkKey, why: str) -> None:
        try:
            removed = self.remove([key]) > 0
        except StorageError:  # it stays, but nobody is given it
            removed = False
            self._index.forget(key)
        folder.odd.found(folder.file_of(key), why, removed=removed)

    def _put(self, key: ChunkKey, buffer: Buffer, written: dict[ChunkKey, Entry]) -> bool:
        with self._in_flight.of(HEADER_BYTES + buffer.nbytes):
            return self._write(key, buffer, written)

    def _write(self, key: ChunkKey, buffer: Buffer, written: dict[ChunkKey, Entry]) -> bool:
        entry = self._locate(key)
        if entry is not None:
            if self._folders[entry.folder].find(key) is not None:
                return True
            self._index.forget(key)  # another process evicted it
        folder = next((folder for folder in self._ranked(key) if self._usable(folder)), None)
        if folder is None:
            raise StorageError(f"cannot write {key}: every folder of the disk tier fails")
        size, spares = HEADER_BYTES + buffer.nbytes, list[Spare]()
        if not self._space.reserve(folder, key, size, spares):
            folder.writes.undecided()
            return False
        new = False
        try:
            new = folder.write(key, buffer, spares)
            folder.succeeded()
        except OddFileError:
            folder.succeeded()
            return False  # what stands in its place stays there, which is said
        except OSError as error:
            folder.failed(error)
            raise StorageError(f"cannot write {folder.file_of(key)}: {error}") from error
        finally:
            if new:
                written[key] = Entry(folder.number, size, time.time_ns())
            for spare in spares:
                folder.drop(spare.spot)
            self._space.end_write(folder, size, new=new)
            if folder.remade:
                with contextlib.suppress(OSError):
                    self._space.scan(folder)
        return True

    def _raise_if_all_fail(self, outcomes: Sequence[Outcome]) -> None:
        error = next((outcome for outcome in outcomes if isinstance(outcome, OSError)), None)
        if error is not None and all(folder.failing for folder in self._folders):
            raise error

    def _raise_if_not_for_room(self, outcomes: Sequence[Outcome]) -> None:
        """Raise the error of a chunk that was not written, unless the reason was lack of room."""
        for outcome in outcomes:
            cause = outcome.__cause__ if isinstance(outcome, StorageError) else None
            if not isinstance(cause, OSError):
                continue
            # Another folder takes the chunks of one that fails; but this is not the folder's failure.
            if cause.errno in NO_DESCRIPTORS or (self._alone and cause.errno not in NO_ROOM):
                raise outcome  # type: ignore[misc]

    def _open(self) -> None:
        for folder in self._folders:
            try:
                self._open_folder(folder)
            except OSError as error:
                if self._alone:
                    raise ConfigError(f"the disk tier cannot write to {folder.path}: {error}") from error
                folder.failed(error)
        if not any(folder.opened for folder in self._folders):
            paths = ", ".join(str(folder.path) for folder in self._folders)
            raise ConfigError(f"the disk tier cannot write to any of {paths}")

    def _open_folder(self, folder: Folder) -> None:
        folder.open()
        self._space.scan(folder)
        self._space.trim(folder)

    def _usable(self, folder: Folder) -> bool:
        """Whether to write there; one that failed is tried again now and then, and settles first what it owes."""
        if self._alone:
            return True
        if not folder.reads.ready or not folder.writes.allows():
            return False
        try:
            if not folder.opened:
                self._open_folder(folder)
            for owed in list(folder.owed):
                if isinstance(owed, ChunkKey):
                    self._space.unlink(folder, owed, None)
                else:
                    self._clear(folder, owed)
                folder.owed.discard(owed)
        except OSError as error:
            folder.failed(error)
            return False
        return True

    def _owe(self, folder: Folder, what: ChunkKey | bytes | None, error: OSError) -> OSError | None:
        """Note what a folder could not remove; the error instead where there is no other folder to go on with."""
        if self._alone:
            return error
        folder.failed(error)
        folder.owed.add(what if len(folder.owed) < MOST_OWED else None)
        return None

    def _clear(self, folder: Folder, fingerprint: bytes | None) -> int:
        # By the folder and not by the index, so that what other processes wrote goes too.
        keys: Iterable[ChunkKey] = [key for _, key, _ in folder.scan()[0] if fingerprint in (None, key.fingerprint)]
        count = 0
        for key in keys:
            entry = self._index.find(key)
            try:
                count += self._space.unlink(folder, key, entry)
            finally:
                self._forget(key, entry)
        return count

    def _forget(self, key: ChunkKey, entry: Entry | None) -> None:
        if entry is not None:
            self._index.forget(key, entry)
