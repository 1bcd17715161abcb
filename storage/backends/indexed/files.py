"""Chunk files that a library reads and writes, a batch at a time: what NIXL and KvikIO have in common."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from lmcache.errors import ConfigError, CorruptChunkError, OddFileError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.indexed.backend import Medium
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.files.chunk_files import ChunkFiles
from lmcache.storage.files.regular_files import GONE, Spot
from lmcache.storage.memory.pool import PAGE, PoolBuffer
from lmcache.storage.memory.staging import Staging

T = TypeVar("T")
BATCH = 32
"""Files that are open at once."""
Operation = Literal["READ", "WRITE"]


class Item(NamedTuple):
    """An open file of exactly the header's and the buffer's bytes, and the memory of both."""

    key: ChunkKey
    path: str
    """For people: by its name there may be another file now, so libraries are given ``file``."""
    file: int
    header: memoryview
    header_address: int
    buffer: Buffer


class FileMedium(Medium):
    """One file a chunk, see storage/files/chunk_files.py; subclasses say how bytes move.

    direct: open files with O_DIRECT where length and system allow it. timeout_s: how long to wait for headers' memory.
    """

    def __init__(self, path: Path, tier: str, *, direct: bool, timeout_s: float) -> None:
        self._files = ChunkFiles(path.expanduser().absolute(), direct=direct, tier=tier)
        self._headers = Staging(4 * BATCH * HEADER_BYTES)
        self._tier, self._timeout_s = tier, timeout_s
        try:
            self._files.open()
        except OSError as error:
            raise ConfigError(f"the {tier} tier cannot write to {self._files.path}: {error}") from error

    @abstractmethod
    def move(self, operation: Operation, items: Sequence[Item], headers: PoolBuffer) -> list[Exception | None]:
        """Read or write whole files; what went wrong with each. Nothing moves any more when this returns.

        headers: the memory that the headers of all items lie in.
        """

    def on_host(self, buffer: Buffer) -> memoryview:
        """The bytes to take a checksum of."""
        return buffer.view

    def scan(self) -> list[tuple[ChunkKey, int]]:
        try:
            return [(key, size) for _, key, size in self._files.scan()[0]]
        except OSError as error:
            raise _failed("list", str(self._files.path), error) from error

    def find(self, key: ChunkKey) -> int:
        found = self._files.find(key)
        return 0 if found is None else found[2]

    def delete(self, key: ChunkKey) -> bool:
        try:
            return self._files.unlink(key)
        except OSError as error:
            raise _failed("remove", self._files.file_of(key), error) from error

    def close(self) -> None:
        self._headers.close()
        self._files.close()

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
        with self._staged(len(keys)) as headers, contextlib.ExitStack() as files:
            items: list[Item] = []
            last: list[bool | StorageError] = []
            for index, (key, buffer) in enumerate(zip(keys, into, strict=True)):
                found = self._open(key, buffer, headers, index)
                if not isinstance(found, Item):
                    last = [found]
                    break
                files.callback(os.close, found.file)
                items.append(found)
            outcomes: list[bool | StorageError] = []
            now = time.time_ns()
            failures = self.move("READ", items, headers) if items else []
            for item, failure in zip(items, failures, strict=True):
                # The head of a prefix, without which the rest is worth nothing, counts as used last.
                outcomes.append(self._check(item, failure, now - len(outcomes)))
                if outcomes[-1] is not True:
                    return outcomes
            return outcomes + last

    def _write_batch(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> list[StorageError | None]:
        with self._staged(len(keys)) as headers, contextlib.ExitStack() as files:
            created: list[tuple[Spot, Item] | StorageError] = []
            for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
                created.append(self._create(key, buffer, headers, index))
                if not isinstance(new := created[-1], StorageError):
                    files.callback(self._files.drop, new[0])
                    files.callback(os.close, new[1].file)
            items = [new[1] for new in created if not isinstance(new, StorageError)]
            failures = iter(self.move("WRITE", items, headers) if items else [])
            return [new if isinstance(new, StorageError) else self._publish(*new, next(failures)) for new in created]

    def _open(self, key: ChunkKey, buffer: Buffer, headers: PoolBuffer, index: int) -> Item | bool | StorageError:
        path = self._files.file_of(key)
        try:
            file, _ = self._open_file(buffer, lambda direct: self._files.open_chunk(key, os.O_RDONLY | direct))
            # Whoever reads by io_uring may be told to try again while it is O_NONBLOCK.
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        except OddFileError as error:
            return error
        except OSError as error:
            return False if error.errno in GONE else _failed("read", path, error)
        item = _item(key, path, file, headers, index, buffer)
        misfit = self._misfit(item)
        if misfit is None:
            return item
        os.close(file)
        return misfit

    def _misfit(self, item: Item) -> bool | StorageError | None:
        """What is wrong with the length of a file, if anything."""
        try:
            size = os.fstat(item.file).st_size
            return None if self._files.fits(item.key, item.file, size, item.buffer.nbytes) else False
        except CorruptChunkError as error:
            return error
        except OSError as error:
            return _failed("read", item.path, error)

    def _check(self, item: Item, failure: Exception | None, used_ns: int) -> bool | StorageError:
        if failure is not None:
            # Was it cut meanwhile, or is it the medium itself?
            misfit = self._misfit(item)
            return _failed("read", item.path, failure) if misfit is None else misfit
        try:
            check_chunk(item.header, item.key, self.on_host(item.buffer))
        except CorruptChunkError as error:
            return error
        self._files.used(item.file, used_ns)
        return True

    def _create(
        self, key: ChunkKey, buffer: Buffer, headers: PoolBuffer, index: int
    ) -> tuple[Spot, Item] | StorageError:
        try:
            temporary, file = self._open_file(buffer, lambda direct: self._files.create(key, os.O_RDWR | direct))
            try:
                # The kernel says why there is no room, where the library may not.
                os.posix_fallocate(file, 0, HEADER_BYTES + buffer.nbytes)
                item = _item(key, str(temporary), file, headers, index, buffer)
                item.header[:] = encode_header(key, self.on_host(buffer))
                return temporary, item
            except BaseException:
                os.close(file)
                self._files.drop(temporary)
                raise
        except OSError as error:
            return _failed("write", self._files.file_of(key), error)

    def _publish(self, temporary: Spot, item: Item, failure: Exception | None) -> StorageError | None:
        try:
            if failure is not None:
                raise failure
            self._files.publish(temporary, item.key, HEADER_BYTES + item.buffer.nbytes)
        except OddFileError as error:
            return error
        except (OSError, RuntimeError) as error:
            return _failed("write", self._files.file_of(item.key), error)
        return None

    def _open_file(self, buffer: Buffer, call: Callable[[int], T]) -> T:
        """``call`` with O_DIRECT, where that may be, or 0."""
        whole = buffer.nbytes % PAGE == 0
        return self._files.aligned(buffer, lambda direct: call(os.O_DIRECT if direct and whole else 0))

    @contextlib.contextmanager
    def _staged(self, count: int) -> Iterator[PoolBuffer]:
        headers = self._headers.take(count * HEADER_BYTES, self._timeout_s)
        try:
            yield headers
        finally:
            self._headers.give(headers)


def _item(key: ChunkKey, path: str, file: int, headers: PoolBuffer, index: int, buffer: Buffer) -> Item:
    start = index * HEADER_BYTES
    return Item(key, path, file, headers.view[start : start + HEADER_BYTES], headers.address + start, buffer)


def _failed(what: str, path: str, error: Exception) -> StorageError:
    failure = StorageError(f"cannot {what} {path}: {error}")
    failure.__cause__ = error
    return failure
