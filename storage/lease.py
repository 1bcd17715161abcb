"""A hold on found chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from lmcache.keys import ChunkKey
from lmcache.storage.pool import PoolBuffer


class Lease:
    """Holds the longest prefix of ``keys`` in memory, until ``close`` or ``timeout_s`` after it is done.

    While lower tiers are being read, ``ready`` grows; once ``done`` it does not. Thread-safe.
    """

    def __init__(
        self,
        keys: Sequence[ChunkKey],
        sizes: Sequence[int | range],
        timeout_s: float,
        on_done: Callable[[Lease], None] | None,
    ) -> None:
        self.keys = keys
        self.sizes = sizes
        self._buffers: list[PoolBuffer] = []
        self._timeout_s = timeout_s
        self._on_done = on_done
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._closed = False
        self.expires_at = float("inf")

    def fits(self, index: int, nbytes: int) -> bool:
        """Whether a payload of so many bytes can be what key number ``index`` names."""
        size = self.sizes[index]
        return nbytes in size if isinstance(size, range) else nbytes == size

    @property
    def ready(self) -> int:
        """How many leading keys are held now."""
        return len(self._buffers)

    @property
    def buffers(self) -> list[PoolBuffer]:
        """Their payloads; valid until ``close``."""
        with self._lock:
            return list(self._buffers)

    def share(self) -> list[PoolBuffer]:
        """Handles of the caller's own on what is held; they outlive ``close``, and the caller releases them."""
        with self._lock:
            return [buffer.share() for buffer in self._buffers]

    @property
    def done(self) -> bool:
        return self._event.is_set()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def expired(self) -> bool:
        return time.monotonic() > self.expires_at

    def renew(self) -> None:
        """Start the timeout anew."""
        if self.done:
            self.expires_at = time.monotonic() + self._timeout_s

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until done; False when it is not after ``timeout_s``."""
        return self._event.wait(timeout_s)

    def close(self) -> None:
        """Let go. Reads that still run end in memory, unheld. Idempotent."""
        with self._lock:
            self._closed = True
            buffers, self._buffers = self._buffers, []
        for buffer in buffers:
            buffer.release()
        self._finish()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _extend(self, buffers: Sequence[PoolBuffer]) -> bool:
        """Hold more; False (and nothing held) when the lease is done or closed."""
        with self._lock:
            if not self._closed and not self.done:
                self._buffers.extend(buffers)
                return True
        for buffer in buffers:
            buffer.release()
        return False

    def _finish(self) -> None:
        with self._lock:
            if self.done:
                return
            self.expires_at = time.monotonic() + self._timeout_s
            self._event.set()
        if self._on_done is not None:
            self._on_done(self)
