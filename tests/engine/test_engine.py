"""CacheEngine over pages in host memory: what is retrieved is what was stored, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lmcache
from lmcache import metrics
from lmcache.engine.engine import CacheEngine
from lmcache.engine.layout import PagedCache, Plane, chunk_tokens
from lmcache.errors import ClosedError, ConfigError, LeaseExpiredError, UnsupportedLayoutError
from lmcache.kernels import PagedLayers

BLOCK, BLOCKS, LAYERS = 16, 40, 3
NAN = float("nan")

Open = Callable[..., CacheEngine]


def pages(fill: str = "random", *, block: int = BLOCK) -> list[torch.Tensor]:
    shape = (BLOCKS, 2, block, 8)
    if fill == "nan":
        return [torch.full(shape, NAN) for _ in range(LAYERS)]
    return [torch.randn(shape) for _ in range(LAYERS)]


@pytest.fixture
def open_engine() -> Iterator[Open]:
    opened: list[CacheEngine] = []

    def do(cache: PagedCache, *, model: str = "m", **options: Any) -> CacheEngine:
        values = {"memory": {"capacity": "4MiB"}, "chunk_tokens": 32, **options}
        opened.append(CacheEngine.open(lmcache.load_config(overrides=values), model, cache))
        return opened[-1]

    yield do
    for engine in opened:
        engine.close()
        assert engine.storage.pool.used_bytes == 0, "a buffer leaked"


def blocks(layers: list[torch.Tensor], ids: list[int]) -> list[torch.Tensor]:
    return [layer[ids] for layer in layers]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 31, 32, 33, 47, 48, 100, 127, 128])
def test_a_prompt_comes_back_down_to_the_block(open_engine: Open, count: int, opaque: bool) -> None:
    source, target = pages(), pages("nan")
    engine = open_engine(PagedCache.from_layers(source, opaque=opaque))
    tokens, ids = list(range(count)), [(7 * i + 3) % BLOCKS for i in range(8)]
    whole = count // BLOCK * BLOCK
    assert engine.store(tokens, [ids]) == whole
    assert engine.store(tokens, [ids]) == 0, "what a tier holds is not copied again"
    engine.cache = PagedCache.from_layers(target, opaque=opaque)
    engine._mover.cache = engine.cache
    other = [(11 * i + 5) % BLOCKS for i in range(8)]
    with engine.lookup([*tokens, 9, 9]) as lookup:
        assert lookup.wait(10)
        assert lookup.tokens == whole
        if whole:
            assert engine.retrieve(lookup, [other]) == whole
    used = other[: count // BLOCK]
    assert equal(blocks(target, used), blocks(source, ids[: count // BLOCK]))
    rest = [b for b in range(BLOCKS) if b not in used]
    assert all(torch.isnan(layer[rest]).all() for layer in target), "no other block may be touched"


@pytest.mark.parametrize("tags", [{"cache_salt": "a"}, {"tag.tenant": "a", "cache_salt": "s", "lora.name": "x"}])
def test_a_quota_counts_what_the_requests_of_its_tenant_store_and_read(
    open_engine: Open, tmp_path: Path, tags: dict[str, str]
) -> None:
    source = pages()
    chunk = PagedCache.from_layers(source).chunk_bytes(32)
    tiers = [{"type": "disk", "path": str(tmp_path / "kv")}]
    engine = open_engine(PagedCache.from_layers(source), quotas={"a": 2 * chunk, "b": chunk}, tiers=tiers)
    ids, tokens = list(range(8)), list(range(128))
    gauge = metrics.TENANT_MEMORY_BYTES.labels("a")
    before = gauge._value.get()
    for count in (32, 64, 96, 128):
        engine.store(tokens[:count], [ids], tags=tags)
        assert engine.storage.flush(10)
    engine.store(tokens, [ids])
    assert engine.storage.flush(10)
    assert engine.storage.health().tenant_bytes == {"a": 2 * chunk, "b": 0}
    assert gauge._value.get() == before + 2 * chunk
    assert engine.storage.stats()["chunks"] == 2 + 4, "who has no quota has all of memory"
    with engine.lookup(tokens, tags=tags) as lookup:
        assert lookup.wait(10)
        assert lookup.tokens == 128, "the rest is on disk"
    assert engine.storage.health().tenant_bytes["a"] <= 2 * chunk
    assert engine.clear("b") == 0
    assert engine.clear("a") == 4
    assert engine.storage.health().tenant_bytes["a"] == 0
    for whose, found in ((tags, 0), (None, 128)):
        with engine.lookup(tokens, tags=whose) as lookup:
            assert lookup.wait(10)
            assert lookup.tokens == found
    engine.storage.close()
    assert gauge._value.get() == before


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 96), (16, 96), (32, 80), (48, 95), (80, 96), (96, 96), (0, 1)])
def test_only_the_asked_positions_are_written(open_engine: Open, start: int, stop: int, opaque: bool) -> None:
    source = pages()
    engine = open_engine(PagedCache.from_layers(source, opaque=opaque))
    ids = list(range(1, 7))
    engine.store(list(range(96)), [ids])
    target = pages("nan")
    engine.cache = PagedCache.from_layers(target, opaque=opaque)
    engine._mover.cache = engine.cache
    table = list(range(20, 20 + -(-stop // BLOCK)))  # reaches no further than stop does
    with engine.lookup(list(range(96))) as lookup:
        engine.retrieve(lookup, [table], start=start, stop=stop)
    first, last = start // BLOCK, -(-stop // BLOCK)
    assert equal(blocks(target, table[first:last]), blocks(source, ids[first:last]))
    untouched = [b for b in range(BLOCKS) if b not in table[first:last]]
    assert all(torch.isnan(layer[untouched]).all() for layer in target)


def test_planes_of_two_groups_use_their_own_tables_and_skip_missing_blocks(open_engine: Open) -> None:
    full, window = pages(), pages()

    def cache(a: list[torch.Tensor], b: list[torch.Tensor]) -> PagedCache:
        planes = [
            Plane(0, ("f0", "f1", "f2"), PagedLayers(a)),
            Plane(1, ("w0", "w1", "w2"), PagedLayers(b), "sliding_window", 32),
        ]
        return PagedCache(planes, opaque=True)

    engine = open_engine(cache(full, window))
    tokens = list(range(128))
    ids, other = list(range(8)), list(range(20, 28))
    assert engine.store(tokens, [ids, [-1, -1, *other[2:]]]) == 96, "a chunk without all its blocks is not stored"
    assert engine.lookup(tokens).tokens == 0, "and a prefix without its head is not found"
    assert engine.store(tokens, [ids, other]) == 128
    to_full, to_window = pages("nan"), pages("nan")
    engine.cache = cache(to_full, to_window)
    engine._mover.cache = engine.cache
    with engine.lookup(tokens) as lookup:
        engine.retrieve(lookup, [ids, [-1] * 6 + [30, 31]])
    assert equal(blocks(to_full, ids), blocks(full, ids))
    assert equal(blocks(to_window, [30, 31]), blocks(window, other[6:]))
    assert all(torch.isnan(layer[[b for b in range(BLOCKS) if b not in (30, 31)]]).all() for layer in to_window)


def test_prompts_that_part_share_their_common_chunks_only(open_engine: Open) -> None:
    engine = open_engine(PagedCache.from_layers(pages()))
    engine.store(list(range(100)), [list(range(7))])
    for common, found in ((100, 96), (95, 64), (64, 64), (63, 32), (31, 0)):
        prompt = list(range(common)) + [500 + i for i in range(100)]
        with engine.lookup(prompt) as lookup:
            assert lookup.tokens == found


def test_tags_and_models_do_not_share(open_engine: Open, tmp_path: Path) -> None:
    tiers = [{"type": "disk", "path": str(tmp_path), "capacity": "10MiB"}]
    layers = pages()
    engine = open_engine(PagedCache.from_layers(layers), tiers=tiers)
    engine.store(list(range(64)), [list(range(4))], tags={"cache_salt": "a"})
    assert engine.storage.flush(10)
    assert engine.lookup(list(range(64)), tags={"cache_salt": "a"}).tokens == 64
    assert engine.lookup(list(range(64))).tokens == 0
    again = open_engine(PagedCache.from_layers(layers), tiers=tiers)
    other = open_engine(PagedCache.from_layers(layers), tiers=tiers, model="other")
    for who, found in ((again, 64), (other, 0)):
        lookup = who.lookup(list(range(64)), tags={"cache_salt": "a"})
        assert lookup.wait(10)
        assert lookup.tokens == found
        lookup.close()


def test_clear_forgets_and_a_closed_lookup_cannot_be_retrieved(open_engine: Open) -> None:
    engine = open_engine(PagedCache.from_layers(pages()))
    engine.store(list(range(64)), [list(range(4))])
    lookup = engine.lookup(list(range(64)))
    assert engine.clear() == 2
    assert engine.lookup(list(range(64))).tokens == 0
    assert engine.retrieve(lookup, [list(range(4))]) == 64, "a lease outlives clear"
    lookup.close()
    with pytest.raises(LeaseExpiredError, match="64 tokens were asked for, 0 are held"):
        engine.retrieve(lookup, [list(range(4))], stop=64)


def test_what_finds_no_room_is_not_stored(open_engine: Open) -> None:
    engine = open_engine(PagedCache.from_layers(pages()), memory={"capacity": "16KiB"})
    chunk = engine.cache.chunk_bytes(32)
    engine.store(list(range(96)), [list(range(6))])
    with engine.lookup(list(range(96))) as lookup:
        assert engine.storage.stats()["used_bytes"] <= 16 << 10
        assert lookup.tokens == 64, "two chunks of 8 KiB"
        assert chunk == LAYERS * 32 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("capacity", "options", "said"),
    [
        (8 << 10, {}, True),
        (10 << 10, {}, True),
        (12 << 10, {}, False),
        (1 << 20, {"write_queue": "4KiB"}, True),
        (8 << 10, {"tiers": []}, False),
    ],
)
def test_memory_of_one_chunk_that_keeps_lower_tiers_empty_is_said_at_start(
    capacity: int,
    options: dict[str, Any],
    said: bool,
    open_engine: Open,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    below = {"tiers": [{"type": "disk", "path": str(tmp_path)}], **options}
    engine = open_engine(PagedCache.from_layers(pages()), memory={"capacity": capacity}, **below)
    warned = "have up to 6144 bytes" in caplog.text
    assert warned is said
    if said:
        assert f"half of memory.capacity, which is {capacity})" in caplog.text
        assert "set memory.capacity to 24576 or more and write_queue to 12288 or more" in caplog.text
    # What is said is true.
    engine.store(list(range(32)), [[1, 2]])
    assert engine.storage.flush(20)
    assert (sum(file.is_file() for file in tmp_path.rglob("*.kv")) == 0) is (said or not below["tiers"])
    assert engine.memory_tokens == capacity // (8 << 10) * 32


def test_memory_smaller_than_a_chunk_is_refused(open_engine: Open) -> None:
    with pytest.raises(ConfigError, match=r"less than one chunk of 64 tokens \(12288 bytes\)"):
        open_engine(PagedCache.from_layers(pages()), memory={"capacity": 4096}, chunk_tokens=64)


def test_use_after_close_is_an_error(open_engine: Open) -> None:
    engine = open_engine(PagedCache.from_layers(pages()))
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        engine.lookup([1])
    with pytest.raises(ClosedError):
        engine.store([1], [[0]])


def test_a_cache_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedLayoutError, match="no plane"):
        PagedCache([], opaque=True)


@pytest.mark.parametrize(
    ("wanted", "unit", "got"), [(None, 16, 64), (None, 128, 128), (None, 48, 96), (200, 128, 256), (256, 16, 256)]
)
def test_chunks_are_whole_blocks(wanted: int | None, unit: int, got: int) -> None:
    assert chunk_tokens(wanted, unit) == got


def test_a_lease_that_runs_out_during_the_copy_does_not_pull_the_bytes_away(open_engine: Open) -> None:
    source, target = pages(), pages("nan")
    engine = open_engine(PagedCache.from_layers(source), memory={"capacity": "16KiB"})
    engine.store(list(range(64)), [[0, 1, 2, 3]])
    engine.cache = PagedCache.from_layers(target)
    engine._mover.cache = engine.cache
    lookup, scatter = engine.lookup(list(range(64))), engine._mover.scatter

    def hostile(*args: Any, **kwargs: Any) -> None:
        lookup.close()  # what a sweep on another thread does
        assert engine.storage.allocate(6144) is None, "the bytes being copied are still held"
        scatter(*args, **kwargs)

    engine._mover.scatter = hostile  # type: ignore[method-assign]
    assert engine.retrieve(lookup, [[4, 5, 6, 7]]) == 64
    assert equal(blocks(target, [4, 5, 6, 7]), blocks(source, [0, 1, 2, 3]))
