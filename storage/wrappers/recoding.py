"""What backends share that keep a payload in another form inside another backend: compressed, encrypted."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence

from lmcache import metrics
from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.memory.pool import PoolBuffer
from lmcache.storage.memory.staging import Staging

logger = logging.getLogger(__name__)

WAIT_S = 30.0
Fill = Callable[[memoryview], None]


class Recoding(StorageBackend):
    """Keeps ``_encode(payload)`` inside, and gives ``_decode`` of that back. Batches are as long as scratch allows."""

    inner: StorageBackend
    _scratch: Staging
    """For what is stored."""

    def _name(self, key: ChunkKey) -> ChunkKey | None:
        """The key under which a chunk is kept inside; None for one that is not kept."""
        return key

    @abstractmethod
    def _encode(self, key: ChunkKey, payload: memoryview) -> tuple[int, Fill]:
        """Bytes of the stored form, and what writes it there."""

    @abstractmethod
    def _decode(self, key: ChunkKey, stored: memoryview, payload: memoryview) -> bool:
        """Fill ``payload``; False for a miss."""

    @abstractmethod
    def _stored_sizes(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[int]:
        """Bytes of the stored forms of the leading run of ``keys``, as far as they are known."""

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        return self.inner.contains(self._names(keys))

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        names = self._names(keys)
        sizes = self._stored_sizes(keys[: len(names)], into[: len(names)])
        return self._read(names, sizes, lambda index, stored: self._decode(keys[index], stored, into[index].view))

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        held = 0
        batch: list[tuple[ChunkKey, PoolBuffer]] = []
        try:
            for key, buffer in zip(keys, buffers, strict=True):
                name = self._name(key)
                if name is None:
                    continue
                nbytes, fill = self._encode(key, buffer.view)
                room = self._room(nbytes, wait=not batch)
                if room is None and batch:
                    held += self._flush(batch)
                    room = self._room(nbytes, wait=True)
                if room is None:
                    logger.warning("%s: a chunk of %d bytes is larger than the scratch memory", self.name, nbytes)
                    continue
                batch.append((name, room))
                fill(room.view)
            return held + self._flush(batch)
        finally:
            self._scratch.give(*[room for _, room in batch])

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return self.inner.remove([name for key in keys if (name := self._name(key)) is not None])

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self.inner.clear(fingerprint)

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        return self.inner.clear_tenant(tenant, fingerprint)

    def keys(self) -> list[ChunkKey] | None:
        return self.inner.keys()

    def close(self) -> None:
        self.inner.close()
        self._scratch.close()

    def _names(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """The names of the leading run of ``keys`` that have one."""
        names: list[ChunkKey] = []
        for key in keys:
            if (name := self._name(key)) is None:
                break
            names.append(name)
        return names

    def _room(self, nbytes: int, *, wait: bool) -> PoolBuffer | None:
        """Scratch memory; None when there is none now, or can never be so much.

        wait: until others have given theirs back. Only for a call that holds none, or two could wait for each other.
        """
        if nbytes > self._scratch.capacity:
            return None
        return self._scratch.take(nbytes, WAIT_S) if wait else self._scratch.take_now(nbytes)

    def _flush(self, batch: list[tuple[ChunkKey, PoolBuffer]]) -> int:
        """Put the batch inside and empty it."""
        try:
            return self.inner.put([key for key, _ in batch], [room for _, room in batch]) if batch else 0
        finally:
            rooms = [room for _, room in batch]
            batch.clear()
            self._scratch.give(*rooms)

    def _read(self, names: Sequence[ChunkKey], sizes: Sequence[int], use: Callable[[int, memoryview], bool]) -> int:
        """Call ``use`` with each stored form in turn, until one is missing or of no use. Returns how many."""
        done = 0
        while done < len(sizes):
            rooms: list[PoolBuffer] = []
            try:
                for size in sizes[done:]:
                    room = self._room(size, wait=not rooms)
                    if room is None:
                        break
                    rooms.append(room)
                got = self.inner.get(names[done : done + len(rooms)], rooms) if rooms else 0
                for room in rooms[:got]:
                    if not use(done, room.view):
                        return done
                    done += 1
                if not rooms or got < len(rooms):
                    break
            finally:
                self._scratch.give(*rooms)
        return done

    def _damaged(self, key: ChunkKey, why: str) -> None:
        metrics.CORRUPT_CHUNKS.labels(self.name).inc()
        if (name := self._name(key)) is not None:
            logger.warning("%s: removed %s: %s", self.name, name, why)
            with contextlib.suppress(StorageError):  # it is a miss in any case, and is found again
                self.inner.remove([name])
