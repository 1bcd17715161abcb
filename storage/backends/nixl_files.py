"""Chunks as files that NIXL reads and writes straight from and into the buffers it is given."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lmcache.errors import CorruptChunkError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.chunk_files import ChunkFiles, reserve
from lmcache.storage.backends.indexed import Place
from lmcache.storage.backends.nixl_agent import Agent, NixlError
from lmcache.storage.backends.staging import Staging
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.pool import PAGE

logger = logging.getLogger(__name__)

BATCH = 32
"""Files of one transfer, all open at once."""


class _Open(NamedTuple):
    """An open file, the buffer that it is read into or written from, and the address of its header in memory."""

    file: int
    key: ChunkKey
    buffer: Buffer
    header: int
    temporary: Path | None = None


class NixlFiles(Place):
    """One file a chunk, see chunk_files.py.

    The kernel does not give back a transfer that it has begun, so one that is slower than ``timeout_s`` is reported and
    waited for, as any other read of a disk is; the deadline of a request is the manager's.
    """

    def __init__(self, plugin: str, path: Path, parameters: dict[str, str], timeout_s: float, direct: bool) -> None:
        self._files = ChunkFiles(path, "nixl")
        self._agent = Agent(plugin, parameters)
        self._headers = Staging(4 * BATCH * HEADER_BYTES)
        self._timeout_s, self._direct = timeout_s, direct

    def scan(self) -> list[tuple[ChunkKey, int]]:
        return self._files.scan()

    def find(self, key: ChunkKey) -> int:
        return self._files.find(key)

    def delete(self, key: ChunkKey) -> bool:
        return self._files.delete(key)

    def close(self) -> None:
        self._agent.close()
        self._headers.close()

    def read(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[bool | StorageError]:
        outcomes: list[bool | StorageError] = []
        for start in range(0, len(keys), BATCH):
            outcomes += self._read_batch(keys[start : start + BATCH], into[start : start + BATCH])
            if outcomes[-1] is not True:
                break
        return outcomes

    def write(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> list[StorageError | None]:
        outcomes: list[StorageError | None] = []
        for start in range(0, len(keys), BATCH):
            outcomes += self._write_batch(keys[start : start + BATCH], buffers[start : start + BATCH])
        return outcomes

    def _read_batch(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[bool | StorageError]:
        headers = self._headers.take(len(keys) * HEADER_BYTES, self._timeout_s)
        opened: list[_Open] = []
        last: bool | StorageError | None = None
        try:
            for key, buffer in zip(keys, into, strict=True):
                found = self._open(key, buffer, headers.address + len(opened) * HEADER_BYTES)
                if not isinstance(found, _Open):
                    last = found
                    break
                opened.append(found)
            outcomes: list[bool | StorageError] = []
            for index, (item, failure) in enumerate(zip(opened, self._move("READ", opened, headers), strict=True)):
                header = headers.view[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]
                outcomes.append(self._check(item, header) if failure is None else self._explain(item, failure))
                if outcomes[-1] is not True:
                    return outcomes
            return outcomes if last is None else [*outcomes, last]
        finally:
            for item in opened:
                os.close(item.file)
            self._headers.give(headers)

    def _write_batch(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> list[StorageError | None]:
        headers = self._headers.take(len(keys) * HEADER_BYTES, self._timeout_s)
        created: list[_Open | StorageError] = []
        try:
            for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
                offset = index * HEADER_BYTES
                headers.view[offset : offset + HEADER_BYTES] = encode_header(key, buffer.view)
                created.append(self._create(key, buffer, headers.address + offset))
            failures = iter(self._move("WRITE", [item for item in created if isinstance(item, _Open)], headers))
            return [self._publish(item, next(failures)) if isinstance(item, _Open) else item for item in created]
        finally:
            for item in created:
                if isinstance(item, _Open) and item.temporary is not None:
                    os.close(item.file)
                    with contextlib.suppress(OSError):
                        item.temporary.unlink(missing_ok=True)
            self._headers.give(headers)

    def _move(self, operation: str, items: Sequence[_Open], headers: Buffer) -> list[NixlError | None]:
        """One transfer for all; each alone when that fails, as NIXL does not say which of them it was."""
        if not items:
            return []
        memory, remote = [], []
        for item in items:
            memory += [(item.header, HEADER_BYTES, 0), (item.buffer.address, item.buffer.nbytes, 0)]
            remote += [(0, HEADER_BYTES, item.file), (HEADER_BYTES, item.buffer.nbytes, item.file)]
        try:
            with self._agent.registrations.of([*(item.buffer for item in items), headers]):
                transfer = self._agent.begin(operation, memory, remote, [""] * len(remote))
                while not transfer.wait(self._timeout_s):
                    logger.warning("NIXL's %s of %d files is slower than %s s", operation, len(items), self._timeout_s)
            return [None] * len(items)
        except NixlError as error:
            if len(items) == 1:
                return [error]
        return [self._move(operation, [item], headers)[0] for item in items]

    def _open(self, key: ChunkKey, buffer: Buffer, header: int) -> _Open | bool | StorageError:
        path = self._files.path(key)
        try:
            file = self._open_file(path, os.O_RDONLY, buffer)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            return StorageError(f"cannot read {path}: {error}")
        item = _Open(file, key, buffer, header)
        if (outcome := self._length_is_wrong(item)) is None:
            return item
        os.close(file)
        return outcome

    def _length_is_wrong(self, item: _Open) -> bool | StorageError | None:
        return self._files.misfit(item.key, item.file, HEADER_BYTES + item.buffer.nbytes)

    def _explain(self, item: _Open, failure: NixlError) -> bool | StorageError:
        """What a failed read was: a file cut meanwhile, or the place itself."""
        wrong = self._length_is_wrong(item)
        return StorageError(f"cannot read {self._files.path(item.key)}: {failure}") if wrong is None else wrong

    def _check(self, item: _Open, header: memoryview) -> bool | StorageError:
        try:
            check_chunk(header, item.key, item.buffer.view)
        except CorruptChunkError as error:
            return error
        self._files.used(item.key)
        return True

    def _create(self, key: ChunkKey, buffer: Buffer, header: int) -> _Open | StorageError:
        try:
            temporary = self._files.temporary(key)
            file = self._open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, buffer)
        except OSError as error:
            return StorageError(f"cannot write {self._files.path(key)}: {error}")
        try:
            reserve(file, HEADER_BYTES + buffer.nbytes)
        except OSError as error:
            os.close(file)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return StorageError(f"cannot write {self._files.path(key)}: {error}")
        return _Open(file, key, buffer, header, temporary)

    def _publish(self, item: _Open, failure: NixlError | None) -> StorageError | None:
        path = self._files.path(item.key)
        if failure is not None:
            return StorageError(f"cannot write {path}: {failure}")
        assert item.temporary is not None
        try:
            item.temporary.rename(path)
        except OSError as error:
            return StorageError(f"cannot write {path}: {error}")
        return None

    def _open_file(self, path: Path, flags: int, buffer: Buffer) -> int:
        flags |= os.O_CLOEXEC
        if self._direct and buffer.nbytes % PAGE == 0 and buffer.address % PAGE == 0:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                logger.warning("%s: O_DIRECT is refused: the page cache is used", path.parent)
                self._direct = False
                with contextlib.suppress(FileNotFoundError):
                    if flags & os.O_CREAT:
                        path.unlink()  # some systems make the file before they refuse it
        return os.open(path, flags, 0o600)
