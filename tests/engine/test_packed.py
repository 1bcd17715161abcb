"""CacheEngine with a codec: what comes back is near what was stored, chunks vary in size, damage is never data."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import lmcache
from lmcache.engine.engine import CacheEngine
from lmcache.engine.layout import PagedCache
from lmcache.errors import ConfigError, CorruptChunkError, KernelArgumentError
from lmcache.kernels.codecs.profile import FIRST_TABLE, Profile, fixed_tables, share_tables
from lmcache.kernels.copy.cpu_blocks import pack_cpu_blocks, unpack_cpu_blocks
from lmcache.kernels.transform.ops import Transform

BLOCK, BLOCKS, LAYERS, HEADS, WIDTH = 16, 24, 3, 2, 16
IDS, OTHER = [3, 1, 4, 15, 9, 2], [10, 11, 12, 13, 14, 16]
TOKENS = list(range(len(IDS) * BLOCK))
# Relative RMS error that each codec stays below on Gaussian KV.
CODECS: dict[str, tuple[Any, float]] = {
    "fp8": ("fp8", 0.04),
    "int8": ("int8", 0.01),
    "int4": ({"type": "int4", "group": 32}, 0.12),
    "int2": ("int2", 0.6),
    "rotated": ("rotated", 0.12),
    "klt": ({"type": "klt"}, 0.1),
    "cachegen": ({"type": "cachegen"}, 0.1),
}

Open = Callable[..., CacheEngine]


def profile(kind: str) -> Profile:
    """One that is fit for Gaussian KV of standard deviation 1."""
    step, shape = 0.2, (LAYERS, HEADS, WIDTH)
    y = (
        torch.randn(4096, generator=torch.Generator().manual_seed(0)) * (2**0.5 if kind == "cachegen" else 1) / step
    ).round()
    counts = torch.bincount((y.clamp(-127, 127) + 128).long(), minlength=256)[None].float()
    freqs, _, bounds = share_tables(counts, 1)
    bound = torch.full(shape, float(bounds[0]))
    eye = torch.eye(WIDTH).expand(LAYERS, HEADS, WIDTH, WIDTH)
    none, delta = torch.zeros(*shape[:2], 0), kind == "cachegen"
    side = Transform(
        mean=torch.zeros(shape),
        bounds=bound,
        forward=torch.zeros(LAYERS, HEADS, 0, 0) if delta else (eye / step).contiguous(),
        inverse=torch.zeros(LAYERS, HEADS, 0, 0) if delta else (eye * step).contiguous(),
        fine=torch.full(shape, step) if delta else none,
        coarse=torch.full(shape, step / 4) if delta else none,
        coarse_bounds=bound if delta else none,
    )
    tables = torch.full((2, *shape), FIRST_TABLE, dtype=torch.int32)
    return Profile(kind, side, side, torch.cat([fixed_tables(), freqs]), tables, tables if delta else tables[..., :0])


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Open]:
    opened: list[CacheEngine] = []

    def do(layers: list[torch.Tensor], codec: Any, *, opaque: bool = False, **options: Any) -> CacheEngine:
        if isinstance(codec, dict) and codec["type"] in ("klt", "cachegen"):
            path = tmp_path / f"{codec['type']}.npz"
            profile(codec["type"]).save(path)
            codec = {**codec, "profile": str(path)}
        values = {"memory": {"capacity": "4MiB"}, "chunk_tokens": 32, "codec": codec, **options}
        cache = PagedCache.from_layers(layers, opaque=opaque)
        cache.cpu_isa = "vec" if opaque else None
        opened.append(CacheEngine.open(lmcache.load_config(overrides=values), "m", cache))
        return opened[-1]

    yield do
    for engine in opened:
        engine.close()
        assert engine.storage.pool.used_bytes == 0, "a buffer leaked"


def random_layers(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BLOCKS, HEADS, BLOCK, 2 * WIDTH, generator=generator).to(dtype) for _ in range(LAYERS)]


def as_cpu_blocks(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    """As vLLM's CPU attention keeps them."""
    out = []
    for layer in layers:
        packed = torch.empty_like(layer)
        tokens = layer.transpose(1, 2).contiguous()[None]  # [1, B, N, H, 2 D]
        pack_cpu_blocks(tokens, WIDTH, "vec", packed.view(1, BLOCKS, -1))
        out.append(packed)
    return out


def from_cpu_blocks(layers: list[torch.Tensor]) -> list[torch.Tensor]:
    out = []
    for layer in layers:
        tokens = torch.empty(1, BLOCKS, BLOCK, HEADS, 2 * WIDTH, dtype=layer.dtype)
        unpack_cpu_blocks(layer.view(1, BLOCKS, -1), WIDTH, "vec", tokens)
        out.append(tokens[0].transpose(1, 2))
    return out


def error(layers: list[torch.Tensor], true: list[torch.Tensor], ids: list[int], true_ids: list[int]) -> float:
    a, b = (torch.stack([layer[i] for layer in x]).double() for x, i in ((layers, ids), (true, true_ids)))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_is_near_what_was_stored(open_engine: Open, name: str, opaque: bool) -> None:
    codec, bound = CODECS[name]
    true = random_layers()
    layers = as_cpu_blocks(true) if opaque else [layer.clone() for layer in true]
    engine = open_engine(layers, codec, opaque=opaque)
    assert engine.store(TOKENS, [IDS]) == len(TOKENS)
    assert engine.storage.pool.used_bytes < engine.cache.chunk_bytes(len(TOKENS)), "nothing became smaller"
    with engine.lookup(TOKENS) as lookup:
        assert lookup.tokens == len(TOKENS)
        assert engine.retrieve(lookup, [OTHER]) == len(TOKENS)
    found = from_cpu_blocks(layers) if opaque else layers
    assert error(found, true, OTHER, IDS) < bound
    rest = [b for b in range(BLOCKS) if b not in OTHER]
    assert error(found, true, rest, rest) == 0, "another block was touched"
    if engine._packed and (sinks := engine._packed.codec.sink_tokens):
        assert all(torch.equal(f[OTHER[0], :, :sinks], t[IDS[0], :, :sinks]) for f, t in zip(found, true, strict=True))


@pytest.mark.parametrize("name", CODECS)
def test_only_the_asked_positions_are_written(open_engine: Open, name: str) -> None:
    true = random_layers()
    layers = [layer.clone() for layer in true]
    engine = open_engine(layers, CODECS[name][0])
    engine.store(TOKENS, [IDS])
    with engine.lookup(TOKENS) as lookup:
        assert engine.retrieve(lookup, [OTHER], start=16, stop=48) == 32
    assert error(layers, true, OTHER[1:3], IDS[1:3]) < CODECS[name][1]
    rest = [b for b in range(BLOCKS) if b not in OTHER[1:3]]
    assert error(layers, true, rest, rest) == 0


@pytest.mark.parametrize("name", ["int4", "klt", "cachegen"])
def test_chunks_of_any_size_come_back_from_disk(open_engine: Open, name: str, tmp_path: Path) -> None:
    tier = {"tiers": ({"type": "disk", "path": str(tmp_path / "kv")},)}
    true = random_layers()
    first = open_engine([layer.clone() for layer in true], CODECS[name][0], **tier)
    first.store(TOKENS, [IDS])
    first.close()
    layers = [torch.zeros_like(layer) for layer in true]
    second = open_engine(layers, CODECS[name][0], **tier)
    with second.lookup(TOKENS) as lookup:
        assert lookup.wait(10)
        assert second.retrieve(lookup, [OTHER]) == len(TOKENS)
    assert error(layers, true, OTHER, IDS) < CODECS[name][1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CODECS)
def test_kv_that_cannot_be_packed_is_not_stored(open_engine: Open, name: str, bad: float) -> None:
    layers = random_layers()
    layers[1][IDS[2], 1, 5, 7] = bad  # token 37: in the second chunk
    engine = open_engine(layers, CODECS[name][0])
    assert engine.store(TOKENS, [IDS]) == 32
    with engine.lookup(TOKENS) as lookup:
        assert lookup.tokens == 32


@pytest.mark.parametrize("name", ["int4", "rotated", "klt", "cachegen"])
def test_outliers_of_the_first_tokens_spoil_nobody_elses_steps(open_engine: Open, name: str) -> None:
    """All attend to them and their values are like no other token's, so they are kept, and left out of the scales."""
    true = random_layers()
    for layer in true:
        layer[IDS[0], :, :4] *= 1e4
    layers = [layer.clone() for layer in true]
    engine = open_engine(layers, CODECS[name][0])
    assert engine.store(TOKENS, [IDS]) == len(TOKENS)
    with engine.lookup(TOKENS) as lookup:
        engine.retrieve(lookup, [OTHER])
    assert all(torch.equal(f[OTHER[0], :, :4], t[IDS[0], :, :4]) for f, t in zip(layers, true, strict=True))
    ordinary = [[layer[:, :, 4:] for layer in x] for x in (layers, true)]
    assert error(*ordinary, OTHER[:1], IDS[:1]) < CODECS[name][1]


@pytest.mark.parametrize("where", [0, 4, 9, 14, 20, 60, 250, 256, 270])
def test_a_header_that_is_off_is_never_data(open_engine: Open, where: int) -> None:
    layers = random_layers()
    engine = open_engine(layers, "int4")
    engine.store(TOKENS, [IDS])
    with engine.lookup(TOKENS) as lookup:
        view = lookup.lease.buffers[1].view
        view[where] ^= 0x41
        with pytest.raises(CorruptChunkError):
            engine.retrieve(lookup, [OTHER])
        view[where] ^= 0x41


def test_codecs_do_not_share_chunks(open_engine: Open) -> None:
    layers = random_layers()
    formats = {open_engine(layers, codec).format.fingerprint() for codec, _ in CODECS.values()}
    formats.add(open_engine(layers, {"type": "int4", "group": 64}).format.fingerprint())
    formats.add(open_engine(layers, "raw").format.fingerprint())
    assert len(formats) == len(CODECS) + 2


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("int5", "unknown codec 'int5'; known: raw, cachegen"),
        ({"type": "int4", "groups": 3}, "unknown key groups; known: sink_tokens, group"),
        ({"type": "int4", "group": "x"}, "group: Input should be a valid integer"),
        ("klt", "needs profile"),
        ({"type": "klt", "profile": "/nowhere.npz"}, "no codec profile"),
    ],
)
def test_a_wrong_codec_is_explained(open_engine: Open, codec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheEngine.open(lmcache.load_config(overrides={"codec": codec}), "m", PagedCache.from_layers(random_layers()))


def test_a_profile_of_another_model_is_refused(open_engine: Open, tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    profile("klt").save(path)
    layers = [torch.zeros(BLOCKS, HEADS + 1, BLOCK, 2 * WIDTH) for _ in range(LAYERS)]
    config = lmcache.load_config(overrides={"codec": {"type": "klt", "profile": str(path)}})
    with pytest.raises(ConfigError, match="another model"):
        CacheEngine.open(config, "m", PagedCache.from_layers(layers))


@pytest.mark.parametrize("kind", ["full_attention", "sliding_window"])
def test_opaque_blocks_of_an_unknown_order_are_refused(kind: str) -> None:
    config = lmcache.load_config(overrides={"codec": "int8"})
    plane = dataclasses.replace(PagedCache.from_layers(random_layers()).planes[0], kind=kind)
    with pytest.raises(ConfigError, match="order of this processor's KV blocks"):
        CacheEngine.open(config, "m", PagedCache([plane], opaque=True))


@pytest.mark.parametrize("codec", ["int8", "raw"])
def test_buffers_are_kept_until_their_copies_have_ended(
    open_engine: Open, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may still be writing to them, or reading them, when something else fails."""
    engine = open_engine(random_layers(), codec)
    mover: Any = engine._packed or engine._mover
    used: list[int] = []

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    def synchronize() -> None:
        used.append(engine.storage.pool.used_bytes)

    monkeypatch.setattr(engine._mover, "synchronize", synchronize)
    kept = mover.write if engine._packed else mover.gather
    name, calls = kept.__name__, []

    def second_fails(*given: Any) -> None:
        calls.append(given)
        (fail if len(calls) == 2 else kept)(*given)

    monkeypatch.setattr(mover, name, second_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.store(TOKENS, [IDS])
    assert used[0] > 0
    assert engine.storage.pool.used_bytes == 0
    monkeypatch.setattr(mover, name, kept)
    engine.store(TOKENS, [IDS])
    monkeypatch.setattr(mover, "scatter", fail)
    used.clear()
    with engine.lookup(TOKENS) as lookup, pytest.raises(RuntimeError, match="out of memory"):
        engine.retrieve(lookup, [OTHER])
    assert used, "the copies of the chunks before were not waited for"


@pytest.mark.parametrize("how", ["header", "device"])
def test_a_damaged_chunk_is_removed_so_that_it_can_be_stored_again(
    open_engine: Open, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layers = random_layers()
    engine = open_engine(layers, "int4", tiers=({"type": "disk", "path": str(tmp_path / "kv")},))
    engine.store(TOKENS, [IDS])
    assert engine.storage.flush(10)
    with engine.lookup(TOKENS) as lookup:
        if how == "header":
            lookup.lease.buffers[1].view[4] ^= 0x41
        else:  # as a GPU finds it
            assert engine._packed is not None
            monkeypatch.setattr(engine._packed._planes[0], "unpack", lambda *_: torch.tensor(False))
        with pytest.raises(CorruptChunkError):
            engine.retrieve(lookup, [OTHER], start=32, stop=64)
    monkeypatch.undo()
    with engine.lookup(TOKENS) as lookup:
        assert lookup.wait(10)
        assert lookup.tokens == 32
    assert engine.store(TOKENS, [IDS]) >= 32
    with engine.lookup(TOKENS) as lookup:
        assert engine.retrieve(lookup, [OTHER]) == len(TOKENS)


@pytest.mark.parametrize("what", ["codec", "sizes", "fixed size"])
def test_a_header_that_lies_under_a_right_checksum_is_never_data(open_engine: Open, what: str) -> None:
    engine = open_engine(random_layers(), "int4")
    engine.store(TOKENS, [IDS])
    with engine.lookup(TOKENS) as lookup:
        view = lookup.lease.buffers[1].view
        if what == "codec":
            view[32:36] = b"\xff\xfe\xfd\xfc"
        else:
            sizes = list(struct.unpack_from("<2Q", view, 256))
            changed = sizes[::-1] if what == "sizes" else [sizes[0], sizes[1] - 1]
            struct.pack_into("<2Q", view, 256, *changed)
        struct.pack_into("<Q", view, 248, xxhash.xxh3_64_intdigest(bytes(view[:248]) + bytes(view[256:272])))
        with pytest.raises(CorruptChunkError):
            engine.retrieve(lookup, [OTHER])


@pytest.mark.parametrize("name", CODECS)
def test_a_block_table_that_is_too_short_is_never_stretched(open_engine: Open, name: str) -> None:
    layers = random_layers()
    engine = open_engine(layers, CODECS[name][0])
    engine.store(TOKENS, [IDS])
    before = [layer.clone() for layer in layers]
    with engine.lookup(TOKENS) as lookup, pytest.raises(KernelArgumentError, match="ends before token 32"):
        engine.retrieve(lookup, [OTHER[:1]], stop=32)
    assert all(torch.equal(a, b) for a, b in zip(layers, before, strict=True))


@pytest.mark.parametrize(
    ("codec", "layers", "options", "message"),
    [
        ("int4", [torch.zeros(4, 2, 16, 32, dtype=torch.float8_e4m3fn)], {}, "keeps KV as torch.float8_e4m3fn"),
        ({"type": "int4", "sink_tokens": -1}, [torch.zeros(4, 2, 16, 32)], {}, "sink_tokens is -1"),
        ({"type": "cachegen"}, random_layers(), {"chunk_tokens": 65536}, "lower chunk_tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused_at_start(
    open_engine: Open, codec: Any, layers: list[torch.Tensor], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_engine(layers, codec, memory={"capacity": "64MiB"}, **options)
