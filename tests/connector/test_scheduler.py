"""The scheduler half alone, with requests as vLLM shows them: what it asks, promises, stores and survives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lmcache
from lmcache.connector.identity.adapters import Adapter, Stamps
from lmcache.connector.lookup.client import Answer
from lmcache.connector.passages import Passages
from lmcache.connector.scheduler.half import SchedulerHalf
from lmcache.keys import PlaceholderSpan, tenant_of

CHUNK = 32
BLOCK = 16


class Client:
    """Answers like workers would: ``held`` tokens and passages up to ``reach``, or None for not yet."""

    def __init__(self) -> None:
        self.held: int | None = 0
        self.reach = 0
        self.passages: list[Passages | None] = []
        self.adapters: list[Adapter | None] = []
        self.asked: list[tuple[bytes, dict[str, str], Sequence[PlaceholderSpan]]] = []
        self.released: list[int] = []
        self.resets = 0
        self.ranks: tuple[str, ...] = ()
        self.named: list[tuple[str, ...]] = []
        self.settled: list[int] = []
        self.partly = 0

    def acquire(
        self,
        tokens: bytes,
        tags: dict[str, str],
        placeholders: Sequence[PlaceholderSpan],
        passages: Passages | None = None,
        ranks: tuple[str, ...] = (),
        adapter: Adapter | None = None,
    ) -> int:
        self.adapters.append(adapter)
        self.passages.append(passages)
        self.named.append(ranks)
        self.asked.append((tokens, tags, placeholders))
        return len(self.asked)

    def answer(self, lookup_id: int, wait_s: float = 0.0) -> Answer | None:
        return None if self.held is None else Answer(self.held, self.reach, self.ranks)

    def so_far(self, lookup_id: int) -> int:
        return self.partly

    def settle(self, lookup_id: int) -> None:
        self.settled.append(lookup_id)

    def release(self, lookup_id: int) -> None:
        self.released.append(lookup_id)

    def reset(self) -> None:
        self.resets += 1


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
        "block_hashes": [bytes([i]) * 32 for i in range(count // BLOCK)],
        **fields,
    }
    return SimpleNamespace(**values)


IMAGE = SimpleNamespace(modality="image", identifier="ab" * 32, mm_position=SimpleNamespace(offset=3, length=4))


@pytest.fixture
def stamps() -> Iterator[Stamps]:
    config = SimpleNamespace(enable_tower_connector_lora=False)
    made = Stamps(config)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def adapted(tmp_path: Path) -> Any:
    """A request with an adapter, whose files lie in ``tmp_path``."""
    (tmp_path / "adapter_config.json").write_text("{}")
    lora = {"lora_name": "l", "lora_int_id": 3, "lora_path": str(tmp_path), "is_3d_lora_weight": False}
    return request(lora_request=SimpleNamespace(**lora, load_inplace=False))


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


def half(
    client: Client,
    *,
    whole_request: bool = False,
    roles: dict[str, bool] | None = None,
    multimodal: bool = True,
    adapters: Stamps | None = None,
    **options: Any,
) -> SchedulerHalf:
    config = lmcache.load_config(overrides=options)
    return SchedulerHalf(
        config,
        client,  # type: ignore[arg-type]
        chunk_tokens=CHUNK,
        block_tokens=(BLOCK,),
        whole_request=whole_request,
        **(roles or {}),
        multimodal=multimodal,
        adapters=adapters,
    )


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


@pytest.mark.parametrize("stores", [True, False])
def test_without_the_right_to_load_nothing_is_asked_for_or_promised(client: Client, stores: bool) -> None:
    client.held = 64
    scheduler = half(client, roles={"loads": False, "stores": stores})
    scheduler.on_new_request(request())
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)
    assert client.asked == []
    assert len(scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).stores) == stores


def test_without_the_right_to_store_nothing_is_stored_or_learned(client: Client) -> None:
    client.held = 64
    scheduler = half(client, roles={"stores": False}, blend={})
    scheduler.on_new_request(request())
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (64, False)
    scheduler.update_state_after_alloc(request(), ([0, 5, 6, 7, 8, 9, 10],), 64)
    meta = scheduler.build_connector_meta(step({"r": 36}, new={"r": 64}))
    assert (len(meta.loads), meta.stores, meta.learns) == (1, [], [])


def test_a_broken_socket_leaves_the_request_to_vllm(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> int:
        raise OSError("no more sockets")

    monkeypatch.setattr(client, "acquire", broken)
    scheduler = half(client)
    scheduler.on_new_request(request())
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)


def test_everything_that_changes_kv_is_asked_for_in_its_own_field(client: Client) -> None:
    live = request(
        cache_salt="s",
        kv_transfer_params={"lmcache.tags": {"tenant": "t"}},
        mm_features=[IMAGE],
    )
    half(client).on_new_request(live)
    ((_, tags, placeholders),) = client.asked
    assert tags == {"cache_salt": "s", "tag.tenant": "t"}
    assert tenant_of(tags) == "t"
    assert placeholders == (PlaceholderSpan(3, 7, b"image:" + b"ab" * 32),)


def test_after_a_failed_load_the_request_is_computed(client: Client) -> None:
    client.held = 64
    scheduler = half(client, whole_request=True)
    scheduler.on_new_request(request())
    scheduler.loads_failed(["r", "unknown"])
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)


def test_an_answer_that_was_read_late_is_not_believed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    client.held = 64
    scheduler = half(client, lease_timeout_s=120)
    scheduler.on_new_request(request())
    now[0] += 300  # far back in the queue: the lease ran out long ago
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (64, False)
    assert len(client.asked) == 2
    assert client.released == [1]
    client.held = 0
    other = request(request_id="s")
    scheduler.on_new_request(other)
    now[0] += 5  # an old miss: another request may have stored it meanwhile
    client.held = 64
    monkeypatch.setattr(client, "answer", lambda i, wait_s=0.0: Answer(0 if i == 3 else 64))
    assert scheduler.get_num_new_matched_tokens(other, 0) == (64, False)


def test_a_slow_miss_is_asked_for_once_more_and_not_for_ever(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    scheduler = half(client)
    scheduler.on_new_request(request())
    now[0] += 5
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)
    assert len(client.asked) == 2


def test_a_reset_drops_what_was_promised_before_it(client: Client) -> None:
    client.held = 64
    scheduler = half(client)
    scheduler.get_num_new_matched_tokens(request(), 0)
    scheduler.build_connector_meta(step({"r": 100}, new={"r": 0}))
    assert scheduler.reset_cache() is True
    assert client.resets == 1
    assert client.released == [1]
    client.held = 0
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (0, False)
    assert len(scheduler.build_connector_meta(step({"r": 100}, cached={"r": 0})).stores) == 1


def test_a_request_that_runs_through_a_reset_stores_nothing_that_it_computed_before(client: Client) -> None:
    scheduler = half(client)
    live = request(num_tokens=160, all_token_ids=list(range(160)))
    scheduler.on_new_request(live)
    assert len(scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).stores) == 1
    scheduler.reset_cache()
    # Its first blocks are those of before, and a chunk of it stands on all of them.
    assert scheduler.build_connector_meta(step({"r": 1}, cached={"r": 128})).stores == []
    # Preempted and computed anew it is as good as any other.
    assert len(scheduler.build_connector_meta(step({"r": 100}, cached={"r": 0})).stores) == 1


def test_a_prefix_that_vllm_kept_over_a_change_is_not_stored_again(client: Client) -> None:
    scheduler = half(client)
    scheduler.on_new_request(request())
    (store,) = scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).stores
    assert store.oldest == 1
    scheduler.request_finished(request())
    scheduler.on_new_request(request(request_id="again"))
    (store,) = scheduler.build_connector_meta(step({"again": 36}, new={"again": 64})).stores
    assert store.oldest == 1  # what it stands on was begun then: the worker compares that with its weights' age


def test_workers_are_asked_once_more_when_they_name_other_weights(client: Client) -> None:
    client.held, client.ranks = 64, ("a#1", "b#1")
    scheduler = half(client)
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (None, False)
    assert scheduler.get_num_new_matched_tokens(request(), 0) == (64, False)
    assert client.named == [(), ("a#1", "b#1")]
    client.ranks = ("c#2", "b#2")
    other = request(request_id="s")
    assert scheduler.get_num_new_matched_tokens(other, 0) == (None, False)
    assert scheduler.get_num_new_matched_tokens(other, 0) == (64, False)
    assert client.named[-1] == ("c#2", "b#2")


def with_hold(client: Client, steps: float) -> SchedulerHalf:
    config = lmcache.load_config()
    scheduler = SchedulerHalf(
        config,
        client,
        chunk_tokens=CHUNK,
        block_tokens=(BLOCK,),
        whole_request=False,
        hold_steps=steps,  # type: ignore[arg-type]
    )
    client.held = 64
    scheduler.get_num_new_matched_tokens(request(), 0)
    scheduler.update_state_after_alloc(request(), ([5, 6, 7],), 64)
    scheduler.on_new_request(request(request_id="sharer"))
    return scheduler


def test_with_several_workers_nothing_on_top_of_a_load_is_stored_until_it_is_known_to_be_good(client: Client) -> None:
    scheduler = with_hold(client, 3)
    both = {"r": 100, "sharer": 100}
    assert scheduler.build_connector_meta(step(both, new={"r": 64, "sharer": 64})).stores == []
    assert scheduler.build_connector_meta(step(both, cached={"r": 100, "sharer": 100})).stores == []
    assert scheduler.build_connector_meta(step(both, cached={"r": 100, "sharer": 100})).stores == []
    stores = scheduler.build_connector_meta(step(both, cached={"r": 100, "sharer": 100})).stores
    assert {s.request_id for s in stores} == {"r", "sharer"}


def test_with_several_workers_a_failed_load_is_never_stored_on(client: Client) -> None:
    scheduler = with_hold(client, 3)
    both = {"r": 100, "sharer": 100}
    scheduler.build_connector_meta(step(both, new={"r": 64, "sharer": 64}))
    scheduler.loads_failed((), (5,))
    for _ in range(5):
        assert scheduler.build_connector_meta(step(both, cached={"r": 100, "sharer": 100})).stores == []


def test_a_load_without_blocks_is_an_error_and_never_skipped(client: Client) -> None:
    client.held = 64
    scheduler = half(client)
    scheduler.get_num_new_matched_tokens(request(), 0)
    scheduler.update_state_after_alloc(request(), None, 64)
    output = step({"r": 36}, new={"r": 64})
    output.kv_connector_block_state = None
    with pytest.raises(RuntimeError, match="names no blocks"):
        scheduler.build_connector_meta(output)


@pytest.mark.parametrize("identifier", ["renderer0-mm-1-image-0", "my-picture", "AB" * 32])
def test_items_that_no_content_hash_names_are_not_cached(client: Client, identifier: str) -> None:
    item = SimpleNamespace(modality="image", identifier=identifier, mm_position=SimpleNamespace(offset=3, length=4))
    scheduler = half(client)
    scheduler.on_new_request(request(mm_features=[item]))
    assert client.asked == []
    assert scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).stores == []


def test_a_long_queue_does_not_ask_all_at_once(client: Client) -> None:
    scheduler = half(client)
    for n in range(100):
        scheduler.on_new_request(request(request_id=str(n)))
    assert len(client.asked) == 16


def test_workers_that_never_answer_are_left_alone(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    client.held = None
    scheduler = half(client)
    for n in range(3):
        late = request(request_id=str(n))
        assert scheduler.get_num_new_matched_tokens(late, 0) == (None, False)
        now[0] += 60
        assert scheduler.get_num_new_matched_tokens(late, 0) == (0, False)
    asked = len(client.asked)
    assert scheduler.get_num_new_matched_tokens(request(request_id="next"), 0) == (0, False)
    assert len(client.asked) == asked
    now[0] += 60
    client.held = 64
    assert scheduler.get_num_new_matched_tokens(request(request_id="later"), 0) == (64, False)


def blending(client: Client, **options: Any) -> SchedulerHalf:
    scheduler = half(client, blend=options)
    scheduler.bind_block_pool(BLOCK)
    return scheduler


def test_a_blended_request_shares_no_block_behind_its_exact_tokens(client: Client) -> None:
    client.held, client.reach = 32, 90
    scheduler, live = blending(client), request()
    before = list(live.block_hashes)
    assert scheduler.get_num_new_matched_tokens(live, 0) == (90, False)
    assert live.block_hashes[:2] == before[:2]
    assert not set(live.block_hashes[2:]) & set(before)
    assert len({*live.block_hashes}) == len(before)
    once = list(live.block_hashes)
    assert scheduler.get_num_new_matched_tokens(live, 32) == (58, False)
    assert live.block_hashes == once
    scheduler.update_state_after_alloc(live, ([1, 2, 3, 4, 5, 6, 7],), 58)
    meta = scheduler.build_connector_meta(step({"r": 10}, new={"r": 90}))
    (load,) = meta.loads
    assert (load.start, load.stop, load.exact, load.blended) == (32, 90, 32, True)
    # Neither this step nor a later one stores or teaches what lies on top of it.
    for computed in range(100, 200):
        live.all_token_ids.append(computed)
        live.num_tokens = computed + 1
        later = scheduler.build_connector_meta(step({"r": 1}, cached={"r": computed}))
        assert (meta.stores, meta.learns, later.stores, later.learns) == ([], [], [], [])


@pytest.mark.parametrize(("local", "reach"), [(96, 90), (0, 0), (0, 32)])
def test_a_request_that_needs_no_passage_is_exact(client: Client, local: int, reach: int) -> None:
    client.held, client.reach = 32, reach
    scheduler, live = blending(client), request()
    before = list(live.block_hashes)
    count, _ = scheduler.get_num_new_matched_tokens(live, local)
    assert count == max(0, 32 - local)
    assert live.block_hashes == before
    scheduler.update_state_after_alloc(live, ([0, 5, 6, 7, 8, 9, 10],), count)
    if not count:  # vLLM has these blocks from a request before
        scheduler.build_connector_meta(step({"earlier": 112}, new={"earlier": 0}))
    meta = scheduler.build_connector_meta(step({"r": 4 if local else 68}, new={"r": local or 32}))
    assert [load.blended for load in meta.loads] == [False] * bool(count)
    assert len(meta.stores) == len(meta.learns) == 1


def test_where_hashes_are_of_unknown_width_none_is_shared(client: Client) -> None:
    client.held, client.reach = 64, 90
    scheduler, live = half(client, blend={}), request()
    before = set(live.block_hashes)
    scheduler.get_num_new_matched_tokens(live, 64)
    assert not before & set(live.block_hashes)


@pytest.mark.parametrize(
    ("options", "params", "passages"),
    [
        ({}, None, Passages()),
        ({}, {"lmcache.blend": False}, None),
        ({"find": "request"}, None, None),
        ({"find": "request"}, {"lmcache.blend": True}, Passages()),
        ({"find": "request"}, {"lmcache.blend": {"spans": [[3, 40], [40, 90]]}}, Passages(spans=((3, 40), (40, 90)))),
        ({"find": "separator", "separator": [5, 6]}, None, Passages(separator=(5, 6))),
        ({"find": "separator", "separator": [5, 6]}, {"lmcache.blend": True}, Passages()),
        ({}, {"lmcache.blend": {"separator": [7]}}, Passages(separator=(7,))),
    ],
)
def test_passages_are_found_as_configured_or_as_the_request_says(
    client: Client, options: dict[str, Any], params: dict[str, Any] | None, passages: Passages | None
) -> None:
    scheduler = blending(client, **options)
    scheduler.on_new_request(request(kv_transfer_params=params))
    assert client.passages == [passages]
    learns = scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).learns
    assert [(learn.passages, learn.start, len(learn.tokens) // 4) for learn in learns] == (
        [(passages, 0, 100)] if passages else []
    )


@pytest.mark.parametrize(
    "wanted",
    [
        "yes",
        1,
        {},
        {"spans": []},
        {"spans": [[1, 2, 3]]},
        {"spans": [["1", 2]]},
        {"separator": [-1]},
        {"span": [[1, 2]]},
    ],
)
def test_a_request_that_names_its_passages_wrongly_goes_on_without_the_cache(client: Client, wanted: Any) -> None:
    client.held = 64
    scheduler = blending(client)
    live = request(kv_transfer_params={"lmcache.blend": wanted})
    assert scheduler.get_num_new_matched_tokens(live, 0) == (0, False)
    meta = scheduler.build_connector_meta(step({"r": 100}, new={"r": 0}))
    assert (meta.stores, meta.learns, client.asked) == ([], [], [])


@pytest.mark.parametrize("kind", ["adapter", "image"])
def test_adapters_and_images_are_reused_exactly_only(client: Client, kind: str, adapted: Any, stamps: Any) -> None:
    scheduler = blending(client)
    scheduler._requests._adapters = stamps
    live = request(mm_features=[IMAGE]) if kind == "image" else adapted
    if kind == "adapter":
        stamped(scheduler, live)
    assert scheduler.get_num_new_matched_tokens(live, 0) == (0, False)
    assert client.passages == [None]
    meta = scheduler.build_connector_meta(step({"r": 100}, new={"r": 0}))
    assert (len(meta.stores), meta.learns) == (1, [])


def test_a_prompt_in_pieces_teaches_each_passage_once(client: Client) -> None:
    scheduler = blending(client)
    scheduler.on_new_request(request())
    learns = []
    for computed, scheduled in [(0, 40), (40, 20), (60, 40)]:
        where = {"new": {"r": 0}} if computed == 0 else {"cached": {"r": computed}}
        learns += scheduler.build_connector_meta(step({"r": scheduled}, **where)).learns
    assert [(learn.start, len(learn.tokens) // 4) for learn in learns] == [(0, 40), (40, 60), (60, 100)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def measured(client: Client, clock: list[float], tokens_per_s: float, **options: Any) -> SchedulerHalf:
    """A scheduler that has seen a step compute prompts at that rate."""
    scheduler = half(client, **options)
    warm = request(400, request_id="warm")
    client.held = 0
    scheduler.on_new_request(warm)
    scheduler.build_connector_meta(step({"warm": 400}, new={"warm": 0}))
    clock[0] += 400 / tokens_per_s
    scheduler.step_ended()
    scheduler.request_finished(warm)
    client.held = None
    client.asked.clear()
    client.released.clear()
    return scheduler


@pytest.mark.parametrize(("patience", "limit_s"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.02)])
def test_a_request_waits_no_longer_than_its_tokens_take_to_compute(
    client: Client, clock: list[float], patience: float, limit_s: float
) -> None:
    scheduler = measured(client, clock, 1000, patience=patience)
    live = request(1000)
    scheduler.on_new_request(live)
    clock[0] += 5  # in the queue, which is not the cache's fault
    assert scheduler.get_num_new_matched_tokens(live, 0) == (None, False)
    clock[0] += 0.99 * limit_s
    assert scheduler.get_num_new_matched_tokens(live, 0) == (None, False)
    assert client.settled == []
    clock[0] += 0.02 * limit_s
    assert scheduler.get_num_new_matched_tokens(live, 0) == (None, False), "the workers have a moment to answer"
    assert client.settled == [1]
    clock[0] += 0.021
    assert scheduler.get_num_new_matched_tokens(live, 0) == (0, False)
    assert client.released == [1]
    clock[0] += 60
    assert scheduler.get_num_new_matched_tokens(live, 0) == (0, False)
    assert len(client.asked) == 1, "it is not asked for again"


def test_what_has_come_when_patience_ends_is_used(client: Client, clock: list[float]) -> None:
    scheduler = measured(client, clock, 1000)
    live = request(1000)
    scheduler.get_num_new_matched_tokens(live, 0)
    clock[0] += 1.01
    client.settle = lambda lookup_id: setattr(client, "held", 320)  # type: ignore[method-assign]
    assert scheduler.get_num_new_matched_tokens(live, 0) == (320, False)


@pytest.mark.parametrize(("local", "partly"), [(900, 0), (0, 900), (900, 500)])
def test_patience_is_for_tokens_that_are_not_there_yet(
    client: Client, clock: list[float], local: int, partly: int
) -> None:
    scheduler = measured(client, clock, 1000)
    client.partly = partly
    live = request(1000)
    scheduler.get_num_new_matched_tokens(live, local)
    clock[0] += 0.09
    scheduler.get_num_new_matched_tokens(live, local)
    assert client.settled == []
    clock[0] += 0.02
    scheduler.get_num_new_matched_tokens(live, local)
    assert client.settled == [1]


def test_before_a_rate_is_known_nobody_waits_long(client: Client, clock: list[float]) -> None:
    client.held = None
    scheduler = half(client)
    live = request(500)
    scheduler.get_num_new_matched_tokens(live, 0)
    clock[0] += 1.01
    scheduler.get_num_new_matched_tokens(live, 0)
    assert client.settled == [1]


def test_a_read_that_hangs_costs_one_deadline(client: Client, clock: list[float]) -> None:
    """Without patience's help: the miss that a deadline ends in is not asked for once more."""
    client.held = None
    scheduler = half(client, patience=1e6)
    live = request(500)
    scheduler.on_new_request(live)
    assert scheduler.get_num_new_matched_tokens(live, 0) == (None, False)
    clock[0] += 10
    client.held = 0  # the worker's deadline
    assert scheduler.get_num_new_matched_tokens(live, 0) == (0, False)
    clock[0] += 10  # it waits for blocks
    assert scheduler.get_num_new_matched_tokens(live, 0) == (0, False)
    assert len(client.asked) == 1


def test_what_was_found_is_not_stored_again(client: Client) -> None:
    client.held = 64
    scheduler = half(client)
    live = request(100)
    scheduler.get_num_new_matched_tokens(live, 16)
    scheduler.build_connector_meta(step({"earlier": 16}, new={"earlier": 0}))  # what vLLM has itself
    scheduler.update_state_after_alloc(live, ([0, 5, 6, 7],), 48)
    (store,) = scheduler.build_connector_meta(step({"r": 36}, new={"r": 64})).stores
    assert store.start == 64
    used = request(100, request_id="s")
    scheduler.get_num_new_matched_tokens(used, 96)
    scheduler.update_state_after_alloc(used, ([0, 5, 6, 7],), 0)
    (store,) = scheduler.build_connector_meta(step({"s": 4}, new={"s": 96})).stores
    assert store.start == 64


def test_the_pace_is_that_of_steps_that_compute_prompts(clock: list[float]) -> None:
    from lmcache.connector.scheduler.pace import UNKNOWN_RATE, Pace

    pace = Pace()
    assert pace.rate == UNKNOWN_RATE
    pace.begins(8, 0)  # decodes
    clock[0] += 1
    pace.ends()
    assert pace.rate == UNKNOWN_RATE
    pace.begins(1000, 1000)
    clock[0] += 1
    pace.begins(1000, 900)  # launched while the one before runs
    clock[0] += 1
    pace.ends()
    clock[0] += 2
    pace.ends()
    assert pace.rate == pytest.approx((0.8 * 1000 + 1000) / (0.8 * 2 + 2))
    clock[0] += 100  # idle
    pace.begins(0, 0)
    assert pace.rate == pytest.approx(500)
    for _ in range(40):
        pace.begins(1000, 1000)
        clock[0] += 0.1
        pace.ends()
    assert pace.rate == pytest.approx(10_000, rel=0.01)
    untold = Pace()
    untold.begins(1000, 1000)
    clock[0] += 2
    untold.begins(0, 0)
    clock[0] += 50
    untold.begins(1000, 1000)
    clock[0] += 2
    untold.results_came()
    clock[0] += 50
    untold.begins(8, 0)
    assert untold.rate == pytest.approx(500)


def stamped(scheduler: SchedulerHalf, live: Any) -> Any:
    """The request as the scheduler tracks it, once its adapter's files have been read."""
    tracked = scheduler._requests.track(live)
    assert tracked.stamping is not None
    tracked.stamping.result(10)
    return tracked


def uncached(scheduler: SchedulerHalf, live: Any) -> bool:
    promised = scheduler.get_num_new_matched_tokens(live, 0)
    return promised == (0, False) and not scheduler.build_connector_meta(step({"r": 100}, new={"r": 0})).stores


def test_images_whose_embeddings_come_from_elsewhere_are_not_cached(client: Client) -> None:
    client.held = 64
    assert uncached(half(client, multimodal=False), request(mm_features=[IMAGE]))
    assert not uncached(half(client, multimodal=False), request())


def test_an_adapter_is_asked_for_and_stored_by_its_content(client: Client, adapted: Any, stamps: Stamps) -> None:
    client.held = 64
    scheduler = half(client, adapters=stamps)
    stamped(scheduler, adapted)
    assert scheduler.get_num_new_matched_tokens(adapted, 0) == (64, False)
    (adapter,) = client.adapters
    ((_, tags, _),) = client.asked
    assert adapter is not None
    assert (adapter.number, tags["lora"].partition("/")[0]) == (3, adapter.files)
    scheduler.update_state_after_alloc(adapted, ([0, 5, 6, 7, 8, 9, 10],), 64)
    meta = scheduler.build_connector_meta(step({"r": 36}, new={"r": 64}))
    assert meta.adapters == [(f"l\0{adapted.lora_request.lora_path}", 3)]
    assert [load.adapter for load in meta.loads] == [store.adapter for store in meta.stores] == [adapter]
    assert meta.step == 1


def test_a_request_waits_while_its_adapters_files_are_read_and_not_for_ever(
    client: Client, adapted: Any, stamps: Stamps
) -> None:
    client.held = 64
    scheduler = half(client, adapters=stamps, read_timeout_s=1000.0)
    slow: Future[Any] = Future()
    scheduler._requests.track(adapted).stamping = slow
    assert scheduler.get_num_new_matched_tokens(adapted, 0) == (None, False)
    assert scheduler.build_connector_meta(step({"r": 0})).stores == []
    slow.set_result(None)  # a folder that is not there
    assert uncached(scheduler, adapted)

    late = half(client, adapters=stamps, read_timeout_s=0.001)
    tracked = late._requests.track(adapted)
    tracked.stamping, tracked.tracked_at = Future(), tracked.tracked_at - 1
    assert uncached(late, adapted)
    assert client.asked == []


def test_files_that_change_while_a_request_queues_make_it_a_miss(
    client: Client, adapted: Any, stamps: Stamps, tmp_path: Path
) -> None:
    client.held = 64
    scheduler = half(client, adapters=stamps, read_timeout_s=1000.0)
    stamped(scheduler, adapted)
    assert scheduler.get_num_new_matched_tokens(adapted, 0) == (64, False)
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    assert uncached(scheduler, adapted)
    assert client.released == [1]


def test_adapters_that_cannot_be_told_apart_are_not_cached(client: Client, adapted: Any, stamps: Stamps) -> None:
    client.held = 64
    assert uncached(half(client), adapted), "an engine that knows of no adapters"
    stamps.images = False
    adapted.mm_features = [IMAGE]
    assert uncached(half(client, adapters=stamps), adapted), "embeddings are kept by the adapter's name"


def test_an_adapter_that_is_read_with_every_step_is_not_loaded_for_ahead_of_it(
    client: Client, adapted: Any, stamps: Stamps
) -> None:
    client.held = 64
    adapted.lora_request.load_inplace = True
    scheduler = half(client, whole_request=True, adapters=stamps)
    tracked = stamped(scheduler, adapted)
    assert scheduler.get_num_new_matched_tokens(adapted, 0) == (0, False)
    assert tracked.writable
