"""What backends that send many requests at once share: threads, a limit on bytes in flight, recent answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from lmcache.errors import StorageError
from lmcache.forks import Home
from lmcache.keys import ChunkKey

T = TypeVar("T")
R = TypeVar("R")


class Crew:
    """At most ``threads`` calls at a time; whoever asks waits until none of his is running any more."""

    def __init__(self, threads: int, name: str) -> None:
        self._home = Home("this object store")
        self._executor = ThreadPoolExecutor(threads, name)
        self._closed = False

    def map(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``call`` of each item, in order. After the first that raises no other is begun, and its error is raised."""
        self._home.check()
        if not items:
            return []

        def work(item: T) -> R:
            if self._closed:
                raise StorageError("closed during a transfer")
            return call(item)

        futures: list[Future[R]] = []
        try:
            for item in items:
                futures.append(self._executor.submit(work, item))
        except RuntimeError as error:
            wait(futures)
            raise StorageError(f"closed: {error}") from error
        _, pending = wait(futures, return_when=FIRST_EXCEPTION)
        # What runs fills buffers of the caller, who may release them as soon as this returns.
        wait([future for future in pending if not future.cancel()])
        for future in futures:
            if not future.cancelled() and (failure := future.exception()) is not None:
                raise failure
        return [future.result() for future in futures]

    def close(self) -> None:
        """Begin nothing more, and wait for what is running."""
        if self._home.left:
            return
        # Not by cancel_futures: whoever waits for a future that is dropped so waits for ever.
        self._closed = True
        self._executor.shutdown(wait=True)


class ByteBudget:
    """Keeps the bytes that are in flight below ``limit``; one that is larger than that goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        """Wait until ``nbytes`` more may be in flight: as long as others take, which have timeouts."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


class RecentSizes:
    """Payload bytes of chunks that were seen lately. At most ``entries``, each for ``ttl_s`` seconds. Thread-safe.

    It may name a chunk that another process has removed since: reading that is a miss.
    """

    def __init__(self, entries: int, ttl_s: float) -> None:
        self._entries = entries
        self._ttl_s = ttl_s
        self._known: dict[ChunkKey, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def among(self, keys: Sequence[ChunkKey]) -> dict[ChunkKey, int]:
        """What is known of ``keys``."""
        now, known = time.monotonic(), self._known
        with self._lock:
            found = {key: entry for key in keys if (entry := known.get(key)) is not None}
        return {key: size for key, (size, until) in found.items() if until > now}

    def add(self, key: ChunkKey, size: int) -> None:
        until = time.monotonic() + self._ttl_s
        with self._lock:
            self._known.pop(key, None)
            self._known[key] = (size, until)
            if len(self._known) > self._entries:
                del self._known[next(iter(self._known))]

    def drop(self, keys: Sequence[ChunkKey]) -> None:
        with self._lock:
            for key in keys:
                self._known.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._known.clear()
