"""The scheduler half alone, with requests as vLLM shows them: what it asks, promises, stores and survives."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lmcache
from lmcache.connector.scheduler import SchedulerHalf
from lmcache.keys import PlaceholderSpan

CHUNK = 32


class Client:
    """Answers like workers would: ``held`` tokens, or None for not yet."""

    def __init__(self) -> None:
        self.held: int | None = 0
        self.asked: list[tuple[bytes, dict[str, str], Sequence[PlaceholderSpan]]] = []
        self.released: list[int] = []

    def acquire(self, tokens: bytes, tags: dict[str, str], placeholders: Sequence[PlaceholderSpan]) -> int:
        self.asked.append((tokens, tags, placeholders))
        return len(self.asked)

    def answer(self, lookup_id: int, wait_s: float = 0.0) -> int | None:
        return self.held

    def release(self, lookup_id: int) -> None:
        self.released.append(lookup_id)


def request(count: int = 100, **fields: Any) -> Any:
    tokens = list(range(count))
    values: dict[str, Any] = {
        "request_id": "r",
        "all_token_ids": tokens,
        "prompt_token_ids": tokens,
        "num_tokens": count,
        "num_prompt_tokens": count,
        "prompt_embeds": None,
        "resumable": False,
        "lora_request": None,
        "cache_salt": None,
        "kv_transfer_params": None,
        "mm_features": [],
        "skip_reading_prefix_cache": False,
        **fields,
    }
    return SimpleNamespace(**values)


def step(scheduled: dict[str, int], *, new: dict[str, int] | None = None, cached: dict[str, int] | None = None) -> Any:
    """A SchedulerOutput: tokens scheduled, and computed before, by request."""
    cached = cached or {}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=n) for r, n in (new or {}).items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values())),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda r: ([0, 5, 6, 7, 8, 9, 10],)),
    )


@pytest.fixture
def client() -> Client:
    return Client()


def half(client: Client, *, whole_request: bool = False, **options: Any) -> SchedulerHalf:
    config = lmcache.load_config(overrides=options)
    return SchedulerHalf(config, client, chunk_tokens=CHUNK, whole_request=whole_request)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("held", "local", "whole_request", "answer"),
    [
        (64, 0, False, (64, False)),
        (64, 16, False, (48, False)),
        (64, 64, False, (0, False)),
        (64, 80, False, (0, False)),
        (100, 0, False, (99, False)),  # a synchronous load leaves a token to compute
        (100, 0, True, (100, True)),
        (100, 96, True, (4, True)),
        (0, 0, True, (0, False)),
        (-1, 0, False, (0, False)),
        (None, 0, False, (None, False)),
    ],
)
def test_what_is_promised(
    client: Client, held: int | None, local: int, whole_request: bool, answer: tuple[int | None, bool]
) -> None:
    client.held = held
    scheduler = half(client, whole_request=whole_request)
    scheduler.on_new_request(request())
    assert scheduler.get_num_new_matched_tokens(request(), local) == answer
    assert scheduler.get_num_new_matched_tokens(request(), local) == answer
    assert len(client.asked) == 1


def test_an_unanswered_lookup_becomes_a_miss_at_its_deadline(client: Client) -> None:
    client.held = None
    scheduler = half(client, read_timeout_s=1e-3, lookup_timeout_s=1e-3)
    answer: int | None = None
    while answer is None:
        answer, _ = scheduler.get_num_new_matched_tokens(request(), 0)
    assert answer == 0
    assert client.released == [1]


def test_an_unused_lookup_is_released(client: Client) -> None:
    client.held = 64
    scheduler = half(client)
    scheduler.get_num_new_matched_tokens(request(), 96)
    scheduler.update_state_after_alloc(request(), ([1, 2],), 0)
    assert client.released == [1]
    scheduler.get_num_new_matched_tokens(request(), 0)
    scheduler.request_finished(request())
    assert client.released == [1, 2]


@pytest.mark.parametrize("blocks", [([0, 5, 6, 7, 8, 9, 10],), None])
def test_a_load_starts_behind_the_local_hit_and_names_its_blocks(client: Client, blocks: Any) -> None:
    client.held = 64
    scheduler = half(client)
    scheduler.get_num_new_matched_tokens(request(), 16)
    scheduler.update_state_after_alloc(request(), blocks, 48)
    meta = scheduler.build_connector_meta(step({"r": 36}, new={"r": 64}))
    (load,) = meta.loads
    assert (load.start, load.stop, load.block_ids) == (16, 64, ([-1, 5, 6, 7, 8, 9, 10],))
    assert client.released == []
    assert scheduler.build_connector_meta(step({})).loads == []


def test_prefill_in_pieces_stores_each_chunk_once_and_the_tail_at_the_end(client: Client) -> None:
    scheduler = half(client)
    scheduler.on_new_request(request())
    pieces = [(0, 40), (40, 20), (60, 40)]
    stores = []
    for computed, scheduled in pieces:
        where = {"new": {"r": 0}} if computed == 0 else {"cached": {"r": computed}}
        stores += scheduler.build_connector_meta(step({"r": scheduled}, **where)).stores
    assert [(s.start, len(s.tokens) // 4, s.tail) for s in stores] == [(0, 40, False), (32, 100, True)]
    assert np.frombuffer(stores[-1].tokens, "<u4").tolist() == list(range(100))


def test_generated_tokens_are_stored_chunk_by_chunk_and_only_once_computed(client: Client) -> None:
    scheduler = half(client)
    live = request(60)
    scheduler.on_new_request(live)
    scheduler.build_connector_meta(step({"r": 60}, new={"r": 0}))
    stored = []
    for count in range(60, 100):
        live.all_token_ids.append(1000 + count)
        live.num_tokens = count + 1
        # One token is being computed; with drafts vLLM would schedule more than it knows.
        for store in scheduler.build_connector_meta(step({"r": 4}, cached={"r": count})).stores:
            stored.append((count, len(store.tokens) // 4, store.tail))
    assert stored == [(64, 64, False), (96, 96, False)]
    off = half(client, store_generated=False)
    off.on_new_request(live)
    off.build_connector_meta(step({"r": 60}, new={"r": 0}))
    assert off.build_connector_meta(step({"r": 1}, cached={"r": 99})).stores == []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_embeds": object()},
        {"prompt_token_ids": None},
        {"resumable": True},
        {"kv_transfer_params": {"lmcache.tags": 5}},
        {"kv_transfer_params": {"lmcache.tags": {"a": 5}}},
    ],
)
def test_requests_that_tokens_do_not_name_are_left_alone(client: Client, fields: dict[str, Any]) -> None:
    client.held = 64
    scheduler = half(client)
    scheduler.on_new_request(request(**fields))
    assert scheduler.get_num_new_matched_tokens(request(**fields), 0) == (0, False)
    assert scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).stores == []
    assert client.asked == []
    scheduler.request_finished(request(**fields))


def test_a_request_that_may_not_read_is_still_stored(client: Client) -> None:
    scheduler = half(client)
    live = request(skip_reading_prefix_cache=True)
    scheduler.on_new_request(live)
    assert scheduler.get_num_new_matched_tokens(live, 0) == (0, False)
    assert client.asked == []
    assert len(scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).stores) == 1


def test_a_broken_socket_leaves_the_request_to_vllm(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> int:
        raise OSError("no more sockets")

    monkeypatch.setattr(client, "acquire", broken)
    scheduler = half(client)
    scheduler.on_new_request(request())
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)


def test_everything_that_changes_kv_is_asked_for_in_its_own_field(client: Client) -> None:
    image = SimpleNamespace(modality="image", identifier="h" * 64, mm_position=SimpleNamespace(offset=3, length=4))
    live = request(
        lora_request=SimpleNamespace(lora_name="l", lora_path="/p"),
        cache_salt="s",
        kv_transfer_params={"lmcache.tags": {"tenant": "t"}},
        mm_features=[image],
    )
    half(client).on_new_request(live)
    ((_, tags, placeholders),) = client.asked
    assert tags == {"lora.name": "l", "lora.path": "/p", "cache_salt": "s", "tag.tenant": "t"}
    assert placeholders == (PlaceholderSpan(3, 7, b"image:" + b"h" * 64),)


def test_after_a_failed_load_the_request_is_computed(client: Client) -> None:
    client.held = 64
    scheduler = half(client, whole_request=True)
    scheduler.on_new_request(request())
    scheduler.loads_failed(["r", "unknown"])
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)
