"""A hold on found chunks, and chunks on their way into memory.

Two sides use a Lease. Whoever acquired it waits, takes ``buffers`` and closes it. Whoever reads for it (flow/) gives it
chunks with ``hold`` and ``hold_end``, and ends that with ``settle``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from lmcache.forks import Home
from lmcache.keys import ChunkKey
from lmcache.storage.memory.pool import PoolBuffer


class Lease:
    """Holds the longest prefix of ``keys`` in memory, until ``close`` or ``timeout_s`` after it is done.

    While lower tiers are being read, ``ready`` grows; once ``done`` it does not. Thread-safe.
    """

    def __init__(
        self,
        keys: Sequence[ChunkKey],
        sizes: Sequence[int | range],
        timeout_s: float,
        on_done: Callable[[Lease], None] | None = None,
        *,
        on_closed: Callable[[Lease], None] | None = None,
    ) -> None:
        self.keys = keys
        self.sizes = sizes
        self._home = Home("the storage of this lease")
        self._buffers: list[PoolBuffer] = []
        self._timeout_s = timeout_s
        self._on_done = on_done
        self._on_closed = on_closed
        self._on_settled: Callable[[], None] | None = None
        self._changed = threading.Condition(threading.Lock())
        self.done = False
        self.closed = False
        self.end: ChunkKey | None = None
        """The key that was taken from those which may come last, see ``StorageManager.acquire``."""
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
        with self._changed:
            return list(self._buffers)

    def share(self, first: int = 0, stop: int | None = None) -> list[PoolBuffer]:
        """Handles of the caller's own on what is held of keys ``first`` to ``stop``; they outlive ``close``, and the
        caller releases them."""
        with self._changed:
            held = self._buffers[first:stop]
            return held[0]._pool.share_leading(held) if held else []

    @property
    def expired(self) -> bool:
        return time.monotonic() > self.expires_at

    def renew(self, timeout_s: float | None = None) -> None:
        """Start the timeout anew; a given ``timeout_s`` is the timeout from now on. A closed lease stays closed."""
        with self._changed:
            if timeout_s is not None:
                self._timeout_s = timeout_s
            if self.done:
                self.expires_at = time.monotonic() + self._timeout_s

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until done; False when it is not after ``timeout_s``."""
        if self.done:
            return True
        self._home.check()
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout_s)

    def wait_ready(self, count: int, timeout_s: float | None = None) -> bool:
        """Wait until ``count`` chunks are held, or it is done; returns whether they are.

        So the first can be used while the next are being read.
        """
        self._home.check()
        with self._changed:
            self._changed.wait_for(lambda: self.done or len(self._buffers) >= count, timeout_s)
            return len(self._buffers) >= count

    def close(self) -> None:
        """Release the chunks. What reads still bring goes to memory, and nothing holds it there. Idempotent."""
        if self._home.left:
            return
        with self._changed:
            first, self.closed = not self.closed, True
            buffers, self._buffers = self._buffers, []
        if buffers:
            buffers[0]._pool.release_all(buffers)
        self.settle()
        if first and self._on_closed is not None:
            self._on_closed(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def tell_reader(self, on_settled: Callable[[], None]) -> None:
        """Have ``on_settled`` called once it is done, before ``on_done``. For whoever reads for it, beforehand."""
        self._on_settled = on_settled

    def hold(self, buffers: Sequence[PoolBuffer]) -> bool:
        """Hold the payloads of the next keys. Takes the handles over; False, and releases them, when it is done."""
        with self._changed:
            if not self.closed and not self.done:
                self._buffers.extend(buffers)
                self._changed.notify_all()
                return True
        if buffers:
            buffers[0]._pool.release_all(buffers)
        return False

    def hold_end(self, key: ChunkKey, size: int | range, buffers: Sequence[PoolBuffer]) -> None:
        """Take ``key`` instead of those that are not held."""
        with self._changed:
            if not self.done and buffers:
                held = len(self._buffers)
                self.keys, self.sizes = [*self.keys[:held], key], [*self.sizes[:held], size]
                self.end = key
        self.hold(buffers)

    def settle(self) -> None:
        """Be done with what is held now. Reads that still run end in memory, unheld. Idempotent."""
        with self._changed:
            if self.done:
                return
            self.expires_at = time.monotonic() + self._timeout_s
            self.done = True
            self._changed.notify_all()
        if self._on_settled is not None:
            self._on_settled()
        if self._on_done is not None:
            self._on_done(self)


class Prefetch:
    """Chunks that are being brought from lower tiers into memory, where nothing holds them afterwards. Thread-safe.

    acquire: a lease on them, given what is to be called when that is done.
    """

    def __init__(self, acquire: Callable[[Callable[[Lease], None]], Lease]) -> None:
        self._ended = threading.Event()
        self._found = 0
        self._lease: Lease | None = None
        self._lease = acquire(self._finished)

    @property
    def found(self) -> int:
        """How many leading keys were in memory or have come in."""
        return self._found if self._ended.is_set() or self._lease is None else self._lease.ready

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it ended; False when it has not after ``timeout_s``."""
        return self._ended.wait(timeout_s)

    def cancel(self) -> None:
        """Start no further read. What a read under way brings still comes in. Idempotent."""
        if self._lease is not None:
            self._finished(self._lease)

    def _finished(self, lease: Lease) -> None:
        self._found = max(self._found, lease.ready)
        self._ended.set()
        lease.close()
