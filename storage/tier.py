"""A lower tier as the manager runs it: a backend, its threads, its breaker and its write queue."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from lmcache import metrics
from lmcache.config import LMCacheConfig
from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.breaker import CircuitBreaker
from lmcache.storage.pool import PoolBuffer

logger = logging.getLogger(__name__)

T = TypeVar("T")
READ_THREADS = 2
WRITE_BATCH_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class _Write:
    """A queued write, with a handle of its own on the bytes."""

    key: ChunkKey
    buffer: PoolBuffer
    on_done: Callable[[bool], None] | None

    def end(self, held: bool) -> None:
        self.buffer.release()
        if self.on_done is not None:
            self.on_done(held)


class LowerTier:
    """Runs a backend's blocking calls on threads of its own, so that one that hangs holds up nobody else."""

    def __init__(self, backend: StorageBackend, config: LMCacheConfig, queue_bytes: int) -> None:
        self.backend = backend
        self.name = backend.name
        self.breaker = CircuitBreaker(config.breaker)
        self._queue_bytes = queue_bytes
        self._reads: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._asks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writes: deque[_Write] = deque()
        self._changed = threading.Condition()
        self._pending_bytes = 0
        self._generation = 0
        self._removed: set[ChunkKey] = set()  # of those that are being written
        self._clearing = 0
        self._writing: set[ChunkKey] = set()
        self._owed: set[bytes | None] = set()  # formats that could not be cleared yet
        self._stopping = False
        self._timeout_s = config.read_timeout_s
        for jobs in [self._reads] * READ_THREADS + [self._asks]:
            threading.Thread(target=_run, args=(jobs,), name=f"lmcache-{self.name}", daemon=True).start()
        self._writer = threading.Thread(target=self._write_loop, name=f"lmcache-{self.name}-write", daemon=True)
        self._writer.start()

    def guarded(self, call: Callable[[], T], otherwise: T, *, transfers: bool = True) -> T:
        """``call()``, or ``otherwise`` when it raises: a failing tier is a miss, counted and logged.

        transfers: whether it moves bytes. A quick look into an index says little about reads that come late, so its
        success closes an open breaker, but does not make up for failures.
        """
        started = time.monotonic()
        try:
            for fingerprint in list(self._owed):
                self.backend.clear(fingerprint)
                self._owed.discard(fingerprint)
            result = call()
        # Whatever a backend raises, also one that is not ours, is this tier's failure and nobody else's.
        except Exception as error:
            self.failed(str(error))
            return otherwise
        # An answer after the deadline came too late for whoever asked: it does not speak for the tier.
        if time.monotonic() - started <= self._timeout_s and (transfers or self.breaker.is_open):
            self._succeeded()
        return result

    def _succeeded(self) -> None:
        was_open = self.breaker.is_open
        self.breaker.succeeded()
        if was_open:
            metrics.TIER_BREAKER_OPEN.labels(self.name).set(0)
            logger.warning("tier %s: answers again", self.name)

    def failed(self, why: str) -> None:
        """Count a failure; the breaker opens after some."""
        metrics.TIER_ERRORS.labels(self.name).inc()
        was_open = self.breaker.is_open
        self.breaker.failed()
        metrics.TIER_BREAKER_OPEN.labels(self.name).set(self.breaker.is_open)
        if not was_open:
            then = "; it is left alone for a while" if self.breaker.is_open else ""
            logger.warning("tier %s: %s%s", self.name, why, then)

    def read(self, job: Callable[[], None]) -> None:
        """Run ``job`` on a reading thread."""
        self._reads.put(job)

    def ask(self, call: Callable[[], T], otherwise: T, timeout_s: float) -> T:
        """``guarded(call)`` with a deadline: a tier that hangs answers ``otherwise``, which counts as a failure."""
        return self._ask(call, otherwise, timeout_s) if self.breaker.allows() else otherwise

    def _ask(self, call: Callable[[], T], otherwise: T, timeout_s: float) -> T:
        answer: list[T] = []
        done = threading.Event()

        def job() -> None:
            answer.append(self.guarded(call, otherwise, transfers=False))
            done.set()

        self._asks.put(job)
        if done.wait(timeout_s):
            return answer[0]
        self.failed(f"no answer within {timeout_s} s")
        return otherwise

    def write(self, key: ChunkKey, buffer: PoolBuffer, on_done: Callable[[bool], None] | None = None) -> None:
        """Queue a write, taking the handle over; sheds it when the queue is full or the breaker open.

        on_done: called once, from whatever thread, with whether the backend holds the chunk.
        """
        write = _Write(key, buffer, on_done)
        with self._changed:
            full = self._pending_bytes + buffer.nbytes > self._queue_bytes
            if not full and not self._stopping and not (self.breaker.is_open and not self.breaker.allows()):
                self._writes.append(write)
                self._pending_bytes += buffer.nbytes
                self._changed.notify_all()
                return
        metrics.TIER_SHED_BYTES.labels(self.name).inc(buffer.nbytes)
        write.end(False)

    def remove(self, keys: Sequence[ChunkKey], timeout_s: float) -> int:
        """Drop queued writes and stored chunks; returns how many there were of the larger kind.

        Waits for a write under way, which is undone by its thread when it takes too long.
        """
        deadline = time.monotonic() + timeout_s
        unwanted = set(keys)
        with self._changed:
            self._removed |= unwanted & self._writing
            dropped = self._take_out(lambda key: key in unwanted)
        for write in dropped:
            write.end(False)
        with self._changed:
            self._changed.wait_for(lambda: not unwanted & self._writing, timeout_s / 2)
        left = max(0.0, deadline - time.monotonic())
        return max(len(dropped), self.ask(lambda: self.backend.remove(keys), 0, left))

    def clear(self, fingerprint: bytes | None, timeout_s: float) -> int:
        """Drop queued writes and stored chunks of a format. Does not ask the breaker.

        Waits for a write under way, which is undone by its thread when it takes too long. A tier that cannot be cleared
        now is cleared before it is used again, so that its chunks do not come back.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._generation += 1
            self._clearing += 1
            dropped = self._take_out(lambda key: fingerprint in (None, key.fingerprint))
        for write in dropped:
            write.end(False)
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._writing, timeout_s / 2)
            left = max(0.0, deadline - time.monotonic())
            cleared = self._ask(lambda: self.backend.clear(fingerprint), None, left)
        finally:
            with self._changed:
                self._clearing -= 1
                self._changed.notify_all()
        if cleared is None:
            self._owed.add(fingerprint)
            logger.error("tier %s: could not be cleared now; it will be before it is used again", self.name)
        return cleared or 0

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or being written."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending_bytes, timeout_s)

    def close(self) -> None:
        """Stop; what is still queued is dropped. A call that hangs is left behind on its daemon thread."""
        with self._changed:
            self._stopping = True
            dropped = self._take_out(lambda _: True)
        for write in dropped:
            write.end(False)
        for _ in range(READ_THREADS):
            self._reads.put(None)
        self._asks.put(None)
        self._writer.join(timeout=1.0)
        if not self._writer.is_alive():
            self.guarded(self.backend.close, None)

    @property
    def pending_bytes(self) -> int:
        return self._pending_bytes

    def _take_out(self, unwanted: Callable[[ChunkKey], bool]) -> list[_Write]:
        """Take writes out of the queue, under the lock; the caller ends them, without it."""
        dropped = [write for write in self._writes if unwanted(write.key)]
        self._writes = deque(write for write in self._writes if not unwanted(write.key))
        self._pending_bytes -= sum(write.buffer.nbytes for write in dropped)
        self._changed.notify_all()
        return dropped

    def _write_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: (self._writes and not self._clearing) or self._stopping)
                if self._stopping:
                    return
                generation, batch, nbytes = self._generation, [], 0
                while self._writes and nbytes < WRITE_BATCH_BYTES:
                    batch.append(self._writes.popleft())
                    nbytes += batch[-1].buffer.nbytes
                self._writing = {write.key for write in batch}
            held = self._write_batch(batch)
            with self._changed:
                stale = generation != self._generation
                removed = [write.key for write in batch if stale or write.key in self._removed]
            if removed:
                # Cleared or removed meanwhile: what was just written must not come back.
                self.guarded(lambda: self.backend.remove(removed), 0)  # noqa: B023
            with self._changed:
                self._writing.clear()
                self._removed.clear()
                self._pending_bytes -= nbytes
                self._changed.notify_all()
            for write, ok in zip(batch, held, strict=True):
                write.end(ok)

    def _write_batch(self, batch: list[_Write]) -> list[bool]:
        """Which of them the backend holds."""
        keys = [write.key for write in batch]
        count = self.guarded(lambda: self.backend.put(keys, [write.buffer for write in batch]), 0)
        if count in (0, len(batch)) or not any(write.on_done for write in batch):
            return [count == len(batch)] * len(batch)
        return [self.guarded(lambda: self.backend.contains([key]), 0, transfers=False) == 1 for key in keys]  # noqa: B023


def _run(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        # The entry loop of a thread: a job that fails must not take the thread with it.
        except Exception:
            logger.exception("a storage job failed")
