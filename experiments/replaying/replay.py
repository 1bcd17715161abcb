"""Caches of blocks on request traces, without an engine: with a real policy, with one that knows the future, endless.

A request hits its longest cached prefix. Then its blocks are used, the last one first: those that are cached are
touched, others come in, each in the place of a victim. Hit ratio: blocks hit / blocks of all requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from experiments.replaying.traces import BLOCK_TOKENS, Request
from lmcache.keys import ChunkKey
from lmcache.storage.eviction.base import EvictionPolicy, Place
from lmcache.storage.registry import EVICTION_POLICIES

NEVER = 1 << 62


def make(name: str) -> EvictionPolicy:
    return EVICTION_POLICIES.get(name)()


def replay(requests: Iterable[Request], size: int, policy: EvictionPolicy, *, last_first: bool = True) -> float:
    """The hit ratio of a cache of ``size`` blocks."""
    held: set[int] = set()
    hits = total = 0
    for request in requests:
        hits += leading(request, held)
        total += len(request)
        places = range(len(request))
        for index in reversed(places) if last_first else places:
            block = request[index]
            if block in held:
                policy.touch(key_of(block))
                continue
            if len(held) >= size:
                victim = next(policy.victims())
                policy.remove(victim)
                held.discard(block_of(victim))
            parent = key_of(request[index - 1]) if index else None
            start = index * BLOCK_TOKENS
            policy.add(key_of(block), BLOCK_TOKENS, Place(parent, start, start + BLOCK_TOKENS))
            held.add(block)
    return hits / total


def leading(request: Request, held: set[int]) -> int:
    for count, block in enumerate(request):
        if block not in held:
            return count
    return len(request)


def key_of(block: int) -> ChunkKey:
    return ChunkKey(b"", block.to_bytes(8, "little", signed=True))


def block_of(key: ChunkKey) -> int:
    return int.from_bytes(key.digest, "little", signed=True)


def belady(requests: Sequence[Request], size: int) -> float:
    """The hit ratio of a cache that knows the future and evicts the block that is used last from then on."""
    uses: dict[int, int] = {}
    following: list[list[int]] = []  # by request and block: the request that uses it next
    for number in range(len(requests) - 1, -1, -1):
        following.append([uses.get(block, NEVER) for block in requests[number]])
        uses.update(dict.fromkeys(requests[number], number))
    following.reverse()
    held: dict[int, tuple[int, int]] = {}
    latest: list[tuple[int, int, int]] = []
    hits = total = 0
    for request, then in zip(requests, following, strict=True):
        hits += next((n for n, block in enumerate(request) if block not in held), len(request))
        total += len(request)
        for index, (block, use) in enumerate(zip(request, then, strict=True)):
            if use == NEVER:
                held.pop(block, None)
                continue
            # Of blocks that are used at the same time, the one farthest down its prompt goes first.
            held[block] = (-use, -index)
            heapq.heappush(latest, (-use, -index, block))
            while len(held) > size:
                *when, victim = heapq.heappop(latest)
                if held.get(victim) == tuple(when):
                    del held[victim]
    return hits / total


def infinite(requests: Iterable[Request]) -> float:
    """The hit ratio of a cache that never evicts."""
    held: set[int] = set()
    hits = total = 0
    for request in requests:
        hits += leading(request, held)
        total += len(request)
        held.update(request)
    return hits / total
