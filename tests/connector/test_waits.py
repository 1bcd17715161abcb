"""Nothing that the model or the scheduler waits for asks a tier: engine, lookup server and scheduler half over them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from redis_places import VALKEY, needs_valkey
from scripted import WAIT_S, Gate, ScriptedBackend

import lmcache
from lmcache.connector.lookup.client import LookupClient
from lmcache.connector.lookup.server import LookupServer
from lmcache.connector.scheduler.half import SchedulerHalf
from lmcache.engine.engine import CacheEngine, pack_tokens
from lmcache.engine.layout import PagedCache
from lmcache.storage.manager import StorageManager
from lmcache.testing.redis import RedisServer

CHUNK, BLOCK = 32, 16
pytestmark = pytest.mark.serial
TOKENS = list(range(100))
OPERATIONS = ("sizes", "contains", "get", "put", "remove", "clear")


class World:
    """An engine over given tiers, its lookup server, and a client."""

    def __init__(self, folder: Path, *tiers: ScriptedBackend, **options: Any) -> None:
        values = {"memory.capacity": "4MiB", "chunk_tokens": CHUNK, "close_timeout_s": 1, **options}
        config = lmcache.load_config(overrides=values)
        self.layers = [torch.randn(16, 2, BLOCK, 8)]
        cache = PagedCache.from_layers(self.layers)
        self.engine = CacheEngine.open(config, "m", cache) if not tiers else self._over(config, cache, tiers)
        self.server = LookupServer(self.engine, f"ipc://{folder}/s")
        self.client = LookupClient([f"ipc://{folder}/s"])
        self.scheduler = SchedulerHalf(
            config, self.client, chunk_tokens=CHUNK, block_tokens=(BLOCK,), whole_request=False
        )

    @staticmethod
    def _over(config: Any, cache: PagedCache, tiers: tuple[ScriptedBackend, ...]) -> CacheEngine:
        with CacheEngine.open(config, "m", cache) as probe:
            format = probe.format
        return CacheEngine(config, format, cache, StorageManager(config, tiers=tiers))

    def store(self, tokens: list[int] = TOKENS, **options: Any) -> int:
        return self.engine.store(tokens, [list(range(1, 1 + len(tokens) // BLOCK))], **options)

    def ask(self, tokens: list[int] = TOKENS) -> int:
        return self.client.acquire(pack_tokens(tokens), {}, ())

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.engine.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    opened: list[tuple[World, tuple[ScriptedBackend, ...]]] = []

    def open_world(*tiers: ScriptedBackend, **options: Any) -> World:
        opened.append((World(tmp_path, *tiers, **options), tiers))
        return opened[-1][0]

    yield open_world
    for each, tiers in opened:
        for tier in tiers:
            for fault in tier.before.values():
                if isinstance(fault, Gate):
                    fault.open()
            tier.before.clear()
        each.close()


def hang(tier: ScriptedBackend, *operations: str) -> None:
    for operation in operations or OPERATIONS:
        tier.before[operation] = Gate()


def own_thread(tier: ScriptedBackend) -> list[str]:
    """Calls that came from the thread that tests run on."""
    found: list[str] = []
    enter, me = tier._enter, threading.get_ident()

    def noting(operation: str) -> None:
        if threading.get_ident() == me:
            found.append(operation)
        enter(operation)

    tier._enter = noting  # type: ignore[method-assign]
    return found


def test_a_store_asks_no_tier(world: Callable[..., World]) -> None:
    tier = ScriptedBackend()
    here = world(tier)
    calls = own_thread(tier)
    hang(tier)
    assert here.store() == 96
    assert here.store(list(range(200, 300))) == 96
    assert calls == []
    assert not {"sizes", "contains"} & set(tier.calls), "nor is one asked beside it, which would be waited for"


def test_a_damaged_chunk_is_removed_from_tiers_in_the_background(world: Callable[..., World]) -> None:
    tier = ScriptedBackend()
    here = world(tier)
    here.store()
    assert here.engine.storage.flush(WAIT_S)
    hang(tier)
    began = time.monotonic()
    here.engine._remove(here.engine.database.prompt(pack_tokens(TOKENS)).chunks[0])
    assert time.monotonic() - began < 0.9, "a question may take a second"
    lookup = here.ask()
    here.client.settle(lookup)
    assert here.client.answer(lookup, WAIT_S)[:2] == (0, 0)


def test_a_tail_comes_back_from_a_lower_tier(world: Callable[..., World]) -> None:
    tier = ScriptedBackend()
    here = world(tier)
    here.store(list(range(120)))
    assert here.engine.storage.flush(WAIT_S)
    here.engine.storage.clear(tier="memory")
    with here.engine.lookup(list(range(130))) as lookup:
        assert lookup.wait(WAIT_S)
        assert lookup.tokens == 112
        assert [(span.start, span.stop) for span in lookup.spans] == [(0, 32), (32, 64), (64, 96), (96, 112)]
        before = here.layers[0].clone()
        assert here.engine.retrieve(lookup, [[8, 9, 10, 11, 12, 13, 14]]) == 112
        assert torch.equal(here.layers[0][8:15], before[1:8])


def test_lookups_of_what_is_in_memory_pass_those_that_wait_for_a_tier(world: Callable[..., World]) -> None:
    tier = ScriptedBackend()
    here = world(tier)
    here.store()
    assert here.engine.storage.flush(WAIT_S)
    hang(tier)
    slow = [here.ask([n, *TOKENS]) for n in range(1000, 1040)]
    began = time.monotonic()
    assert here.client.answer(here.ask(), WAIT_S)[:2] == (96, 0)
    assert time.monotonic() - began < 0.9, "a question may take a second"
    assert all(here.client.answer(lookup) is None for lookup in slow)
    for lookup in slow:
        here.client.settle(lookup)
    answers = [here.client.answer(lookup, WAIT_S) for lookup in slow]
    assert [answer and answer.tokens for answer in answers] == [0] * len(slow)


def test_a_lookup_that_is_settled_answers_with_what_has_come(world: Callable[..., World]) -> None:
    tier = ScriptedBackend()
    here = world(tier, **{"read_batch": 1, "read_threads": 1})
    here.store()
    assert here.engine.storage.flush(WAIT_S)
    here.engine.storage.clear(tier="memory")
    third = Gate()
    tier.before["get"] = lambda: third() if tier.calls.count("get") == 3 else None
    lookup = here.ask()
    for _ in range(3):
        tier.await_call("get")
    here.client.settle(lookup)
    assert here.client.answer(lookup, WAIT_S)[:2] == (64, 0)
    held = here.server.take(lookup)
    assert held is not None
    held.close()
    again = here.ask()
    while not here.client.so_far(again):
        assert here.client.answer(again) is None
        here.client._receive(0.01)
    assert here.client.so_far(again) == 64, "what is held while the rest is read"
    third.open()
    assert here.client.answer(again, WAIT_S)[:2] == (96, 0)


def test_a_reset_returns_at_once_while_a_tier_hangs(world: Callable[..., World]) -> None:
    tier = ScriptedBackend()
    here = world(tier, reset="tiers")
    here.store()
    assert here.engine.storage.flush(WAIT_S)
    hang(tier, "clear")
    began = time.monotonic()
    assert here.scheduler.reset_cache() is True
    assert time.monotonic() - began < 2, "it took two deadlines of a clear"
    assert here.client.answer(here.ask(), WAIT_S)[:2] == (0, 0)


def a_request(count: int, name: str) -> Any:
    tokens = [hash((name, n)) % 1000 for n in range(count)]
    return SimpleNamespace(
        request_id=name,
        all_token_ids=tokens,
        prompt_token_ids=tokens,
        num_tokens=count,
        num_prompt_tokens=count,
        prompt_embeds=None,
        resumable=False,
        lora_request=None,
        cache_salt=None,
        kv_transfer_params=None,
        mm_features=[],
        skip_reading_prefix_cache=False,
        block_hashes=[],
    )


@needs_valkey
def test_requests_over_a_frozen_server_are_computed_in_their_own_time(world: Callable[..., World]) -> None:
    assert VALKEY is not None
    with RedisServer(VALKEY) as server:
        url = f"valkey://127.0.0.1:{server.port}"
        here = world(tiers=[{"type": "remote", "url": url}], state="/nonexistent", memory={"capacity": "4MiB"})
        here.store()
        assert here.engine.storage.flush(WAIT_S)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert here.store(list(range(300, 400))) == 96
            waiting = [a_request(500, str(n)) for n in range(6)]
            for each in waiting:
                here.scheduler.on_new_request(each)
            while waiting:
                waiting = [r for r in waiting if here.scheduler.get_num_new_matched_tokens(r, 0)[0] is None]
            # 500 tokens at the rate that is taken until one is known: 0.25 s; and the moment to answer.
            assert time.monotonic() - began < 1.5, "a question to the tier takes a second, one lookup ten"
            here.scheduler.reset_cache()
            assert time.monotonic() - began < 3
        finally:
            os.kill(server.pid, signal.SIGCONT)
