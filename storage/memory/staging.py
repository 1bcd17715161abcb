"""Memory of a backend's own, for what must not lie in the buffers that it is given: headers, stored forms, objects."""

from __future__ import annotations

import threading

from lmcache.errors import StorageError
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer


class Staging:
    """A small pool, allocated once, whose users wait for each other. Thread-safe.

    A thread that waits in ``take`` must hold none of its buffers, or two threads could wait for each other.
    """

    def __init__(self, capacity: int) -> None:
        self._pool = PinnedPool(capacity)
        self._given = threading.Condition()
        self.capacity = self._pool.capacity

    def take(self, nbytes: int, timeout_s: float) -> PoolBuffer:
        """A buffer; StorageError when there is none for ``timeout_s``, ClosedError after close()."""
        found: list[PoolBuffer] = []

        def allocate() -> bool:
            if (buffer := self._pool.allocate(nbytes)) is not None:
                found.append(buffer)
            return bool(found)

        with self._given:
            if nbytes > self.capacity or not self._given.wait_for(allocate, timeout_s):
                raise StorageError(f"no {nbytes} of {self.capacity} bytes of staging memory within {timeout_s} s")
        return found[0]

    def take_now(self, nbytes: int) -> PoolBuffer | None:
        """A buffer if there is one."""
        return self._pool.allocate(nbytes)

    def give(self, *buffers: PoolBuffer) -> None:
        with self._given:
            for buffer in buffers:
                buffer.release()
            self._given.notify_all()

    def close(self) -> None:
        self._pool.close()
