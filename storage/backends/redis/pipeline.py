"""Commands for many keys at once: sent in windows, answered in order, on one connection a server, tried again.

window 1   ──send──>            ──send──> window 2 ──send──> window 3
replies               <──read──                   <──read──            ...     `ahead` windows are out at most
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from redis.connection import ConnectionPool
from redis.exceptions import AuthenticationError, AuthorizationError, RedisClusterException, RedisError, ResponseError

from lmcache.errors import ClosedError, LMCacheError, StorageError
from lmcache.forks import Home
from lmcache.storage.backends.redis.retry import retrying
from lmcache.storage.backends.redis.servers import RedisConfig, open_servers, parse_url
from lmcache.storage.backends.redis.wire import ErrorReply, Part, Wire

T = TypeVar("T")
Outcome: TypeAlias = Literal[True, False] | ErrorReply
Windows: TypeAlias = Callable[[int], Iterator[range]]

FLUSH_BYTES = 64 << 10
# These pass by themselves, or are cured by asking again who serves the key.
PASSING = frozenset({"LOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "MOVED", "BUSY"})


class Unavailable(StorageError):
    """The server cannot be reached, or does not serve now; worth another try."""


def refused(reply: ErrorReply) -> StorageError:
    """What the server said no with, as an error; Unavailable where that passes."""
    return (Unavailable if reply.code in PASSING else StorageError)(reply.text)


@dataclass(eq=False)
class Batch:
    """What an operation asks for each of some keys, and what it does with the answers.

    request: the command, or commands, for key ``i``, answered by ``replies`` replies.
    answer: reads those; True to go on, False to stop at this key, or the server's refusal. It may be called for keys
        behind the one that it stopped at, which were already asked for.
    windows: the ranges of keys that are sent together, from a first key on. ahead: how many may be unanswered.
    """

    names: Sequence[bytes]
    request: Callable[[int], Sequence[Part]]
    answer: Callable[[Wire, int], Outcome]
    windows: Windows
    replies: int = 1
    ahead: int = 1
    done: int = 0
    """Leading keys that are answered; a further try goes on behind them."""


class Session:
    """The connections of one try: at most one a server."""

    def __init__(self, pipeline: Pipeline, deadline: float) -> None:
        self._pipeline = pipeline
        self._deadline = deadline
        self._wires: dict[ConnectionPool, Wire] = {}

    def wire(self, pool: ConnectionPool) -> Wire:
        if pool not in self._wires:
            self._wires[pool] = wire = Wire(pool, self._deadline)
            self._pipeline._opened(wire)
        return self._wires[pool]

    def exchange(self, batch: Batch) -> None:
        """Ask and answer from ``batch.done`` on, to the end or the first key that stops it."""
        windows = batch.windows(batch.done)
        out: deque[tuple[int, dict[Wire, list[int]]]] = deque()
        stopped: tuple[int, Outcome] | None = None
        while True:
            window = None if stopped else next(windows, None)
            if window is not None:
                out.append((window.stop, self._send(batch, window)))
            if not out:
                break
            if window is not None and len(out) < batch.ahead:
                continue
            stop, asked = out.popleft()
            for wire, indexes in asked.items():
                for index in indexes:
                    outcome = batch.answer(wire, index)
                    if outcome is not True and (stopped is None or index < stopped[0]):
                        stopped = index, outcome
                    elif outcome is True and index == batch.done:
                        batch.done += 1
            batch.done = stopped[0] if stopped else stop
        if stopped and isinstance(refusal := stopped[1], ErrorReply):
            raise refused(refusal)

    def end(self, *, keep: bool) -> None:
        """Give the connections back; those whose exchange is not whole are closed."""
        for wire in self._wires.values():
            self._pipeline._ended(wire)
            wire.give_back(keep=keep)

    def _send(self, batch: Batch, window: range) -> dict[Wire, list[int]]:
        asked: dict[Wire, list[int]] = {}
        for index in window:
            asked.setdefault(self.wire(self._pipeline.servers.pool_of(batch.names[index])), []).append(index)
        for wire, indexes in asked.items():
            parts: list[Part] = []
            nbytes = replies = 0
            for index in indexes:
                command = batch.request(index)
                parts += command
                nbytes += sum(map(len, command))
                replies += batch.replies
                if nbytes >= FLUSH_BYTES or index == indexes[-1]:
                    wire.send(parts, replies)
                    parts, nbytes, replies = [], 0, 0
        return asked


class Pipeline:
    """The servers of a config, and operations on them. Thread-safe; StorageError on failure, within the deadline."""

    def __init__(self, config: RedisConfig) -> None:
        self._config = config
        self._home = Home("this Redis tier")
        self._address = str(parse_url(config.url))
        self.servers = open_servers(config)
        self._slots = threading.BoundedSemaphore(config.connections)
        self._lock = threading.Lock()
        self._wires: set[Wire] = set()
        self._closed = False

    def perform(self, batch: Batch) -> int:
        """Ask for all keys of ``batch``; returns how many leading ones said to go on."""
        if batch.names:
            self.run(lambda session: session.exchange(batch), self._config.timeout_s)
        return batch.done

    def run(self, work: Callable[[Session], T], timeout_s: float) -> T:
        """``work`` on connections of its own, again when they fail."""
        deadline = time.monotonic() + timeout_s
        return retrying(
            lambda: self._try(work, deadline),
            self._config.retry,
            deadline=deadline,
            on=(Unavailable,),
            between=self._look_again,
        )

    def close(self) -> None:
        """End what runs, and close every connection. Idempotent."""
        if self._home.left:
            return
        with self._lock:
            self._closed = True
            wires = list(self._wires)
        for wire in wires:
            wire.abort()
        self.servers.close()

    def _try(self, work: Callable[[Session], T], deadline: float) -> T:
        self._home.check()
        if self._closed:
            raise ClosedError(f"{self._address} is closed")
        if not self._slots.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise StorageError(f"{self._address}: all {self._config.connections} connections are busy")
        session = Session(self, deadline)
        try:
            return work(session)
        except (AuthenticationError, AuthorizationError, ResponseError) as error:
            raise StorageError(f"{self._address}: {error}") from error
        except (RedisError, RedisClusterException, OSError) as error:
            if isinstance(error, LMCacheError):
                raise type(error)(f"{self._address}: {error}") from None
            raise Unavailable(f"{self._address}: {error}") from error
        finally:
            session.end(keep=not self._closed)
            self._slots.release()

    def _look_again(self) -> None:
        # What fails here fails again in the try that follows, which reports it.
        with contextlib.suppress(RedisError, RedisClusterException, OSError):
            self.servers.look_again()

    def _opened(self, wire: Wire) -> None:
        with self._lock:
            self._wires.add(wire)
            closed = self._closed
        if closed:
            wire.abort()

    def _ended(self, wire: Wire) -> None:
        with self._lock:
            self._wires.discard(wire)
