"""The scheduler's side of a lookup: asks every worker how much of a prompt it holds, and counts what all hold."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import zmq

from lmcache import metrics
from lmcache.connector.identity.adapters import Adapter
from lmcache.connector.lookup.messages import Acquire, Clear, Release, Reply, Request, Settle
from lmcache.connector.passages import Passages
from lmcache.forks import Home
from lmcache.keys import PlaceholderSpan


class Answer(NamedTuple):
    """The first ``tokens`` of a prompt are held exactly, and up to ``reach`` passages that can be blended.

    ranks: the weights' token of every worker.
    """

    tokens: int
    reach: int = 0
    ranks: tuple[str, ...] = ()


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

    def _ask(self, build: Callable[[int], Request]) -> int:
        self._next_id += 1
        self._answers[self._next_id] = {}
        self._send(build(self._next_id))
        return self._next_id

    def _send(self, request: Request) -> None:
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
