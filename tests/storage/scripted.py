"""A backend in memory that fails on cue: refused, hang, slow, wrong bytes, wrong length, full, ..."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lmcache.config import Config
from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.chunk import check_chunk, encode_header

WAIT_S = 20.0


class ScriptedBackend(StorageBackend):
    """A dict of (header, payload), as any place outside process memory, with ``before[operation]`` run first.

    lists_keys: whether it can say what it holds.
    """

    name: ClassVar[str] = "scripted"
    Config = Config

    def __init__(self, config: Any = None, *, lists_keys: bool = True) -> None:
        self.chunks: dict[ChunkKey, tuple[bytes, bytes]] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.calls: list[str] = []
        self.entered: dict[str, threading.Semaphore] = {}
        self.capacity: int | None = None
        self.lists_keys = lists_keys
        self.closed = False
        self._lock = threading.Lock()

    def plant(self, key: ChunkKey, data: bytes) -> None:
        self.chunks[key] = encode_header(key, memoryview(data)), data

    def holds(self) -> set[ChunkKey]:
        return set(self.chunks)

    def _enter(self, operation: str) -> None:
        with self._lock:
            self.calls.append(operation)
            self.entered.setdefault(operation, threading.Semaphore(0)).release()
        if fault := self.before.get(operation):
            fault()

    def await_call(self, operation: str) -> None:
        """Wait until the operation has been entered once more."""
        with self._lock:
            entered = self.entered.setdefault(operation, threading.Semaphore(0))
        assert entered.acquire(timeout=WAIT_S), f"{operation} was never called"

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        self._enter("sizes")
        return [len(self.chunks[key][1]) for key in itertools.takewhile(self.chunks.__contains__, keys)]

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        self._enter("get")
        for count, (key, buffer) in enumerate(zip(keys, into, strict=True)):
            header, data = self.chunks.get(key, (b"", b""))
            if len(data) != buffer.nbytes:
                return count
            buffer.view[:] = data
            try:
                check_chunk(header, key, buffer.view)
            except StorageError:
                self.chunks.pop(key, None)
                return count
        return len(keys)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self._enter("put")
        held = 0
        for key, buffer in zip(keys, buffers, strict=True):
            used = sum(len(data) for _, data in list(self.chunks.values()))
            if self.capacity is not None and used + buffer.nbytes > self.capacity:
                raise StorageError(errno.ENOSPC, "no space left")
            self.plant(key, bytes(buffer.view))
            held += 1
        return held

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self._enter("remove")
        return sum(self.chunks.pop(key, None) is not None for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._enter("clear")
        gone = [key for key in list(self.chunks) if fingerprint in (None, key.fingerprint)]
        return sum(self.chunks.pop(key, None) is not None for key in gone)

    def keys(self) -> list[ChunkKey] | None:
        return list(self.chunks) if self.lists_keys else None

    def close(self) -> None:
        self._enter("close")
        self.closed = True


def raising(error: Exception) -> Callable[[], None]:
    def fault() -> None:
        raise error

    return fault


class Gate:
    """A fault that hangs until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self) -> None:
        assert self._open.wait(WAIT_S), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()
