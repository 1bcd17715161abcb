"""What backends share that keep their own books: an index with a capacity, over a medium that moves bytes."""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from lmcache import metrics
from lmcache.errors import ClosedError, ConfigError, CorruptChunkError, StorageError
from lmcache.forks import Home
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.index import ChunkIndex, Entry
from lmcache.storage.registry import EVICTION_POLICIES

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0


class Medium(ABC):
    """Where chunks lie, header and payload together. Thread-safe. Sizes are bytes of header and payload."""

    @abstractmethod
    def scan(self) -> Iterable[tuple[ChunkKey, int]]:
        """Every chunk that is here, with its size, the longest unused first. Reads no payload. StorageError."""

    @abstractmethod
    def find(self, key: ChunkKey) -> int:
        """Size of a chunk that somebody else may have put here meanwhile; 0 when it is not here."""

    @abstractmethod
    def read(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[bool | StorageError]:
        """Fill buffers; what became of each, up to and with the first that is not True.

        False: it is not here, or has another length than the buffer. CorruptChunkError: it is not what it should be.
        When this returns, nothing writes to the buffers any more.
        """

    @abstractmethod
    def write(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> list[StorageError | None]:
        """Write chunks, each there whole or not at all; what went wrong with each.

        CorruptChunkError: something that is no chunk stands in its place and stays there, which the medium has said.
        """

    @abstractmethod
    def delete(self, key: ChunkKey) -> bool:
        """Whether it was here. StorageError when it stays."""

    @abstractmethod
    def close(self) -> None:
        """Release resources. Called once, when nothing else is."""


class IndexedBackend(StorageBackend):
    """A backend over a ``Medium``: subclasses build the medium and call ``__init__``."""

    name: ClassVar[str]

    def __init__(self, medium: Medium, capacity: int, eviction: str) -> None:
        self._home = Home(f"this {self.name} tier")
        self._medium = medium
        self._index = ChunkIndex(EVICTION_POLICIES.get(eviction)(), capacity=capacity)
        self._calls, self._closed = 0, False
        self._changed = threading.Condition()
        try:
            for key, size in medium.scan():
                self._index.add(key, Entry(0, size))
        except StorageError as error:
            raise ConfigError(f"the {self.name} tier cannot start: {error}") from error
        self._evict(self._index.reserve(0) or [])

    def __len__(self) -> int:
        return len(self._index)

    @property
    def used_bytes(self) -> int:
        return self._index.used_bytes

    def keys(self) -> list[ChunkKey]:
        # By the medium and not by the index, so that what other processes put there is told too.
        with self._running():
            return [key for key, _ in self._medium.scan()]

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        with self._running():
            return self._leading(keys)

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        with self._running():
            known = len(self._leading(keys))
            outcomes = self._medium.read(keys[:known], into[:known]) if known else []
            count = sum(outcome is True for outcome in outcomes)
            # The head of a prefix, without which the rest is worth nothing, counts as used last.
            self._index.touch(reversed(keys[:count]))
            if count < len(outcomes):
                self._failed(keys[count], outcomes[count], first=not count)
        return count

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        fresh: dict[ChunkKey, Buffer] = {}
        with self._running():
            for key, buffer in zip(keys, buffers, strict=True):
                if key in fresh or self._still_here(key):
                    continue
                if (victims := self._index.reserve(HEADER_BYTES + buffer.nbytes)) is not None:
                    fresh[key] = buffer
                    self._evict(victims)
            failure: StorageError | None = None
            outcomes = self._write(fresh)
            for (key, buffer), outcome in zip(fresh.items(), outcomes, strict=True):
                if outcome is None:
                    self._index.add(key, Entry(0, HEADER_BYTES + buffer.nbytes), reserved=True)
                else:
                    self._index.unreserve(HEADER_BYTES + buffer.nbytes)
                    if not isinstance(outcome, CorruptChunkError):
                        failure = failure or outcome
        if failure is not None:
            raise failure
        # What was held before may have been evicted for the rest of the batch.
        return sum(self._index.size(key) > 0 for key in keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        count = 0
        with self._running():
            for key in keys:
                self._index.forget(key)
                count += self._medium.delete(key)
        return count

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self.remove([key for key in self.keys() if fingerprint in (None, key.fingerprint)])

    def close(self) -> None:
        """Waits a moment for calls that run; new ones raise ClosedError."""
        if self._home.left:
            return
        with self._changed:
            if self._closed:
                return
            self._closed = True
            ended = self._changed.wait_for(lambda: not self._calls, CLOSE_TIMEOUT_S)
        if ended:
            self._medium.close()
        else:  # a transfer goes on to use what the medium has, which stays until the process ends
            logger.warning("%s: closed while %d calls run", self.name, self._calls)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """While this lasts the medium is open."""
        self._home.check()
        with self._changed:
            if self._closed:
                raise ClosedError(f"the {self.name} tier is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _leading(self, keys: Sequence[ChunkKey]) -> list[int]:
        """``sizes``, of a medium that is open."""
        sizes: list[int] = []
        for key in keys:
            size = self._index.size(key)
            if not size and (size := self._medium.find(key)):
                self._index.add(key, Entry(0, size))
            if not size:
                break
            sizes.append(size - HEADER_BYTES)
        return sizes

    def _still_here(self, key: ChunkKey) -> bool:
        """Asks the medium, as another process may have removed it."""
        size = self._medium.find(key)
        if size != self._index.size(key):
            self._index.forget(key)
            if size:
                self._index.add(key, Entry(0, size))
        return size > 0

    def _write(self, fresh: dict[ChunkKey, Buffer]) -> list[StorageError | None]:
        if not fresh:
            return []
        try:
            return self._medium.write(list(fresh), list(fresh.values()))
        except BaseException:
            for buffer in fresh.values():
                self._index.unreserve(HEADER_BYTES + buffer.nbytes)
            raise

    def _failed(self, key: ChunkKey, outcome: bool | StorageError, *, first: bool) -> None:
        if isinstance(outcome, CorruptChunkError):
            metrics.CORRUPT_CHUNKS.labels(self.name).inc()
            try:
                what = "removed" if self.remove([key]) else "left alone"
            except StorageError:  # it stays, but nobody is given it
                what = "left alone"
            logger.warning("%s: %s %s: %s", self.name, what, key, outcome)
        elif isinstance(outcome, StorageError):
            if first:
                raise outcome
        else:
            self._index.forget(key)

    def _evict(self, victims: Sequence[ChunkKey]) -> None:
        for key in victims:
            try:
                self._medium.delete(key)
            except StorageError as error:
                logger.warning("%s: cannot evict %s: %s", self.name, key, error)
        metrics.EVICTED_CHUNKS.labels(self.name).inc(len(victims))
