"""Memory of a backend's own, for what must not lie in the buffers it is given: headers, and objects in flight."""

from __future__ import annotations

import threading

from lmcache.errors import ClosedError, StorageError
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer


class Staging:
    """A small pool whose users wait for each other. Whoever waits may hold nothing of it, so nobody waits in a ring."""

    def __init__(self, capacity: int) -> None:
        self._pool = PinnedPool(capacity)
        self._given = threading.Condition()
        self.capacity = self._pool.capacity

    def take(self, nbytes: int, timeout_s: float) -> PoolBuffer:
        """A buffer; StorageError when there is none for ``timeout_s``."""
        found: list[PoolBuffer] = []

        def allocate() -> bool:
            try:
                buffer = self._pool.allocate(nbytes)
            except ClosedError as error:
                raise StorageError("the backend is closed") from error
            if buffer is not None:
                found.append(buffer)
            return buffer is not None

        with self._given:
            if nbytes > self.capacity or not self._given.wait_for(allocate, timeout_s):
                raise StorageError(f"no {nbytes} of {self.capacity} bytes of staging memory within {timeout_s} s")
        return found[0]

    def take_now(self, nbytes: int) -> PoolBuffer | None:
        """A buffer if there is one."""
        with self._given:
            try:
                return self._pool.allocate(nbytes)
            except ClosedError as error:
                raise StorageError("the backend is closed") from error

    def give(self, buffer: PoolBuffer) -> None:
        with self._given:
            buffer.release()
            self._given.notify_all()

    def close(self) -> None:
        self._pool.close()
