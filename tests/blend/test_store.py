"""Segments' KV in a real StorageManager: where it comes from, where it goes, and what may be wrong with it."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ByteSize

from lmcache import metrics
from lmcache.blend.chunks import LayerGroup, SegmentFormat, SegmentLayout
from lmcache.blend.reuse import ReusedKV, Segment
from lmcache.blend.segments import ContentIndex, Match
from lmcache.blend.store import KIND_TAG, SegmentStore
from lmcache.blend.stored import PrefixKV, StoredKV
from lmcache.config import load_config
from lmcache.engine.engine import CacheEngine, pack_tokens
from lmcache.engine.layout import PagedCache
from lmcache.errors import ClosedError, ConfigError, CorruptChunkError, KernelArgumentError, LeaseExpiredError
from lmcache.kernels.rotary.tables import RotaryTable, rope_frequencies
from lmcache.keys import ChunkKey, namespace
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.manager import StorageManager

HEADS, DIM, POSITIONS = 2, 16, 512
ORIGINAL = {"original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, object]] = {
    "default": {},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 8.0, **ORIGINAL},
}
Layers = list[tuple[torch.Tensor, torch.Tensor]]
Open = Callable[..., StorageManager]


def rope(name: str = "default", theta: float = 1e4) -> RotaryTable:
    parameters = {"rope_type": name, "rope_theta": theta, **ROPES[name]}
    return RotaryTable.from_frequencies(rope_frequencies(parameters, DIM), POSITIONS)


TABLE, LOCAL = rope(), rope(theta=1e6)


def make_format(**changes: Any) -> SegmentFormat:
    """Three layers, the second of them a local one with a rope of its own."""
    values = {"model": "m", "dtype": torch.float32, "heads": HEADS, "head_dim": DIM, "tables": (TABLE, LOCAL, TABLE)}
    return SegmentFormat(**{**values, **changes})  # type: ignore[arg-type]


def rotate(plain: torch.Tensor, positions: torch.Tensor, table: RotaryTable | None) -> torch.Tensor:
    """Keys ``[T, H, D]`` turned at ``positions``, as a model does: GPT-NeoX halves, attention factor and all."""
    if table is None:
        return plain
    cos, sin = table.cos_sin[positions][:, None].unbind(2)
    low, high = plain.double().chunk(2, -1)
    turned = torch.cat([low * cos - high * sin, low * sin + high * cos], -1) * table.attention_factor
    return turned.to(plain.dtype)


def kv(tokens: list[int], at: int, format: SegmentFormat) -> Layers:
    """What a model without attention makes of tokens at positions at, at + 1, ...: values, and keys before rotation,
    that depend on the token alone."""
    made = []
    for index, table in enumerate(format.tables):
        rows = []
        for token in tokens:
            noise = torch.Generator().manual_seed(token * 1000 + index)
            rows.append(torch.randn(2, format.heads, format.head_dim, generator=noise))
        both = torch.stack(rows).to(format.dtype)
        made.append((rotate(both[:, 0], torch.arange(at, at + len(tokens)), table), both[:, 1]))
    return made


class Prefix:
    def __init__(self, layers: Layers) -> None:
        self.layers = layers

    @property
    def tokens(self) -> int:
        return len(self.layers[0][0])

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[index]


def settle(condition: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_at, what
        threading.Event().wait(0.002)


@pytest.fixture
def open_manager() -> Iterator[Open]:
    """Opens managers, after which nothing may be held."""
    opened: list[StorageManager] = []

    def do(
        *tiers: dict[str, Any],
        capacity: int = 4 << 20,
        backends: Sequence[StorageBackend] | None = None,
        **options: object,
    ) -> StorageManager:
        memory = {"capacity": capacity, "huge_pages": False}
        config = load_config(overrides={"memory": memory, "tiers": tiers, "close_timeout_s": 5, **options})
        opened.append(StorageManager(config, tiers=backends))
        return opened[-1]

    yield do
    for manager in opened:
        leases = manager.stats()["leases"]
        manager.close()
        assert not leases, "a lease leaked"
        settle(lambda m=manager: m.pool.used_bytes == 0, "a buffer leaked")  # type: ignore[misc]


@pytest.fixture
def manager(open_manager: Open) -> StorageManager:
    return open_manager()


def outcome(name: str) -> float:
    return float(metrics.SEGMENT_TOKENS.labels(name)._value.get())


class Counted:
    """How a counter of segments' tokens changes."""

    def __init__(self) -> None:
        names = ("stored", "reused", "missing", "incomplete", "late", "corrupt", "unmovable")
        self.before = {name: outcome(name) for name in names}

    def __call__(self) -> dict[str, int]:
        return {name: int(outcome(name) - was) for name, was in self.before.items() if outcome(name) != was}


def check(found: StoredKV, prompt: list[int], covered: list[tuple[int, int]], format: SegmentFormat) -> None:
    """It covers these tokens, with what the model makes of them in the prompt."""
    want = torch.zeros(len(prompt), dtype=torch.bool)
    for start, stop in covered:
        want[start:stop] = True
    assert torch.equal(found.covered, want)
    tolerance = {"rtol": 4 * torch.finfo(format.dtype).eps, "atol": 4 * torch.finfo(format.dtype).eps}
    for index, (keys, values) in enumerate(kv(prompt, 0, format)):
        got_keys, got_values = found.layer(index)
        assert got_keys.dtype == got_values.dtype == format.dtype
        assert got_keys.shape == got_values.shape == keys.shape
        torch.testing.assert_close(got_keys[want], keys[want], **tolerance)
        assert torch.equal(got_values[want], values[want])
        assert got_keys.isfinite().all()
        assert got_values.isfinite().all()


A, B, C = list(range(100, 120)), list(range(200, 207)), list(range(300, 331))
PROMPT = [1, 2, 3, *B, 4, 4, *A, 5, *C]
SEGMENTS = [Segment(3, 10), Segment(12, 32), Segment(33, 64)]


def store_all(store: SegmentStore, at: int = 40) -> None:
    for number, tokens in enumerate((A, B, C)):
        assert store.put(tokens, at * number, kv(tokens, at * number, store.format))


# ---- what comes back


def test_it_is_what_the_blender_asks_for(manager: StorageManager) -> None:
    with SegmentStore(manager, make_format()).retrieve(PROMPT, []) as found:
        reused: ReusedKV = found
        assert not reused.covered.any()
        assert not reused.exact.any()
        assert not reused.segments
        assert not torch.cat(reused.layer(2)).any()


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 12_000, 4 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_segments_come_back_at_new_positions(
    manager: StorageManager, dtype: torch.dtype, chunk_bytes: int, pipelined: bool
) -> None:
    store = SegmentStore(manager, make_format(dtype=dtype), chunk_bytes=chunk_bytes)
    count = Counted()
    store_all(store)
    with store.retrieve(PROMPT, SEGMENTS, pipelined=pipelined) as found:
        check(found, PROMPT, [(s.start, s.stop) for s in SEGMENTS], store.format)
        assert found.segments == SEGMENTS
        assert not found.exact.any()
    assert count() == {"stored": 58, "reused": 58}


@pytest.mark.parametrize("name", ROPES)
@settings(max_examples=20, deadline=None)
@given(old=st.integers(0, POSITIONS - 20), new=st.integers(0, POSITIONS - 20))
def test_a_moved_key_is_the_key_turned_at_the_new_position(name: str, old: int, new: int) -> None:
    format = make_format(tables=(rope(name), rope(name, 1e6), None))
    config = load_config(overrides={"memory.capacity": 1 << 20, "memory.huge_pages": False})
    manager = StorageManager(config)
    store = SegmentStore(manager, format)
    store.put(A, old, kv(A, old, format))
    prompt = [9] * new + A
    with store.retrieve(prompt, [Segment(new, new + 20)]) as found:
        for index, (keys, values) in enumerate(kv(prompt, 0, format)):
            got_keys, got_values = found.layer(index)
            # Four fp32 cosines and sines, each half a unit off, in a sum of two products.
            torch.testing.assert_close(got_keys[new:], keys[new:], rtol=0, atol=2e-6)
            assert torch.equal(got_values[new:], values[new:])
            if format.tables[index] is None or old == new:
                assert torch.equal(got_keys[new:], keys[new:])
    manager.close()
    assert manager.pool.used_bytes == 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_segments_of_any_prompt_come_back(data: st.DataObject) -> None:
    """Passages in some order, some of them stored, behind a prefix that may end anywhere."""
    format = make_format()
    config = load_config(overrides={"memory.capacity": 1 << 20, "memory.huge_pages": False})
    manager = StorageManager(config)
    store = SegmentStore(manager, format, chunk_bytes=data.draw(st.sampled_from([1, 5000, 1 << 20])))
    sizes = data.draw(st.lists(st.integers(1, 12), max_size=5))
    prompt: list[int] = []
    segments, stored = [], []
    for number, size in enumerate(sizes):
        prompt += [7] * data.draw(st.integers(0, 2))
        tokens = [100 * number + i for i in range(size)]
        segments.append(Segment(len(prompt), len(prompt) + size))
        prompt += tokens
        if data.draw(st.booleans()):
            stored.append(segments[-1])
            at = data.draw(st.integers(0, 400))
            store.put(tokens, at, kv(tokens, at, format))
    first = data.draw(st.integers(0, len(prompt)))
    prefix = Prefix([(k[:first], v[:first]) for k, v in kv(prompt, 0, format)] if first else kv([1], 0, format)[:0])
    prefix = prefix if first else None  # type: ignore[assignment]
    with store.retrieve(prompt, segments, prefix=prefix, pipelined=data.draw(st.booleans())) as found:
        check(found, prompt, [(0, first), *((s.start, s.stop) for s in stored)], format) if prompt else None
        assert found.exact.tolist() == [at < first for at in range(len(prompt))]
        assert found.segments == [Segment(max(s.start, first), s.stop) for s in stored if s.stop > first]
    manager.close()
    assert manager.pool.used_bytes == 0


def test_a_prefix_is_used_exactly_also_where_a_segment_begins_in_it(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    store_all(store)
    prefix: PrefixKV = Prefix([(torch.full((15, HEADS, DIM), 5.0), torch.full((15, HEADS, DIM), 6.0))] * 3)
    with store.retrieve(PROMPT, SEGMENTS, prefix=prefix) as found:
        assert found.exact.tolist() == [True] * 15 + [False] * 49
        assert found.covered.tolist() == [True] * 32 + [False] + [True] * 31
        assert found.segments == [Segment(15, 32), SEGMENTS[2]]
        for index, (want, _) in enumerate(kv(PROMPT, 0, store.format)):
            keys, values = found.layer(index)
            assert (keys[:15] == 5).all()
            assert (values[:15] == 6).all()
            torch.testing.assert_close(keys[15:32], want[15:32])


def test_part_of_a_passage_is_found_by_content(manager: StorageManager) -> None:
    store, index = SegmentStore(manager, make_format()), ContentIndex(8)
    store_all(store)
    for passage in (A, B, C):
        index.add(passage)
    prompt = [1, *C[5:20], 2, *A]
    matches = index.find(prompt)
    assert [(m.start, m.stop, m.offset) for m in matches] == [(1, 16, 5), (17, 37, 0)]
    with store.retrieve(prompt, matches) as found:
        check(found, prompt, [(1, 16), (17, 37)], store.format)
    prefix = Prefix([(k[:4], v[:4]) for k, v in kv(prompt, 0, store.format)])
    with store.retrieve(prompt, matches, prefix=prefix) as found:
        check(found, prompt, [(0, 16), (17, 37)], store.format)
        assert found.segments == [Segment(4, 16), Segment(17, 37)]


def test_a_match_whose_tokens_are_others_is_refused(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    for match in (
        Match(0, 10, pack_tokens(A), 1),
        Match(0, 20, pack_tokens(A[:19]), 0),
        Match(0, 1, pack_tokens(A), -20),
    ):
        with pytest.raises(ValueError, match="not those of the passage"):
            store.retrieve(A, [match])


def test_the_caller_may_write_into_a_layer(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    store_all(store)
    with store.retrieve(PROMPT, SEGMENTS) as found:
        for tensor in found.layer(0):
            tensor.fill_(1e9)
        check(found, PROMPT, [(s.start, s.stop) for s in SEGMENTS], store.format)


def test_layers_may_be_had_by_several_threads_in_any_order(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format(tables=(TABLE, LOCAL) * 8))
    store_all(store)
    with store.retrieve(PROMPT, SEGMENTS) as found:
        want = [found.layer(index) for index in range(16)]
        wrong: list[int] = []

        def work(step: int) -> None:
            for index in list(range(16))[::step]:
                if not all(map(torch.equal, found.layer(index), want[index])):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(step,)) for step in (1, -1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# ---- keys


def test_keys_are_of_the_tokens_and_not_of_where_they_stand(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    keys = store.keys(A)
    assert len(set(keys)) == 3, "a key for each chunk of layers"
    assert keys == store.keys(np.asarray(A)) == store.keys(pack_tokens(A))
    others = [
        store.keys(A[:-1]),
        store.keys([*A[:-1], 0]),
        store.keys(A, tags={"lora": "x"}),
        store.keys(A, tags={"lora": "y"}),
        SegmentStore(manager, make_format(), chunk_bytes=4 << 20).keys(A),
    ]
    changes: list[dict[str, Any]] = [
        {"model": "n"},
        {"dtype": torch.bfloat16},
        {"heads": 1},
        {"tables": (TABLE, TABLE, TABLE)},
        {"tables": (TABLE, None, TABLE)},
        {"tables": (TABLE, LOCAL)},
        {"tables": (rope("llama3"), LOCAL, rope("llama3"))},
        {"extras": (("a", "b"),)},
    ]
    others += [SegmentStore(manager, make_format(**change), chunk_bytes=1).keys(A) for change in changes]
    every = [key for each in [keys, *others] for key in each]
    assert len(set(every)) == len(every)


def test_a_longer_table_of_the_same_rope_keeps_the_keys(manager: StorageManager) -> None:
    longer = RotaryTable.from_frequencies(rope_frequencies({"rope_theta": 1e4}, DIM), 4096)
    formats = [make_format(tables=(table,) * 3) for table in (TABLE, longer)]
    first, second = (SegmentStore(manager, format).keys(A) for format in formats)
    assert first == second


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(0, 9), min_size=1, max_size=70), tag=st.sampled_from(["", "segment", "x"]))
def test_a_segment_never_shares_a_key_with_an_exact_chunk(tokens: list[int], tag: str) -> None:
    config = load_config(overrides={"memory.capacity": 1 << 20, "memory.huge_pages": False, "chunk_tokens": 4})
    pages = [torch.zeros(32, HEADS, 4, 2 * DIM) for _ in range(3)]
    tags = {KIND_TAG: tag} if tag else {}
    with CacheEngine.open(config, "m", PagedCache.from_layers(pages)) as engine:
        prompt = engine.database.prompt(pack_tokens(tokens), tags)
        exact = [span.key for span in prompt.chunks]
        exact += [span.key for index in range(len(exact) + 1) for span in prompt.tails(index)]
        store = SegmentStore(engine.storage, make_format(), chunk_bytes=1)
        segment = store.keys(tokens)
        assert {key.namespace for key in segment}.isdisjoint(key.namespace for key in exact)
        assert {key.digest for key in segment}.isdisjoint(key.digest for key in exact)
        # Not even one of an engine that had the same fingerprint.
        assert segment[0].namespace != namespace(segment[0].fingerprint, {})
    with pytest.raises(ValueError, match="is taken"):
        store.keys(tokens, tags={KIND_TAG: "x"})


# ---- what is refused


def test_tensors_that_do_not_fit_are_refused_and_nothing_is_held(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    good = kv(A, 0, store.format)
    flat = (good[1][0][0], good[1][1])
    for layers, says in (
        (good[:2], "2 layers, the format has 3"),
        ([good[0], flat, good[2]], r"keys of layer 1 are torch.float32 \(2, 16\)"),
        ([*good[:2], (good[2][0], good[2][1].half())], "values of layer 2 are torch.float16"),
    ):
        with pytest.raises(KernelArgumentError, match=says):
            store.put(A, 0, layers)
    for at in (-1, POSITIONS - 19):
        with pytest.raises(KernelArgumentError, match=f"20 tokens stored at {at}: .* 512 positions"):
            store.put(A, at, good)
    with pytest.raises(ValueError, match="without tokens"):
        store.put([], 0, [(t[:0], v[:0]) for t, v in good])
    assert manager.pool.used_bytes == 0


def test_prompts_that_cannot_be_are_refused(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    with pytest.raises(ValueError, match=r"span 1 is \(3, 9\) and the one before ends at 4"):
        store.retrieve(A, [Segment(0, 4), Segment(3, 9)])
    with pytest.raises(ValueError, match="<= 20"):
        store.retrieve(A, [Segment(15, 21)])
    with pytest.raises(KernelArgumentError, match="513 tokens; the ropes' tables have 512 positions"):
        store.retrieve([1] * 513, [])
    with pytest.raises(ValueError, match="a prefix of 7 tokens, the prompt has 2"):
        store.retrieve([1, 2], [], prefix=Prefix(kv(B, 0, store.format)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": torch.int8}, "int8"),
        ({"tables": ()}, "0 layers"),
        ({"heads": 0}, "0 heads"),
        ({"head_dim": 8}, "turns 16 elements from 0; a head has 8"),
        ({"device": torch.device("meta")}, "meta"),
    ],
)
def test_formats_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_format(**changes)


@pytest.mark.parametrize("codec", ["int4", {"type": "fp8"}])
def test_codecs_are_refused(manager: StorageManager, codec: object) -> None:
    with pytest.raises(ConfigError, match="kept raw"):
        SegmentStore(manager, make_format(), codec=codec)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="chunk_bytes"):
        SegmentStore(manager, make_format(), chunk_bytes=0)
    SegmentStore(manager, make_format(), codec={"type": "raw"})


# ---- storing again, and not at all


def test_what_is_held_is_not_stored_again(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    count = Counted()
    assert not store.holds(A)
    assert store.put(A, 3, kv(A, 3, store.format))
    assert store.holds(A)
    used = manager.pool.used_bytes
    assert store.put(A, 50, kv(A, 50, store.format))
    assert manager.pool.used_bytes == used
    assert count() == {"stored": 20}
    assert store.remove(A)
    assert not store.holds(A)
    assert not store.remove(A)


def test_without_room_nothing_is_stored_and_nothing_is_held(open_manager: Open) -> None:
    manager = open_manager(capacity=16 << 10)
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    lease = manager.acquire([], [])
    refused = metrics.STORE_REFUSED_TOKENS._value.get()
    assert not store.put(list(range(60)), 0, kv(list(range(60)), 0, store.format))
    assert manager.pool.used_bytes == 0
    assert metrics.STORE_REFUSED_TOKENS._value.get() == refused + 60
    lease.close()


def test_when_copying_fails_nothing_is_held(manager: StorageManager, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    layers = kv(A, 0, store.format)
    written: list[int] = []

    def third_fails(self: SegmentLayout, chunk: Any, within: int) -> torch.Tensor:
        written.append(within)
        if len(written) == 3:
            raise RuntimeError("a fault")
        return whole(self, chunk, within)

    whole = SegmentLayout.layer
    monkeypatch.setattr(SegmentLayout, "layer", third_fails)
    with pytest.raises(RuntimeError, match="a fault"):
        store.put(A, 0, layers)
    assert manager.pool.used_bytes == 0
    assert not store.holds(A)


# ---- what goes wrong while reading


def test_a_segment_that_was_never_stored_is_a_silent_miss(
    manager: StorageManager, caplog: pytest.LogCaptureFixture
) -> None:
    store = SegmentStore(manager, make_format())
    store.put(A, 3, kv(A, 3, store.format))
    count = Counted()
    with caplog.at_level(logging.WARNING), store.retrieve(PROMPT, SEGMENTS) as found:
        check(found, PROMPT, [(12, 32)], store.format)
        assert found.segments == [SEGMENTS[1]]
    assert count() == {"reused": 20, "missing": 38}
    assert not caplog.records


def test_a_segment_of_which_a_chunk_is_gone_is_not_covered(
    manager: StorageManager, caplog: pytest.LogCaptureFixture
) -> None:
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    store_all(store)
    manager.remove(store.keys(A)[2:])
    manager.remove(store.keys(C)[:1])
    count = Counted()
    with caplog.at_level(logging.WARNING), store.retrieve(PROMPT, SEGMENTS) as found:
        check(found, PROMPT, [(3, 10)], store.format)
    assert count() == {"reused": 7, "incomplete": 20, "missing": 31}
    assert len(caplog.records) == 1
    assert "'incomplete': 20" in caplog.text
    # And is whole again when it is stored again, also from another place.
    store.put(A, 51, kv(A, 51, store.format))
    with store.retrieve(PROMPT, SEGMENTS[1:2]) as found:
        check(found, PROMPT, [(12, 32)], store.format)


@pytest.mark.parametrize("at", [0, 5, 9, 13, 17, 21, 30, 60])
def test_a_damaged_record_is_a_miss_and_removed(
    manager: StorageManager, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it is damaged: magic, version, tokens, layers, stored_at, run; 60 is padding, which says nothing."""
    store = SegmentStore(manager, make_format())
    store.put(A, 3, kv(A, 3, store.format))
    with manager.acquire(store.keys(A), [manager.sizes(store.keys(A))[0]]) as lease:
        lease.buffers[0].view[at] ^= 4
    count = Counted()
    with caplog.at_level(logging.WARNING), store.retrieve(A, [Segment(0, 20)]) as found:
        assert bool(found.covered.any()) == (at == 60)
    if at != 60:
        assert count() == {"corrupt": 20}
        assert not store.holds(A)
        assert "removed segment" in caplog.text


def plant(store: SegmentStore, manager: StorageManager, tokens: list[int], other: list[int]) -> None:
    """Under the keys of ``tokens``, the chunks of ``other``: what a collision of digests would be."""
    store.put(other, 3, kv(other, 3, store.format))
    keys = store.keys(other)
    with manager.acquire(keys, manager.sizes(keys)) as lease:
        for key, found in zip(store.keys(tokens), lease.buffers, strict=True):
            buffer = manager.allocate(found.nbytes)
            assert buffer is not None
            buffer.view[:] = found.view
            manager.put(key, buffer)


def test_a_digest_never_decides_the_tokens_do(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    plant(store, manager, A, [*A[:-1], 999])
    count = Counted()
    with store.retrieve(A, [Segment(0, 20)]) as found:
        assert not found.covered.any()
    assert count() == {"corrupt": 20}


def test_a_chunk_of_another_size_is_a_miss(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    plant(store, manager, A, A[:-1])
    with store.retrieve(A, [Segment(0, 20)]) as found:
        assert not found.covered.any()


def test_chunks_of_two_runs_of_the_model_are_not_mixed(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    store.put(A, 3, kv(A, 3, store.format))
    manager.remove(store.keys(A)[:1])
    # The same tokens behind other text: other values in the last layer; what is left of the first stays where it is.
    other = [(k, v + 1) for k, v in kv(A, 3, store.format)]
    assert store.put(A, 3, other)
    count = Counted()
    with store.retrieve(A, [Segment(0, 20)]) as found:
        assert not found.covered.any()
    assert count() == {"corrupt": 20}
    assert store.put(A, 3, other)
    with store.retrieve(A, [Segment(0, 20)]) as found:
        assert found.covered.all()
        assert torch.equal(found.layer(1)[1], other[1][1])


def test_a_segment_from_beyond_the_table_is_a_miss_that_stays(manager: StorageManager) -> None:
    longer = [RotaryTable.from_frequencies(rope_frequencies({"rope_theta": theta}, DIM), 2048) for theta in (1e4, 1e6)]
    far = SegmentStore(manager, make_format(tables=(longer[0], longer[1], longer[0])))
    far.put(A, 1000, kv(A, 1000, far.format))
    store, count = SegmentStore(manager, make_format()), Counted()
    with store.retrieve(A, [Segment(0, 20)]) as found:
        assert not found.covered.any()
    assert count() == {"unmovable": 20}
    with far.retrieve(A, [Segment(0, 20)]) as found:
        check(found, A, [(0, 20)], far.format)


# ---- lower tiers


def disk(path: Path) -> dict[str, Any]:
    return {"type": "disk", "path": str(path), "capacity": 64 << 20}


def drop_memory(manager: StorageManager) -> None:
    assert manager.flush(20)
    manager.clear(tier="memory")


def test_segments_survive_a_restart_on_disk(open_manager: Open, tmp_path: Path) -> None:
    manager = open_manager(disk(tmp_path))
    store_all(SegmentStore(manager, make_format(), chunk_bytes=6000))
    manager.close()
    again = open_manager(disk(tmp_path))
    store = SegmentStore(again, make_format(), chunk_bytes=6000)
    assert store.holds(A)
    with store.retrieve(PROMPT, SEGMENTS) as found:
        check(found, PROMPT, [(s.start, s.stop) for s in SEGMENTS], store.format)


def test_a_file_that_was_damaged_is_a_miss(open_manager: Open, tmp_path: Path) -> None:
    manager = open_manager(disk(tmp_path))
    store = SegmentStore(manager, make_format())
    store.put(A, 3, kv(A, 3, store.format))
    drop_memory(manager)
    (file,) = tmp_path.rglob("*.kv")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    store.put(B, 3, kv(B, 3, store.format))
    corrupt = metrics.CORRUPT_CHUNKS.labels("disk")._value.get()
    with store.retrieve(PROMPT, SEGMENTS[:2]) as found:
        check(found, PROMPT, [(3, 10)], store.format)
    assert metrics.CORRUPT_CHUNKS.labels("disk")._value.get() == corrupt + 1
    assert not store.holds(A)


def test_a_slow_tier_is_not_waited_for_beyond_the_deadline(
    open_manager: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = open_manager({"type": "latency", "fixed_s": 30, "inner": disk(tmp_path / "far")})
    near = open_manager(disk(tmp_path / "far"))
    there = SegmentStore(near, make_format())
    store_all(there)
    near.close()
    manager.close()
    manager = open_manager(
        {"type": "faults", "hang_rate": 1, "hang_s": 60, "operations": ["get"], "inner": disk(tmp_path / "far")}
    )
    store = SegmentStore(manager, make_format())
    count = Counted()
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING), store.retrieve(PROMPT, SEGMENTS, timeout_s=0.2) as found:
        assert time.monotonic() - begun < 5
        assert not found.covered.any()
        assert not torch.cat(found.layer(0)).any()
    assert count() == {"late": 58}
    assert "'late': 58" in caplog.text


def test_what_is_in_memory_comes_although_the_rest_is_late(open_manager: Open, tmp_path: Path) -> None:
    with_disk = open_manager(disk(tmp_path))
    store_all(SegmentStore(with_disk, make_format()))
    with_disk.close()
    manager = open_manager({"type": "latency", "fixed_s": 60, "inner": disk(tmp_path)}, write_queue=1)
    store = SegmentStore(manager, make_format())
    keys = store.keys(A)
    buffer = manager.allocate(SegmentLayout(store.format, 20, 4 << 20).chunk_bytes(LayerGroup(0, 3)))
    assert buffer is not None
    store_buffers = store._filled(pack_tokens(A), 9, kv(A, 9, store.format))
    assert store_buffers is not None
    buffer.view[:] = store_buffers[0].view
    store_buffers[0].release()
    manager._memory.insert(keys[0], buffer)
    count = Counted()
    with store.retrieve(PROMPT, SEGMENTS, timeout_s=0.2) as found:
        check(found, PROMPT, [(12, 32)], store.format)
    assert count() == {"reused": 20, "late": 38}


def test_a_tier_that_fails_is_a_miss(open_manager: Open, tmp_path: Path) -> None:
    manager = open_manager({"type": "faults", "error_rate": 1, "operations": ["get"], "inner": disk(tmp_path)})
    store = SegmentStore(manager, make_format())
    store_all(store)
    drop_memory(manager)
    with store.retrieve(PROMPT, SEGMENTS) as found:
        assert not found.covered.any()


# ---- layer after layer


class Turnstile(DiskBackend):
    """Reads one chunk for each ``let``, in the order in which they are asked for."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.turns = threading.Semaphore(0)

    def let(self, count: int) -> None:
        for _ in range(count):
            self.turns.release()

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        for count, pair in enumerate(zip(keys, into, strict=True)):
            if not self.turns.acquire(timeout=20) or not super().get([pair[0]], [pair[1]]):
                return count
        return len(keys)


@pytest.fixture
def open_turnstile(open_manager: Open, tmp_path: Path) -> Iterator[Callable[..., tuple[StorageManager, Turnstile]]]:
    """All three segments are on disk, each layer in a chunk of its own, and come one by one."""
    with_disk = open_manager(disk(tmp_path))
    store_all(SegmentStore(with_disk, make_format(), chunk_bytes=1))
    with_disk.close()
    opened = []

    def do(**options: object) -> tuple[StorageManager, Turnstile]:
        gate = Turnstile(DiskConfig(path=tmp_path, capacity=ByteSize(64 << 20)))
        opened.append(gate)
        return open_manager(backends=[gate], read_batch=1, read_threads=1, **options), gate

    yield do
    for gate in opened:
        gate.let(100)


Turnstiles = Callable[..., tuple[StorageManager, Turnstile]]


def test_the_first_layers_are_used_while_the_last_are_read(open_turnstile: Turnstiles) -> None:
    manager, gate = open_turnstile()
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    gate.let(6)
    with store.retrieve(PROMPT, SEGMENTS, pipelined=True) as found:
        assert found.segments == SEGMENTS
        found.layer(0)
        found.layer(1)
        got: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: got.extend(found.layer(2)))
        thread.start()
        gate.let(2)
        assert not got
        gate.let(1)
        thread.join(20)
        assert got
        check(found, PROMPT, [(s.start, s.stop) for s in SEGMENTS], store.format)


def test_a_segment_that_is_missing_costs_no_other_also_layer_by_layer(open_turnstile: Turnstiles) -> None:
    manager, gate = open_turnstile()
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    gate.let(100)
    store.remove(B)
    count = Counted()
    with store.retrieve(PROMPT, SEGMENTS, pipelined=True) as found:
        check(found, PROMPT, [(12, 32), (33, 64)], store.format)
    with store.retrieve(PROMPT, SEGMENTS[:1], pipelined=True) as found:
        assert not found.covered.any()
    assert count() == {"reused": 51, "missing": 14}


def test_a_layer_that_does_not_come_is_an_error_and_what_came_is_not_lost(open_turnstile: Turnstiles) -> None:
    manager, gate = open_turnstile(read_timeout_s=1.0, breaker={"failures": 100})
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    gate.let(7)  # all of the first segment, and two layers of the others
    with store.retrieve(PROMPT, SEGMENTS, pipelined=True, timeout_s=0.9) as found:
        found.layer(1)
        with pytest.raises(LeaseExpiredError, match="layer 2"):
            found.layer(2)
    with store.retrieve(PROMPT, SEGMENTS, timeout_s=0.2) as found:
        check(found, PROMPT, [(3, 10)], store.format)


def test_when_even_the_first_layer_is_late_what_is_whole_is_used(open_turnstile: Turnstiles) -> None:
    manager, gate = open_turnstile()
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    gate.let(3)
    with store.retrieve(PROMPT, SEGMENTS[:1]) as found:
        found.layer(0)
    count = Counted()
    with store.retrieve(PROMPT, SEGMENTS, pipelined=True, timeout_s=0.2) as found:
        check(found, PROMPT, [(3, 10)], store.format)
    assert count() == {"reused": 7, "late": 51}


def test_a_later_layer_of_another_run_is_an_error(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    store_all(store)
    manager.remove(store.keys(A)[:1])
    assert store.put(A, 3, [(k, v + 1) for k, v in kv(A, 3, store.format)])
    with store.retrieve(PROMPT, SEGMENTS, pipelined=True) as found:
        found.layer(0)
        with pytest.raises(CorruptChunkError, match="another run"):
            found.layer(1)
    with store.retrieve(PROMPT, SEGMENTS) as found:
        check(found, PROMPT, [(3, 10), (33, 64)], store.format)


def test_a_damaged_record_is_seen_before_it_is_used_also_layer_by_layer(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format(), chunk_bytes=1)
    store_all(store)
    with manager.acquire(store.keys(A), manager.sizes(store.keys(A))) as lease:
        lease.buffers[0].view[70] ^= 4
    with store.retrieve(PROMPT, SEGMENTS, pipelined=True) as found:
        check(found, PROMPT, [(3, 10), (33, 64)], store.format)
    with manager.acquire(store.keys(B), manager.sizes(store.keys(B))) as lease:
        lease.buffers[2].view[70] ^= 4
    with store.retrieve(PROMPT, SEGMENTS, pipelined=True) as found, pytest.raises(CorruptChunkError, match="tokens"):
        found.layer(2)


# ---- all at once


def test_whatever_happens_at_once_it_is_right_or_not_covered(open_manager: Open, tmp_path: Path) -> None:
    """Threads that store from many places, look, and forget, over a memory that is too small and a disk that fails."""
    broken = {"type": "faults", "error_rate": 0.1, "short_rate": 0, "inner": disk(tmp_path)}
    manager = open_manager(broken, capacity=128 << 10, breaker={"failures": 10**6}, lease_timeout_s=0.05)
    store = SegmentStore(manager, make_format(), chunk_bytes=3000)
    passages = [[1000 * n + i for i in range(5 + 3 * n)] for n in range(12)]
    values = {token: kv([token], 0, store.format) for passage in passages for token in passage}
    errors: list[BaseException] = []
    covered = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(80):
                chosen = dice.sample(passages, 4)
                todo = dice.random()
                if todo < 0.4:
                    at = dice.randrange(100)
                    store.put(chosen[0], at, kv(chosen[0], at, store.format))
                elif todo < 0.5:
                    manager.remove(store.keys(chosen[0])[dice.randrange(2) :])
                else:
                    look(chosen, dice.random() < 0.5)
        except BaseException as error:
            errors.append(error)

    def look(chosen: list[list[int]], pipelined: bool) -> None:
        prompt = [token for passage in chosen for token in passage]
        ends = list(itertools.accumulate(map(len, chosen)))
        segments = [Segment(end - len(passage), end) for end, passage in zip(ends, chosen, strict=True)]
        with store.retrieve(prompt, segments, pipelined=pipelined, timeout_s=1) as found:
            for index in range(3):
                try:
                    keys, got = found.layer(index)
                except (LeaseExpiredError, CorruptChunkError):
                    return
                for at in found.covered.nonzero().flatten().tolist():
                    plain, want = values[prompt[at]][index]
                    assert torch.equal(got[at], want[0])
                    there = rotate(plain, torch.tensor([at]), store.format.tables[index])[0]
                    torch.testing.assert_close(keys[at], there, rtol=0, atol=5e-6)
            covered.append(int(found.covered.sum()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert sum(covered) > 0


# ---- how long it is held


def test_what_is_retrieved_is_not_evicted_under_the_reader(open_manager: Open) -> None:
    manager = open_manager(capacity=40 << 10)
    store = SegmentStore(manager, make_format())
    store.put(A, 3, kv(A, 3, store.format))
    with store.retrieve(A, [Segment(0, 20)]) as found:
        first = found.layer(0)
        for number in range(20):
            tokens = [10_000 + 50 * number + i for i in range(20)]
            store.put(tokens, 0, kv(tokens, 0, store.format))
        store.remove(A)
        check(found, A, [(0, 20)], store.format)
        assert torch.equal(found.layer(0)[0], first[0])
    assert not store.holds(A)


def test_after_close_nothing_is_held_and_nothing_is_given(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    store_all(store)
    chunks = manager.pool.used_bytes
    found = store.retrieve(PROMPT, SEGMENTS)
    assert manager.stats()["leases"] == 3
    found.layer(0)
    found.close()
    found.close()
    assert manager.stats()["leases"] == 0
    manager.clear()
    assert manager.pool.used_bytes == 0 < chunks
    with pytest.raises(ClosedError):
        found.layer(0)


def test_a_lease_that_is_used_does_not_run_out(manager: StorageManager) -> None:
    store = SegmentStore(manager, make_format())
    store_all(store)
    with store.retrieve(PROMPT, SEGMENTS) as found:
        before = [part.lease.expires_at for part in found._parts]
        found.layer(2)
        assert all(part.lease.expires_at > was for part, was in zip(found._parts, before, strict=True))


def test_a_lease_that_ran_out_is_an_error_and_not_garbage(open_manager: Open) -> None:
    manager = open_manager(lease_timeout_s=0.05)
    store = SegmentStore(manager, make_format())
    store_all(store)
    found = store.retrieve(PROMPT, SEGMENTS)
    settle(lambda: manager.stats()["leases"] == 0, "the leases never ran out")
    with pytest.raises(LeaseExpiredError, match="retrieve them again"):
        found.layer(0)
    found.close()


def test_a_prompt_that_is_refused_midway_holds_nothing(
    manager: StorageManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SegmentStore(manager, make_format())
    store_all(store)
    acquire, calls = manager.acquire, []

    def third_fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise ClosedError("a fault")
        return acquire(*args, **options)

    monkeypatch.setattr(manager, "acquire", third_fails)
    with pytest.raises(ClosedError, match="a fault"):
        store.retrieve(PROMPT, SEGMENTS)
    assert manager.stats()["leases"] == 0


def test_an_index_out_of_range_is_refused(manager: StorageManager) -> None:
    with SegmentStore(manager, make_format()).retrieve(A, []) as found:
        for index in (-1, 3):
            with pytest.raises(IndexError, match="there are 3"):
                found.layer(index)
