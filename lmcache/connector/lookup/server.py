"""The worker's side of a lookup: hashes the prompt, has it read, and keeps what was found until it is loaded.

Acquire ─> exact prefix (CacheEngine.lookup, storage threads) ─> passages behind it (own threads) ─> Reply
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from lmcache import metrics
from lmcache.blend.pipeline import FoundPassages
from lmcache.connector.blending import Blending
from lmcache.connector.identity.adapters import Adapter
from lmcache.connector.identity.weights_in_use import WeightsInUse
from lmcache.connector.lookup.loop import RequestLoop
from lmcache.connector.lookup.messages import Acquire, Clear, Release, Reply, Request, Settle
from lmcache.connector.passages import Passages
from lmcache.engine.engine import CacheEngine, Lookup
from lmcache.forks import Home

logger = logging.getLogger(__name__)

_FINDERS = 2  # prompts whose passages are looked for at once
_LEAST_S = 0.05  # what is left for passages where the exact prefix took all the time
_DECODER = msgspec.msgpack.Decoder(Request)


class HeldLookup:
    """What a worker keeps for a lookup until it is loaded or released.

    lookup: the exact prefix. found: the passages behind it. settled: the scheduler waits for no further reads.
    answered: the final reply was sent.
    """

    def __init__(self) -> None:
        self.lookup: Lookup | None = None
        self.found: FoundPassages | None = None
        self.settled = self.answered = False

    def close(self) -> None:
        for each in (self.lookup, self.found):
            if each is not None:
                each.close()


class LookupServer:
    """Answers lookups on one thread, and keeps what they hold. A request that fails is answered as a miss.

    Passages are looked for on threads beside it, for that waits for storage.
    weights: while they are in doubt, lookups wait for ``resume``. admits: whether KV of an adapter may be promised.
    """

    def __init__(
        self,
        engine: CacheEngine,
        address: str,
        blending: Blending | None = None,
        weights: WeightsInUse | None = None,
        admits: Callable[[Adapter], bool] = lambda adapter: True,
    ) -> None:
        self._home = Home("this LookupServer")
        self._engine, self._blending, self._admits = engine, blending, admits
        self._weights = weights or WeightsInUse(None)
        self._waiting: list[tuple[bytes, Acquire]] = []  # of the loop's thread
        self._lookups: dict[int, HeldLookup] = {}
        self._lock = threading.Lock()  # of _lookups, and of the flags of what is in it
        self._finders = ThreadPoolExecutor(_FINDERS, "lmcache-passages")
        self._closing = False
        self._loop = RequestLoop(address, self._received, self._retry_waiting)
        self._loop.start()

    def take(self, lookup_id: int) -> HeldLookup | None:
        """What is held for the lookup, handed over to the caller, who closes it."""
        with self._lock:
            return self._lookups.pop(lookup_id, None)

    def resume(self) -> None:
        """Go on with lookups that wait for the weights to be known."""
        if self._waiting:
            self._loop.wake()

    def drop(self) -> None:
        """Let go of every lookup: what it holds has another name now."""
        with self._lock:
            lookups, self._lookups = list(self._lookups.values()), {}
        for held in lookups:
            held.close()

    def close(self) -> None:
        """Stop answering and let go of every lookup. Idempotent."""
        if self._closing or self._home.left:
            return
        self._closing = True
        self._finders.shutdown(wait=False, cancel_futures=True)
        self._loop.close()
        self.drop()

    def _received(self, client: bytes, body: bytes) -> None:
        try:
            request = _DECODER.decode(body)
        except msgspec.DecodeError:
            metrics.LOOKUP_ERRORS.inc()
            logger.exception("a lookup cannot be read and counts as a miss")
            self._fail(client, body)
        else:
            self._handle(client, request)

    def _retry_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for client, request in waiting:
            self._handle(client, request)

    def _handle(self, client: bytes, request: Request) -> None:
        try:
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
        # The entry of a thread: whatever fails here is one request's miss.
        except Exception:
            metrics.LOOKUP_ERRORS.inc()
            logger.exception("a lookup failed and counts as a miss")
            self._answer(client, Reply(request.lookup_id, -1))

    def _acquire(self, client: bytes, request: Acquire) -> None:
        if self._weights.in_doubt():
            self._waiting.append((client, request))
            return
        names = self._weights.tags(request.ranks)
        if names is None or (request.adapter is not None and not self._admits(request.adapter)):
            self._answer(client, Reply(request.lookup_id, 0))
            return
        held, asked_at = HeldLookup(), time.monotonic()
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
        """The scheduler has stopped waiting: answer with what is held by now."""
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

    def _looked_up(self, client: bytes, request: Acquire, held: HeldLookup, exact: int, seconds: float) -> None:
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
        self, client: bytes, request: Acquire, held: HeldLookup, blending: Blending, exact: int, ends_at: float
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

    def _finish(self, client: bytes, held: HeldLookup, reply: Reply) -> None:
        """Give a lookup its one final reply, unless it has it."""
        with self._lock:
            first, held.answered = not held.answered, True
        if first:
            self._answer(client, reply)

    def _fail(self, client: bytes, body: bytes) -> None:
        try:
            lookup_id = int(msgspec.msgpack.decode(body)["lookup_id"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            return
        self._answer(client, Reply(lookup_id, -1))

    def _answer(self, client: bytes, reply: Reply) -> None:
        self._loop.reply(client, msgspec.msgpack.encode(msgspec.structs.replace(reply, weights=self._weights.token)))
