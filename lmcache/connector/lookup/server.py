"""The scheduler asks, a worker answers: lookups over a local ZMQ socket, whether or not they share a process.

The worker owns memory and tiers, so it does the hashing and the reading; the scheduler only learns how many tokens are
held for it. A worker that is late, gone or broken is a miss. Sockets lie in a directory of the user's own (mode 0700).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from lmcache import metrics
from lmcache.connector.blending import Blending, Found
from lmcache.connector.identity.adapters import Adapter
from lmcache.connector.identity.watch import Identity
from lmcache.connector.passages import Passages
from lmcache.connector.sockets import SCHEME, bind
from lmcache.engine.engine import CacheEngine, Lookup
from lmcache.forks import Home
from lmcache.keys import PlaceholderSpan

logger = logging.getLogger(__name__)

_FINDERS = 2  # prompts whose passages are looked for at once
_LEAST_S = 0.05  # what is left for passages where the exact prefix took all the time


class Acquire(msgspec.Struct, tag=True, frozen=True):
    """passages: how they are found, where the request is to be blended. ranks: the weights' token of every worker.

    adapter: the request's, if it has one.
    """

    lookup_id: int
    tokens: bytes
    tags: dict[str, str]
    placeholders: list[PlaceholderSpan]
    passages: Passages | None = None
    ranks: tuple[str, ...] = ()
    adapter: Adapter | None = None


class Release(msgspec.Struct, tag=True, frozen=True):
    lookup_id: int


class Settle(msgspec.Struct, tag=True, frozen=True):
    """Answer now, with what is held."""

    lookup_id: int


class Clear(msgspec.Struct, tag=True, frozen=True):
    lookup_id: int


class Reply(msgspec.Struct, frozen=True):
    """tokens: held for the lookup (Acquire), or chunks removed (Clear); -1: the request failed.

    reach: where what can be blended ends, if that is further. weights: the worker's token.
    reading: no answer yet; so much is held already.
    """

    lookup_id: int
    tokens: int
    reach: int = 0
    weights: str = ""
    reading: bool = False


_Request = Acquire | Release | Settle | Clear


class Answer(NamedTuple):
    """The first ``tokens`` of a prompt are held exactly, and up to ``reach`` passages that can be blended.

    ranks: the weights' token of every worker.
    """

    tokens: int
    reach: int = 0
    ranks: tuple[str, ...] = ()


class Held:
    """What a worker keeps for a lookup until it is loaded or released."""

    def __init__(self) -> None:
        self.lookup: Lookup | None = None
        self.found: Found | None = None
        self.settled = self.answered = False

    def close(self) -> None:
        for each in (self.lookup, self.found):
            if each is not None:
                each.close()


class LookupServer:
    """The worker's side: one thread that answers lookups and keeps them until they are loaded or released.

    Passages are looked for on threads beside it, for that waits for storage.
    identity: while it is in doubt, lookups wait for ``resume``. admits: whether KV of an adapter may be promised.
    """

    def __init__(
        self,
        engine: CacheEngine,
        address: str,
        blending: Blending | None = None,
        identity: Identity | None = None,
        admits: Callable[[Adapter], bool] = lambda adapter: True,
    ) -> None:
        self._home = Home("this LookupServer")
        self._engine = engine
        self._admits = admits
        self._identity = identity or Identity(None)
        self._waiting: list[tuple[bytes, Acquire]] = []  # of the server's thread
        self._blending = blending
        self._finders = ThreadPoolExecutor(_FINDERS, "lmcache-passages")
        self._address = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.set_hwm(0)  # a reply that is dropped would be a lookup that waits for its deadline
        try:
            bind(self._socket, address)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._wake_in = self._context.socket(zmq.PULL)
        self._wake_in.bind("inproc://wake")
        # Lookups end on storage threads, and a ZMQ socket belongs to one thread: replies queue here.
        self._replies: list[tuple[bytes, Reply]] = []
        self._lookups: dict[int, Held] = {}
        self._lock = threading.Lock()
        self._wake_out = self._context.socket(zmq.PUSH)
        self._wake_out.connect("inproc://wake")
        self._stopping = self._closed = self._woken = False
        self._thread = threading.Thread(target=self._serve, name="lmcache-lookup", daemon=True)
        self._thread.start()

    def take(self, lookup_id: int) -> Held | None:
        """What is held for the lookup, handed over to the caller, who closes it."""
        with self._lock:
            return self._lookups.pop(lookup_id, None)

    def resume(self) -> None:
        """Go on with lookups that wait for the weights to be known."""
        if self._waiting:
            self._wake()

    def drop(self) -> None:
        """Let go of every lookup: what it holds has another name now."""
        with self._lock:
            lookups, self._lookups = list(self._lookups.values()), {}
        for held in lookups:
            held.close()

    def close(self) -> None:
        """Stop answering and let go of every lookup. Idempotent."""
        if self._stopping or self._home.left:
            return
        self._stopping = True
        self._finders.shutdown(wait=False, cancel_futures=True)
        self._wake()
        self._thread.join(timeout=5)
        with self._lock:
            self._closed = True
            lookups, self._lookups = list(self._lookups.values()), {}
        for held in lookups:
            held.close()
        if not self._thread.is_alive():
            for socket in (self._socket, self._wake_in, self._wake_out):
                socket.close(linger=0)
            self._context.term()
        Path(self._address.removeprefix(SCHEME)).unlink(missing_ok=True)  # ZMQ leaves the file behind

    def _serve(self) -> None:
        decoder = msgspec.msgpack.Decoder(_Request)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_in, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll())
            if self._wake_in in ready:
                self._wake_in.recv()
                with self._lock:
                    self._woken = False
                waiting, self._waiting = self._waiting, []
                for client, request in waiting:
                    self._acquire(client, request)
                self._send_replies()
            if self._socket in ready:
                client, body = self._socket.recv_multipart()[:2]
                try:
                    self._handle(client, decoder.decode(body))
                # The entry loop of a thread: whatever fails here is one request's miss.
                except Exception:
                    metrics.LOOKUP_ERRORS.inc()
                    logger.exception("a lookup failed and counts as a miss")
                    self._fail(client, body)
                self._send_replies()

    def _handle(self, client: bytes, request: _Request) -> None:
        if isinstance(request, Release):
            self._take_waiting(request.lookup_id)
            if held := self.take(request.lookup_id):
                held.close()
        elif isinstance(request, Settle):
            self._settle(client, request.lookup_id)
        elif isinstance(request, Clear):
            self._answer(client, Reply(request.lookup_id, self._engine.reset()))
        else:
            self._acquire(client, request)

    def _acquire(self, client: bytes, request: Acquire) -> None:
        if self._identity.in_doubt():
            self._waiting.append((client, request))
            return
        names = self._identity.tags(request.ranks)
        if names is None or (request.adapter is not None and not self._admits(request.adapter)):
            self._answer(client, Reply(request.lookup_id, 0))
            return
        held, asked_at = Held(), time.monotonic()
        with self._lock:
            self._lookups[request.lookup_id] = held
        held.lookup = self._engine.lookup(
            request.tokens,
            tags={**request.tags, **names},
            placeholders=request.placeholders,
            on_done=lambda done: self._looked_up(
                client, request, held, self._usable(done), time.monotonic() - asked_at
            ),
        )
        if not held.lookup.done and (tokens := held.lookup.tokens):
            self._answer(client, Reply(request.lookup_id, tokens, reading=True))

    def _usable(self, done: Lookup) -> int:
        """Tokens that are held, unless the weights have changed while they were read."""
        return done.tokens if done.fingerprint == self._engine.database.fingerprint else 0

    def _settle(self, client: bytes, lookup_id: int) -> None:
        """Whoever asked waits no longer."""
        if self._take_waiting(lookup_id):
            self._answer(client, Reply(lookup_id, 0))
        with self._lock:
            held = self._lookups.get(lookup_id)
        if held is None or held.lookup is None:
            return
        held.settled = True
        if held.lookup.done:  # passages are being looked for
            self._finish(client, held, Reply(lookup_id, self._usable(held.lookup)))
        held.lookup.settle()

    def _take_waiting(self, lookup_id: int) -> bool:
        """Forget a lookup that waits for the weights to be known; whether there was one."""
        left = [each for each in self._waiting if each[1].lookup_id != lookup_id]
        found, self._waiting = len(left) < len(self._waiting), left
        return found

    def _finish(self, client: bytes, held: Held, reply: Reply) -> None:
        """Give a lookup its one answer, unless it has it."""
        with self._lock:
            first, held.answered = not held.answered, True
        if first:
            self._answer(client, reply)

    def _looked_up(self, client: bytes, request: Acquire, held: Held, exact: int, seconds: float) -> None:
        """The exact prefix is held; passages behind it are next."""
        reply = Reply(request.lookup_id, exact)
        if self._blending is None or request.passages is None or held.settled or 4 * exact >= len(request.tokens):
            self._finish(client, held, reply)
            return
        left = max(_LEAST_S, self._engine.config.read_timeout_s - seconds)
        try:
            self._finders.submit(self._find, client, request, held, self._blending, exact, time.monotonic() + left)
        except RuntimeError:  # closed
            self._finish(client, held, reply)

    def _find(
        self, client: bytes, request: Acquire, held: Held, blending: Blending, exact: int, ends_at: float
    ) -> None:
        found = None
        with self._lock:
            gone = request.lookup_id not in self._lookups
        if gone or held.settled:  # released while it queued, or answered: nobody waits for passages
            return
        try:
            left = ends_at - time.monotonic()
            if left <= 0:  # others took all of its time
                self._finish(client, held, Reply(request.lookup_id, exact))
                return
            left = max(_LEAST_S, left)
            found = blending.find(request.tokens, request.passages or Passages(), exact, request.tags, left)
        # The entry of a thread: whatever fails here, there are no passages.
        except Exception:
            metrics.LOOKUP_ERRORS.inc()
            logger.exception("lmcache: passages of a prompt could not be looked up")
        with self._lock:
            wanted = request.lookup_id in self._lookups and not held.answered
            held.answered = True
            if wanted:
                held.found = found
        if wanted:
            self._answer(client, Reply(request.lookup_id, exact, found.reach if found else 0))
        elif found is not None:  # released, or answered, meanwhile
            found.close()

    def _fail(self, client: bytes, body: bytes) -> None:
        try:
            lookup_id = int(msgspec.msgpack.decode(body)["lookup_id"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            return
        self._answer(client, Reply(lookup_id, -1))

    def _answer(self, client: bytes, reply: Reply) -> None:
        reply = msgspec.structs.replace(reply, weights=self._identity.token)
        with self._lock:
            self._replies.append((client, reply))
        if threading.current_thread() is not self._thread:
            self._wake()

    def _wake(self) -> None:
        with self._lock:
            # One wake at a time: a full pipe would block its sender with the lock that the server needs to drain it.
            if not self._closed and not self._woken:
                self._woken = True
                self._wake_out.send(b"")

    def _send_replies(self) -> None:
        with self._lock:
            replies, self._replies = self._replies, []
        for client, reply in replies:
            self._socket.send_multipart([client, msgspec.msgpack.encode(reply)])


class LookupClient:
    """The scheduler's side. Used by one thread; nothing here blocks for longer than the caller says."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._home = Home("this LookupClient")
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets = []
        for address in addresses:
            socket = self._context.socket(zmq.DEALER)
            socket.linger = 0
            socket.set_hwm(0)
            socket.connect(address)
            self._poller.register(socket, zmq.POLLIN)
            self._sockets.append(socket)
        # Not from 1: a worker may still hold lookups of a scheduler that is gone, or that of another connector.
        self._next_id = secrets.randbits(62)
        self._answers: dict[int, dict[int, Reply]] = {}  # by lookup, then by rank
        self._so_far: dict[int, dict[int, int]] = {}

    def acquire(
        self,
        tokens: bytes,
        tags: Mapping[str, str],
        placeholders: Sequence[PlaceholderSpan],
        passages: Passages | None = None,
        ranks: tuple[str, ...] = (),
        adapter: Adapter | None = None,
    ) -> int:
        """Ask every worker to hold the longest prefix it has, and ``passages`` behind it; returns the lookup's id."""
        return self._ask(
            lambda lookup_id: Acquire(
                lookup_id, tokens, dict(tags), list(placeholders), passages, ranks=ranks, adapter=adapter
            )
        )

    def reset(self) -> None:
        """Have every worker forget what it holds in memory, before anything that is asked from now on."""
        self._answers.pop(self._ask(Clear))

    def answer(self, lookup_id: int, wait_s: float = 0.0) -> Answer | None:
        """What *every* worker holds, or None while one has not answered. Waits ``wait_s`` at most."""
        deadline = time.monotonic() + wait_s
        while True:
            answers = self._answers.get(lookup_id)
            if answers is None:
                return Answer(0)
            if len(answers) == len(self._sockets):
                del self._answers[lookup_id]
                self._so_far.pop(lookup_id, None)
                replies = [answers[rank] for rank in range(len(self._sockets))]
                ranks = tuple(reply.weights for reply in replies)
                return Answer(min(r.tokens for r in replies), min(r.reach for r in replies), ranks)
            left = deadline - time.monotonic()
            if not self._receive(max(0.0, left)) and left <= 0:
                return None

    def so_far(self, lookup_id: int) -> int:
        """What every worker is known to hold of a lookup that is not answered yet."""
        held = self._so_far.get(lookup_id, {})
        return min(held.values()) if len(held) == len(self._sockets) else 0

    def settle(self, lookup_id: int) -> None:
        """Have the workers answer now, with what they hold."""
        self._send(Settle(lookup_id))

    def release(self, lookup_id: int) -> None:
        """Let the workers go of what they hold."""
        self._answers.pop(lookup_id, None)
        self._so_far.pop(lookup_id, None)
        self._send(Release(lookup_id))

    def close(self) -> None:
        if self._home.left:
            return
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()

    def _ask(self, build: Callable[[int], _Request]) -> int:
        self._next_id += 1
        self._answers[self._next_id] = {}
        self._send(build(self._next_id))
        return self._next_id

    def _send(self, request: _Request) -> None:
        self._home.check()
        body = msgspec.msgpack.encode(request)
        for socket in self._sockets:
            try:
                socket.send(body, zmq.DONTWAIT)
            except zmq.Again:
                # The worker has not read for a long time; a request without an answer is a miss.
                metrics.LOOKUP_ERRORS.inc()

    def _receive(self, wait_s: float) -> bool:
        self._home.check()
        ready = self._poller.poll(int(wait_s * 1000))
        for socket, _ in ready:
            reply = msgspec.msgpack.decode(socket.recv(), type=Reply)
            if reply.lookup_id in self._answers:
                rank = self._sockets.index(socket)
                self._so_far.setdefault(reply.lookup_id, {})[rank] = reply.tokens
                if not reply.reading:
                    self._answers[reply.lookup_id][rank] = reply
        return bool(ready)
