"""The contracts of storage: buffers, backends."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from lmcache.config import Config
from lmcache.keys import ChunkKey

logger = logging.getLogger(__name__)


class Buffer(Protocol):
    """A handle on a 4 KiB-aligned block of the process's pool. Whoever holds a handle releases it, once."""

    @property
    def view(self) -> memoryview:
        """The writable bytes, exactly ``nbytes`` of them. BufferStateError after release()."""
        ...

    @property
    def nbytes(self) -> int: ...

    @property
    def address(self) -> int:
        """Address of the first byte."""
        ...

    def share(self) -> Buffer:
        """A second handle on the same bytes; the block goes back to the pool when the last one is released."""
        ...

    def release(self) -> None:
        """Give the handle back. BufferStateError when it already was."""
        ...


class StorageBackend(ABC):
    """One place that holds chunks, below process memory.

    Meaning: a map ChunkKey -> bytes. What ``get`` returns was put under that very key, bit for bit, or it is a miss.
    Threads: every method may be called from several threads at once.
    Blocking: methods block; deadlines, retries and the circuit breaker live in the StorageManager. Where something has
    to be done between two tries, as to ask who the master is now, the backend tries again itself, within a time limit.
    Buffers: the caller owns every buffer; a backend neither keeps nor releases one after it returns. It writes to the
    ``nbytes`` of those that it fills, and to nothing else.
    Batches: one entry after the other. An empty batch does nothing. A key may stand in it more than once: ``sizes``,
    ``get`` and ``put`` count it each time (of different bytes the first are held), ``remove`` once.
    Outside process memory a chunk carries the header of ``storage/chunk.py``; whatever is off (magic, version, key,
    length, checksum) is a miss plus a metric plus removal of the bad entry, never data.
    Errors: a miss is a value. StorageError when the place itself fails (disk full, connection refused, ...). Whatever
    a library underneath raises, nothing but StorageError and ClosedError comes out.
    Closing: after ``close()`` every other call raises ClosedError; one with an empty batch may do nothing instead. A
    call that runs meanwhile ends as it would have, or with ClosedError or StorageError.
    Construction: from one ``Config`` of its own; ConfigError when it cannot work.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]

    @abstractmethod
    def __init__(self, config: Any) -> None: ...

    @abstractmethod
    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Payload bytes of each of the leading run of ``keys`` that is present. Reads no payload."""

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        """Length of that run."""
        return len(self.sizes(keys))

    @abstractmethod
    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        """Fill ``into[i]`` with the payload of ``keys[i]``; stop at the first miss. Returns how many were filled.

        A payload whose length is not ``into[i].nbytes`` is a miss. Where the place fails, or the time is over, after
        some have come, those may be returned as if the next were a miss; StorageError when none has.
        """

    @abstractmethod
    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        """Write payloads; returns how many of them are now held.

        A key that is already held counts as held; its bytes stay or are replaced, whole. A chunk becomes visible whole
        or not at all. What does not fit the capacity is not held (after eviction), and does no harm to what is.
        """

    @abstractmethod
    def remove(self, keys: Sequence[ChunkKey]) -> int:
        """Remove, also behind keys that are not there; returns how many were."""

    @abstractmethod
    def clear(self, fingerprint: bytes | None = None) -> int:
        """Remove every chunk of one KVFormat, or all of them. Returns how many."""

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        """Remove every chunk of one tenant (``key.tenant``): those of one KVFormat, or all. Returns how many.

        A place that cannot list its keys, and has no way of its own, loses more: what must go is gone, the rest a miss.
        """
        if (keys := self.keys()) is None:
            logger.warning("tier %s cannot list its keys: more than the chunks of the tenant is cleared", self.name)
            return self.clear(fingerprint)
        return self.remove([key for key in keys if key.tenant == tenant and fingerprint in (None, key.fingerprint)])

    def keys(self) -> list[ChunkKey] | None:
        """Every key that is held, read from an index and not from payloads; None where the place cannot list them."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Release resources; what was put stays where the medium keeps it. Idempotent."""


def distinct(keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> dict[ChunkKey, Buffer]:
    """Every key of a batch to put, with the buffer where it stands first."""
    first: dict[ChunkKey, Buffer] = {}
    for key, buffer in zip(keys, buffers, strict=True):
        first.setdefault(key, buffer)
    return first
