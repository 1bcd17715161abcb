"""The writes of a lower tier: a queue bounded in bytes, emptied in batches by one thread at a time.

put ──> queued ──> under way ──> settled (written, or not to be)
           │  ^         ├─ dropped meanwhile: undone by its own thread when it returns
           │  └─────────┴─ failed with others in its batch: once more, alone
           └─ dropped: released at once
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from lmcache import metrics
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer
from lmcache.storage.flow.owed import OwedRemovals
from lmcache.storage.memory.pool import PoolBuffer
from lmcache.storage.run.breaker import Side
from lmcache.storage.run.deadlines import Deadlines
from lmcache.storage.run.pace import SHARE, Pace
from lmcache.storage.run.threads import Threads

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
SPARE_THREADS = 2  # that take over from writes that hang

Settled = Callable[[Sequence[ChunkKey], bool], None]


T = TypeVar("T")


class Written(Protocol):
    """What the queue needs of the tier that it writes to (tier.py)."""

    name: str
    owed: OwedRemovals
    write_side: Side
    write_pace: Pace

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int: ...
    def guarded(self, call: Callable[[], T], otherwise: T, *, side: Side | None = None) -> T: ...
    def remove_now(self, what: Sequence[ChunkKey], *, always: bool = False) -> bool: ...
    def hung(self, side: Side, limit_s: float) -> None: ...


class _Write(NamedTuple):
    key: ChunkKey
    buffer: PoolBuffer
    settled: Settled | None
    failed: bool = False  # in a batch with others, before


class _Batch:
    """Writes under way."""

    def __init__(self, writes: list[_Write]) -> None:
        self.writes = writes
        self.nbytes = sum(write.buffer.nbytes for write in writes)
        self.undo: list[ChunkKey] = []
        self.late = False


class WriteQueue:
    """Thread-safe. What it holds, queued or under way, is at most ``most_bytes``; more is refused."""

    def __init__(self, tier: Written, most_bytes: int, timeout_s: float, deadlines: Deadlines) -> None:
        self._tier = tier
        self._most_bytes = most_bytes
        self._timeout_s = timeout_s
        self._queued: deque[_Write] = deque()
        self._under_way: set[_Batch] = set()
        self._changed = threading.Condition()
        self._holds = 0  # clears under way
        self._pumping = False
        self._closed = False
        self.pending_bytes = 0
        self._refused = False
        self._too_large = False
        self._threads = Threads(f"{tier.name}-write", 1, spare=SPARE_THREADS, deadlines=deadlines, on_back=self._resume)

    @property
    def hung_threads(self) -> int:
        return self._threads.lost

    def returning(self) -> set[ChunkKey]:
        """Keys of writes under way that were dropped, and are undone when they end."""
        with self._changed:
            return {key for batch in self._under_way for key in batch.undo}

    def put(
        self, key: ChunkKey, buffer: PoolBuffer, *, settled: Settled | None = None, wait_until: float | None = None
    ) -> bool:
        """Queue a write, taking the handle over; False when the queue is full (still, at ``wait_until``) or the
        breaker open, or the key's removal is owed: then the write is shed, and counted.

        settled: called with the keys of writes that ended, and whether all of them are held below; those that were
        dropped are not. Not called when False is returned.
        """
        with self._changed:
            if wait_until is not None and not self._fits(buffer.nbytes):
                left = max(0.0, wait_until - time.monotonic())
                self._changed.wait_for(lambda: self._fits(buffer.nbytes) or self._closed, left)
            taken = self._fits(buffer.nbytes) and not self._closed and self._tier.write_side.breaker.ready
            # Its old bytes, on their way still, could be taken for the new ones.
            # Where it is being cleared, they wait for that.
            taken = taken and (self._holds > 0 or key not in self._tier.owed)
            if taken:
                self._queued.append(_Write(key, buffer, settled))
                self.pending_bytes += buffer.nbytes
                self._pump()
            too_large, self._too_large = buffer.nbytes > self._most_bytes and not self._too_large, self._too_large
            self._too_large |= too_large
        if too_large:
            logger.warning(
                "tier %s: a chunk of %d bytes is larger than its queue of %d: such chunks are not written; raise "
                "write_queue (at most half of memory.capacity counts)",
                self._tier.name,
                buffer.nbytes,
                self._most_bytes,
            )
        if not taken:
            metrics.TIER_SHED_BYTES.labels(self._tier.name).inc(buffer.nbytes)
            buffer.release()
        return taken

    @property
    def room_bytes(self) -> int:
        """Bytes that would be taken now."""
        if self._closed or not self._tier.write_side.breaker.ready:
            return 0
        return max(0, self._most_bytes - self.pending_bytes)

    def drop(self, matches: Callable[[ChunkKey], bool], wait_s: float = 0.0) -> None:
        """Forget queued writes; those under way are undone when they end, which is waited for, but not longer."""
        with self._changed:
            dropped = [write for write in self._queued if matches(write.key)]
            if dropped:
                self._queued = deque(write for write in self._queued if not matches(write.key))
                self.pending_bytes -= sum(write.buffer.nbytes for write in dropped)
                self._changed.notify_all()
            ending: list[_Batch] = []
            for batch in self._under_way:
                if undo := [write.key for write in batch.writes if matches(write.key)]:
                    batch.undo += undo
                    ending.append(batch)
        self._settle(dropped, held=False)
        with self._changed:
            self._changed.wait_for(lambda: self._under_way.isdisjoint(ending), wait_s)

    def hold(self, matches: Callable[[ChunkKey], bool]) -> None:
        """Drop what matches, and start no write until ``go_on``."""
        with self._changed:
            self._holds += 1
        self.drop(matches)

    def go_on(self) -> None:
        """Write again, but not what the tier owes the removal of."""
        with self._changed:
            self._holds -= 1
            owed: list[_Write] = []
            if not self._holds and self._tier.owed:
                queued, self._queued = self._queued, deque()
                for write in queued:
                    (owed if write.key in self._tier.owed else self._queued).append(write)
                self.pending_bytes -= sum(write.buffer.nbytes for write in owed)
            self._pump()
            self._changed.notify_all()
        metrics.TIER_SHED_BYTES.labels(self._tier.name).inc(sum(write.buffer.nbytes for write in owed))
        self._settle(owed, held=False)

    def wait_ended(self, timeout_s: float) -> None:
        """Wait for the writes under way, but not longer."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or under way."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.pending_bytes, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Drop what is queued; returns whether no write is under way after ``timeout_s``."""
        with self._changed:
            self._closed = True
        self.drop(lambda key: True)
        self._threads.close()
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, timeout_s)

    def _resume(self) -> None:
        with self._changed:
            self._pump()

    def _fits(self, nbytes: int) -> bool:
        return self.pending_bytes + nbytes <= self._most_bytes

    def _pump(self) -> None:
        """Have a thread empty the queue, unless one does (with the lock held)."""
        if self._queued and not self._pumping and not self._holds and not self._closed:
            self._pumping = self._start()

    def _start(self) -> bool:
        batches: list[_Batch] = []

        def late() -> None:
            # Its thread has been replaced: another goes on with the queue.
            self._tier.hung(self._tier.write_side, self._timeout_s)
            with self._changed:
                for batch in batches:
                    batch.late = True
                self._pumping = False
                self._pump()

        return self._threads.submit(lambda: self._write_next(batches), self._timeout_s, late) is not None

    def _write_next(self, batches: list[_Batch]) -> None:
        batch = self._next()
        if batch is None:
            return
        batches.append(batch)
        keys = [write.key for write in batch.writes]
        buffers = [write.buffer for write in batch.writes]
        count = self._tier.guarded(lambda: self._tier.put(keys, buffers), None, side=self._tier.write_side)
        with self._changed:
            undo = list(batch.undo)
            ended, again = self._ended(batch, count)
            self._queued.extendleft(reversed(again))
        nbytes = sum(write.buffer.nbytes for write in ended)
        if count is None:
            metrics.TIER_SHED_BYTES.labels(self._tier.name).inc(nbytes)
        else:
            self._note_refused(max(0, len(keys) - count), batch)
        self._settle(ended, held=count == len(keys))
        began_at = time.monotonic()
        undone = not undo or self._tier.remove_now(undo, always=True)  # dropped meanwhile
        with self._changed:
            self._under_way.discard(batch)
            self.pending_bytes -= nbytes
            if not batch.late:
                self._pumping = False
            self._pump()
            self._changed.notify_all()
        if undo:
            self._tier.owed.settle(undo, undone, began_at)

    def _ended(self, batch: _Batch, count: int | None) -> tuple[list[_Write], list[_Write]]:
        """The writes that are over, and those of a failed batch to try once more, alone (with the lock held)."""
        tries = count is None and len(batch.writes) > 1 and not self._closed and self._tier.write_side.breaker.ready
        again = [write._replace(failed=True) for write in batch.writes if tries and write.key not in batch.undo]
        return [write for write in batch.writes if not tries or write.key in batch.undo], again

    def _next(self) -> _Batch | None:
        most = self._tier.write_pace.batch_bytes(self._timeout_s * SHARE, BATCH_BYTES)
        with self._changed:
            writes: list[_Write] = []
            nbytes = 0
            while self._queued and not self._holds:
                nbytes += self._queued[0].buffer.nbytes
                if writes and (nbytes > most or self._queued[0].failed):
                    break
                writes.append(self._queued.popleft())
                if writes[0].failed:
                    break
            if not writes:
                self._pumping = False
                self._changed.notify_all()
                return None
            batch = _Batch(writes)
            self._under_way.add(batch)
            return batch

    def _note_refused(self, count: int, batch: _Batch) -> None:
        """Count refused chunks (a full tier is no failure), and log it once, until it takes a whole batch again."""
        metrics.TIER_REFUSED_CHUNKS.labels(self._tier.name).inc(count)
        if count and not self._refused:
            largest = max(write.buffer.nbytes for write in batch.writes)
            logger.warning(
                "tier %s did not take %d of %d chunks of up to %d bytes: it is full, or too small for them, unless it "
                "has said why",
                self._tier.name,
                count,
                len(batch.writes),
                largest,
            )
        self._refused = count > 0

    @staticmethod
    def _settle(writes: Sequence[_Write], held: bool) -> None:
        told: dict[Settled, list[ChunkKey]] = {}
        for write in writes:
            write.buffer.release()
            if write.settled is not None:
                told.setdefault(write.settled, []).append(write.key)
        for settled, keys in told.items():
            settled(keys, held)
