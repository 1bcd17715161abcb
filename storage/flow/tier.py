"""A lower tier as the manager sees it: a backend, without what it was told to forget; its write queue; its health."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence

from lmcache.config import LMCacheConfig
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.flow.calls import TierCalls
from lmcache.storage.flow.health import TierHealth
from lmcache.storage.flow.owed import OwedRemovals
from lmcache.storage.flow.owed_files import OwedFiles
from lmcache.storage.flow.writing import WriteQueue
from lmcache.storage.run.deadlines import Deadlines
from lmcache.storage.run.pace import Pace
from lmcache.storage.selection import Selection, clear_backend

logger = logging.getLogger(__name__)

CLOSE_S = 1.0  # for a write under way, and for the backend


class LowerTier(TierCalls):
    """A backend, what is queued for it (writing.py), and what it was told to forget (owed.py). Thread-safe."""

    def __init__(
        self,
        backend: StorageBackend,
        config: LMCacheConfig,
        queue_bytes: int,
        deadlines: Deadlines,
        name: str | None = None,
        files: OwedFiles | None = None,
    ) -> None:
        super().__init__(name or backend.name, config, deadlines)
        self.backend = backend
        self._lock = threading.Lock()
        self._clearing: set[Selection] = set()  # in the background
        self.read_pace, self.write_pace = Pace(), Pace()
        self.writes = WriteQueue(self, queue_bytes, config.read_timeout_s, deadlines)
        self.owed = OwedRemovals(self.name, self.remove_now, self.writes.returning, self._timeout_s, files)

    def doubt(self) -> None:
        self.owed.doubt()

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """The backend's, without what counts as removed."""
        there = self.owed.leading(keys)
        return self.backend.sizes(there) if there else []

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        """The backend's, without what counts as removed."""
        there = self.owed.leading(keys)
        return self.backend.contains(there) if there else 0

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        """The backend's ``get``, up to the first key that counts as removed when it returns."""
        began_at = time.monotonic()
        try:
            count = self.backend.get(keys, into)
        except Exception:
            self.read_pace.failed(sum(buffer.nbytes for buffer in into), time.monotonic() - began_at)
            raise
        if count:
            self.owed.answered(began_at)
            self.read_pace.moved(sum(buffer.nbytes for buffer in into[:count]), time.monotonic() - began_at)
        return len(self.owed.leading(keys[:count]))

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        """The backend's ``put``, timed for the pace of the writes."""
        nbytes = sum(buffer.nbytes for buffer in buffers)
        began_at = time.monotonic()
        try:
            count = self.backend.put(keys, buffers)
        except Exception:
            self.write_pace.failed(nbytes, time.monotonic() - began_at)
            raise
        if count:
            self.write_pace.moved(nbytes, time.monotonic() - began_at)
        return count

    def remove(self, keys: Sequence[ChunkKey], timeout_s: float) -> int:
        """Forget chunks, also queued ones and those that are being written.

        Those that cannot be removed now, or that a write may bring back, count as not there until they are gone.
        """
        deadline = time.monotonic() + timeout_s
        # A write under way could be seen once more between this removal and its own undoing.
        self.writes.drop(set(keys).__contains__, timeout_s / 2)
        nothing: int | None = None
        began_at = time.monotonic()
        left = max(0.0, deadline - began_at)
        removed = self.ask(lambda: self.backend.remove(keys), nothing, left, self.write_side)
        self.owed.settle(keys, removed is not None, began_at)
        if removed is None:
            logger.warning("tier %s: %d chunks cannot be removed now; it is tried again", self.name, len(keys))
        return removed or 0

    def remove_now(self, what: Sequence[ChunkKey] | Selection, *, always: bool = False) -> bool:
        """Take chunks out of the place, on the calling thread; whether that succeeded."""

        def remove() -> bool:
            if isinstance(what, Selection):
                clear_backend(self.backend, what)
            else:
                self.backend.remove(what)
            return True

        return self.guarded(remove, False, side=self.write_side, transfers=False, always=always)

    def remove_soon(self, keys: Sequence[ChunkKey]) -> None:
        """The same, and return: from now on they count as not there."""
        self.writes.drop(set(keys).__contains__)
        self.owed.settle(keys, False, 0.0)

    def clear(self, selection: Selection, timeout_s: float) -> int:
        """Drop queued writes and stored chunks. Does not ask the breaker.

        Waits for a write under way, which is undone by its thread when it takes too long. What cannot be cleared now
        counts as not there, and is cleared later.
        """
        self.owed.owe(selection)
        self.writes.hold(selection.matches)
        return self._clear_held(selection, timeout_s)

    def clear_soon(self, selection: Selection) -> None:
        """The same, and return: from now on it counts as not there. What is put from now on is written behind it."""
        with self._lock:
            if selection in self._clearing:
                # No write of these has begun since; the clear that is about to be done, or is being, is theirs too.
                self.writes.drop(selection.matches)
                return
            self._clearing.add(selection)
        self.owed.owe(selection)
        self.writes.hold(selection.matches)
        threading.Thread(
            target=self._clear_held, args=(selection, self._timeout_s), name=f"lmcache-{self.name}-clear", daemon=True
        ).start()

    def _clear_held(self, selection: Selection, timeout_s: float) -> int:
        """Clear while the writes are held, then let them go on."""
        deadline = time.monotonic() + timeout_s
        nothing: int | None = None
        try:
            self.writes.wait_ended(timeout_s / 2)
            began_at = time.monotonic()
            cleared = self._wait(
                self._asks,
                lambda: clear_backend(self.backend, selection),
                nothing,
                max(0.0, deadline - began_at),
                side=self.write_side,
                transfers=False,
                always=True,
            )
            self.owed.settle([selection], cleared is not None, began_at)
        finally:
            with self._lock:
                self._clearing.discard(selection)
            self.writes.go_on()
        if cleared is None:
            logger.error("tier %s: could not be cleared now; what it has counts as not there until it is", self.name)
        return cleared or 0

    def close(self) -> None:
        """Stop; what is still queued is dropped. A call that hangs is left behind on its daemon thread.

        From then on it finds nothing, and takes nothing.
        """
        self._stopping.set()
        self.owed.close()
        ended = self.writes.close(CLOSE_S)
        if self.owed:
            self._wait(self._asks, lambda: self.owed.pay(math.inf), None, CLOSE_S, transfers=False, always=True)
        if self.owed:
            logger.error("tier %s: closed while %d removals are owed: chunks may come back", self.name, len(self.owed))
        if ended:
            self._wait(self._asks, self.backend.close, None, CLOSE_S, transfers=False, always=True)
        for threads in (self._reads, self._asks):
            threads.close()

    def health(self) -> TierHealth:
        return TierHealth(
            name=self.name,
            reads=self.read_side.health(),
            writes=self.write_side.health(),
            latency_s=self._latency_s,
            read_bytes_per_s=self.read_pace.bytes_per_s,
            write_bytes_per_s=self.write_pace.bytes_per_s,
            queue_bytes=self.writes.pending_bytes,
            hung_threads=self._reads.lost + self._asks.lost + self.writes.hung_threads,
            owes_clear=bool(self.owed.selections),
            owed_removals=len(self.owed),
        )
