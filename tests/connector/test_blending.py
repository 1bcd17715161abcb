"""Blending over an engine's pages, with a model of Hugging Face in vLLM's place: what is read, fused, kept and lost."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_families as tiny
import torch

import lmcache
from lmcache.blend.blender import Blender
from lmcache.blend.models import adapt
from lmcache.blend.reuse import GivenKV, Segment
from lmcache.connector.blending import Blending
from lmcache.connector.passages import Passages
from lmcache.engine.engine import CacheEngine, pack_tokens
from lmcache.engine.layout import PagedCache, Plane
from lmcache.engine.token_pages import TokenPages, TokenView
from lmcache.errors import BlendError, ConfigError
from lmcache.kernels import PagedLayers, scatter_tokens
from lmcache.kernels.sides import Side

BLOCK, BLOCKS = 16, 40
A, B = tiny.prompt(37, 1), tiny.prompt(45, 2)
SYSTEM, QUESTION = tiny.prompt(16, 3), tiny.prompt(11, 4)
PROMPT = torch.cat([SYSTEM, B, A, QUESTION])
SPANS = Passages(spans=((16, 61), (61, 98)))
TABLE = [list(range(39, 30, -1))]  # not ascending
TAGS: dict[str, str] = {}


@functools.cache
def model(family: str) -> Any:
    """With heads as large as vLLM's CPU blocks have them."""
    return tiny.build(tiny.config(family, hidden_size=128, head_dim=32))


def paged(family: str, *, opaque: str | None = None, window: int = 0) -> PagedCache:
    kv = adapt(model(family)).kv
    layers = [torch.randn(BLOCKS, kv.heads, BLOCK, 2 * kv.size) for _ in range(4)]
    sides = (Side("key", 0, kv.size, kv.heads), Side("value", kv.size, kv.size, kv.heads))
    planes = [
        Plane(0, tuple(f"layer.{i}" for i in range(4)), PagedLayers(layers), sides=sides, window=window),
    ]
    return PagedCache(planes, opaque=opaque is not None, cpu_isa=opaque)


class Rig:
    def __init__(
        self, family: str, selector: str = "none", *, opaque: str | None = None, codec: str = "raw", **options: Any
    ) -> None:
        config = lmcache.load_config(
            overrides={
                "memory.capacity": "16MiB",
                "chunk_tokens": BLOCK,
                "codec": codec,
                "blend": {"selector": {"type": selector}, "min_tokens": 8, **options},
            }
        )
        self.model = model(family)
        cache = paged(family, opaque=opaque)
        self.engine = CacheEngine.open(config, "m", cache)
        self.pages = TokenPages(cache)
        names = [f"layer.{i}" for i in range(4)]
        assert config.blend is not None
        self.blending = Blending(config.blend, self.engine, adapt(self.model), names, 512)

    def write(self, layers: tiny.KV, table: list[list[int]] = TABLE) -> None:
        """A prompt's KV to its pages, as the engine would have computed it."""
        count = len(layers[0][0])
        ids = torch.tensor(table[0][: -(-count // BLOCK)])
        plane = self.engine.cache.planes[0]
        rows = torch.zeros(4, len(ids) * BLOCK, plane.pages.heads, plane.pages.content)
        for index, (keys, values) in enumerate(layers):
            rows[index, :count] = torch.cat([keys, values], -1)
        if self.engine.cache.opaque:
            self.pages.write_back(plane, TokenView(plane.pages, ids, rows), ids)
        else:
            scatter_tokens(plane.pages, plane.slots(ids), rows)

    def read(self, start: int, stop: int) -> torch.Tensor:
        rows = self.pages.rows(self.engine.cache.planes[0], torch.tensor(TABLE[0][: -(-stop // BLOCK)]))
        return rows[:, start:stop]

    def forget(self) -> None:
        """All passages, in storage too."""
        store = self.blending.store
        self.blending.rename(store.format.model)
        self.engine.storage.clear(store.format.kv_format().fingerprint(), wait=False)

    def learn(self, *passages: torch.Tensor) -> tiny.KV:
        """Each behind the system prompt, as requests of their own; the KV of the last."""
        kv: tiny.KV = []
        for passage in passages:
            whole = torch.cat([SYSTEM, passage])
            kv = tiny.prefill(self.model, whole)[1]
            self.write(kv)
            spans = Passages(spans=((16, len(whole)),))
            self.blending.learn(pack_tokens(whole), spans, self.engine.tables(TABLE), 0, TAGS)
        return kv

    def find(self, passages: Passages = SPANS, exact: int = 0, tags: dict[str, str] = TAGS) -> Any:
        return self.blending.find(pack_tokens(PROMPT), passages, exact, tags, 5.0)

    def fill(self, found: Any, exact: int = 0) -> list[int]:
        return self.blending.fill(found, self.engine.tables(TABLE), exact, found.reach)


@pytest.fixture
def rig() -> Iterator[Any]:
    made: list[Rig] = []

    def build(*args: Any, **options: Any) -> Rig:
        made.append(Rig(*args, **options))
        return made[-1]

    yield build
    for each in made:
        assert each.engine.storage.stats()["leases"] == 0
        each.engine.close()


def both(kv: tiny.KV, stop: int) -> torch.Tensor:
    return torch.stack([torch.cat([keys[:stop], values[:stop]], -1) for keys, values in kv])


def reused(model: Any, exact: int = 0) -> GivenKV:
    """What the passages' own prefills give at the prompt's positions, by definition: prefilled there."""
    parts = []
    for passage, at in ((B, 16), (A, 61)):
        # The system prompt right before it: at the positions behind which it stands in the prompt.
        kv = tiny.prefill(model, torch.cat([SYSTEM, passage]), at - 16)[1]
        parts.append([(keys[16:], values[16:]) for keys, values in kv])
    first = tiny.prefill(model, SYSTEM)[1]
    rest = [torch.zeros(11, *first[0][0].shape[1:])] * 2
    layers = [
        tuple(torch.cat([first[i][s], parts[0][i][s], parts[1][i][s], rest[s]]) for s in (0, 1)) for i in range(4)
    ]
    return GivenKV(layers, [Segment(16, 61), Segment(61, 98)], exact)  # type: ignore[arg-type]


@pytest.mark.parametrize("opaque", [None, "vec"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_computed_again_is_a_full_prefill(family: str, opaque: str | None, rig: Any) -> None:
    made = rig(family, "all", opaque=opaque)
    made.learn(A, B)
    found = made.find()
    assert found.reach == 98
    computed = made.fill(found)
    assert computed == [98] * 4
    truth = both(tiny.prefill(made.model, PROMPT)[1], 98)
    assert tiny.distance(made.read(0, 98), truth) < 1e-3


@pytest.mark.parametrize("opaque", [None, "vec"])
@pytest.mark.parametrize("exact", [0, 16])
@pytest.mark.parametrize("selector", ["none", "cacheblend", "question"])
def test_pages_hold_what_the_blender_makes_of_the_same_passages(
    selector: str, exact: int, opaque: str | None, rig: Any
) -> None:
    made = rig("llama", selector, opaque=opaque)
    made.learn(A, B)  # the last leaves the system prompt's KV in the first page
    before = made.read(0, 16)
    found = made.find(exact=exact)
    made.fill(found, exact)
    oracle = Blender(made.model, selector).blend(PROMPT, reused(made.model, exact), stop=98)
    assert tiny.distance(made.read(0, 98), both(oracle.layers, 98)) < 1e-4
    if exact:
        assert made.read(0, 16).equal(before)


def test_a_window_that_gave_its_pages_back_is_computed_once_more(rig: Any) -> None:
    made = rig("llama", "none")
    made.learn(A, B)
    table = [[-1, *TABLE[0][1:]]]
    found = made.find(exact=16)
    made.blending.fill(found, made.engine.tables(table), 16, 98)
    oracle = Blender(made.model, "none").blend(PROMPT, reused(made.model), stop=98)
    assert tiny.distance(made.read(16, 98), both(oracle.layers, 98)[:, 16:]) < 1e-4
    # And what has no pages cannot be learned.
    made.forget()
    made.blending.learn(pack_tokens(PROMPT), Passages(spans=((0, 31), (31, 98))), made.engine.tables(table), 0, TAGS)
    found = made.find(Passages(spans=((0, 31), (31, 98))))
    assert [(s.start, s.stop) for s in found.kv.segments] == [(31, 98)]
    found.close()


def test_passages_that_are_lost_midway_are_computed(rig: Any) -> None:
    made = rig("llama", "none")
    made.learn(A, B)
    found = made.find()
    found.close()
    made.blending.store.remove(A.tolist())
    assert made.fill(found) == [16 + 37] * 4
    other = made.find()
    other.close()
    made.forget()
    assert other.reach == 61
    assert made.fill(other) == [61] * 4
    truth = both(tiny.prefill(made.model, PROMPT)[1], 61)
    assert tiny.distance(made.read(0, 61), truth) < 1e-3


def test_what_is_not_worth_it_is_not_found(rig: Any) -> None:
    made = rig("llama")
    assert made.find() is None
    made.learn(A)
    assert made.find() is None, "37 of 98 tokens"
    assert made.find(Passages(spans=((16, 61),))) is None
    found = made.find(exact=48)
    assert [(s.start, s.stop) for s in found.kv.segments] == [(61, 98)]
    found.close()
    assert made.find(exact=96) is None, "two tokens"
    assert made.find(exact=48, tags={"cache_salt": "x"}) is None
    with pytest.raises(ValueError, match="tokens of the prompt"):
        made.find(Passages(spans=((0, 2000),)))


def test_content_is_found_whatever_taught_it(rig: Any) -> None:
    made = rig("llama", piece_tokens=32)
    whole = torch.cat([SYSTEM, A])
    made.write(tiny.prefill(made.model, whole)[1])
    for start in (0, 40):  # in two steps, and nothing twice
        made.blending.learn(pack_tokens(whole[: start + 40]), Passages(), made.engine.tables(TABLE), start, TAGS)
    stored = made.engine.storage.stats()
    made.blending.learn(pack_tokens(whole), Passages(), made.engine.tables(TABLE), 0, TAGS)
    assert made.engine.storage.stats()["chunks"] == stored["chunks"]
    found = made.find(Passages())
    assert (found.kv.segments[0].start, found.kv.segments[0].stop) == (0, 16)
    assert sum(s.stop - s.start for s in found.kv.segments) >= 16 + 37 - 8
    found.close()
    # Gone from storage: a miss, and learned again when it is read again.
    made.engine.storage.clear(made.blending.store.format.kv_format().fingerprint())
    assert made.find(Passages()) is None
    made.blending.learn(pack_tokens(whole), Passages(), made.engine.tables(TABLE), 0, TAGS)
    made.find(Passages()).close()


def test_pages_of_an_unknown_order_are_refused(rig: Any) -> None:
    with pytest.raises(BlendError, match=r"layer\.0: the order of tokens"):
        Rig("llama", opaque="neon")


@pytest.mark.parametrize(
    ("options", "message"), [({"selector": {"type": "best"}}, "best"), ({"selector": {"ratio": 0.1}}, "type")]
)
def test_selectors_are_checked_at_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rig("llama", **options)


def test_segments_are_kept_raw() -> None:
    with pytest.raises(ConfigError, match="codec"):
        Rig("llama", codec="int8")


def test_separators_belong_to_no_passage_and_the_question_is_none() -> None:
    tokens = np.array([1, 2, 9, 9, 3, 4, 5, 9, 9, 6], dtype=np.uint32)
    assert Passages(separator=(9, 9)).segments(tokens) == [Segment(0, 2), Segment(4, 7)]
    assert Passages(separator=(9, 9)).segments(tokens[:9]) == [Segment(0, 2), Segment(4, 7)]
    assert Passages(separator=(8,)).segments(tokens) == []
