"""Codecs and profiles: what is packed comes back near, more bits come back nearer, damage is told."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmcache.errors import ConfigError, CorruptChunkError, KernelArgumentError
from lmcache.kernels import PagedLayers
from lmcache.kernels.codecs.base import CODECS, Codec, build_codec
from lmcache.kernels.codecs.profile import FIRST_TABLE, Profile, fixed_tables, share_tables
from lmcache.kernels.entropy.tables import entropy_bits
from lmcache.kernels.launch import runs_kernel
from lmcache.kernels.sides import PlaneCodec, Side
from lmcache.kernels.transform.ops import Transform

LAYERS, HEADS, WIDTH, TOKENS = 3, 2, 16, 48
SIDES = [Side("key", 0, WIDTH, HEADS), Side("value", WIDTH, WIDTH, HEADS)]
FIXED = ["fp8", "int8", "int4", "int2", "rotated"]
CODED = ["klt", "cachegen"]


def gaussian_profile(
    kind: str, step: float = 0.2, layers: int = LAYERS, heads: int = HEADS, width: int = WIDTH
) -> Profile:
    """A profile for KV of standard deviation 1."""
    spread = 2**0.5 if kind == "cachegen" else 1.0  # of differences
    y = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * spread / step
    counts = torch.bincount((y.round().clamp(-127, 127) + 128).long(), minlength=256)[None].float()
    freqs, _, reach = share_tables(counts, 1)
    shape, delta = (layers, heads, width), kind == "cachegen"
    bounds, eye = torch.full(shape, float(reach[0])), torch.eye(width).expand(*shape[:2], width, width)
    none = torch.zeros(*shape[:2], 0)
    square = torch.zeros(*shape[:2], 0, 0)
    side = Transform(
        mean=torch.zeros(shape),
        bounds=bounds,
        forward=square if delta else (eye / step).contiguous(),
        inverse=square if delta else (eye * step).contiguous(),
        fine=torch.full(shape, step) if delta else none,
        coarse=torch.full(shape, step / 4) if delta else none,
        coarse_bounds=bounds if delta else none,
    )
    tables = torch.full((2, *shape), FIRST_TABLE, dtype=torch.int32)
    return Profile(kind, side, side, torch.cat([fixed_tables(), freqs]), tables, tables if delta else tables[..., :0])


@pytest.fixture
def codec(tmp_path: Path) -> Callable[..., Codec]:
    def build(name: str, step: float = 0.2, **options: Any) -> Codec:
        if name in CODED:
            path = tmp_path / f"{name}-{step}.npz"
            gaussian_profile(name, step).save(path)
            options["profile"] = str(path)
        made = build_codec({"type": name, **options})
        assert made is not None
        return made

    return build


def gaussian_pages(device: torch.device, seed: int = 0, scale: float = 1.0) -> PagedLayers:
    generator = torch.Generator().manual_seed(seed)
    layers = torch.randn(LAYERS, 8, HEADS, 16, 2 * WIDTH, generator=generator) * scale
    return PagedLayers([layer.to(device) for layer in layers])


def some_slots(device: torch.device, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randperm(8 * 16, generator=torch.Generator().manual_seed(1))[:tokens].to(device)


def packed_parts(plane: PlaneCodec, pages: PagedLayers, slots: torch.Tensor) -> list[torch.Tensor]:
    packed = plane.pack([side.of(pages) for side in SIDES], slots)
    assert bool(packed.sound)
    used = [int(number) for number in packed.used]
    assert all(number <= most for number, most in zip(used, plane.max_bytes(len(slots)), strict=True))
    return [part[:number].contiguous() for part, number in zip(packed.parts, used, strict=True)]


def round_trip(given: Codec, pages: PagedLayers, slots: torch.Tensor) -> tuple[float, int]:
    """(relative RMS error, bytes); what is not among the slots must stay as it was."""
    plane = given.bind(SIDES, range(LAYERS), 0, pages.device)
    parts = packed_parts(plane, pages, slots)
    back = PagedLayers([torch.full_like(layer, float("nan")) for layer in pages.layers])
    plane.unpack([side.of(back) for side in SIDES], slots, parts)
    live = slots[slots >= 0].cpu()
    found, true = (
        torch.stack([layer.cpu().transpose(1, 2).flatten(0, 1) for layer in x.layers]) for x in (back, pages)
    )
    rest = torch.ones(8 * 16, dtype=torch.bool)
    rest[live] = False
    assert bool(found[:, rest].isnan().all())
    return float((found[:, live] - true[:, live]).norm() / true[:, live].norm()), sum(map(len, parts))


@pytest.mark.parametrize("name", FIXED + CODED)
def test_a_codec_packs_and_unpacks(name: str, codec: Callable[..., Codec], device: torch.device) -> None:
    error, nbytes = round_trip(codec(name), gaussian_pages(device), some_slots(device))
    assert error < {"fp8": 0.04, "int8": 0.01, "int2": 0.5, "klt": 0.06, "cachegen": 0.06}.get(name, 0.12)
    assert nbytes < LAYERS * TOKENS * HEADS * 2 * WIDTH * 2, "not smaller than bfloat16"


@pytest.mark.parametrize("name", FIXED + CODED)
def test_skipped_slots_and_odd_sizes(name: str, codec: Callable[..., Codec], device: torch.device) -> None:
    for tokens in (2, 17):
        slots = some_slots(device, tokens)
        slots[tokens // 2] = -1
        error, _ = round_trip(codec(name), gaussian_pages(device), slots)
        assert error < 0.6


@pytest.mark.host
def test_more_bits_come_back_nearer(codec: Callable[..., Codec], device: torch.device) -> None:
    pages, slots = gaussian_pages(device), some_slots(device)
    for better, worse in (
        (codec("int8"), codec("int4")),
        (codec("int4"), codec("int2")),
        (codec("rotated"), codec("rotated", key_bits=2, value_bits=3)),
        (codec("klt", 0.1), codec("klt", 0.4)),
        (codec("cachegen", 0.1), codec("cachegen", 0.4)),
    ):
        error, nbytes = round_trip(better, pages, slots)
        more_error, fewer = round_trip(worse, pages, slots)
        assert error < more_error
        assert nbytes > fewer


@pytest.mark.parametrize("name", CODED)
def test_far_outliers_survive(name: str, codec: Callable[..., Codec], device: torch.device) -> None:
    pages = gaussian_pages(device)
    slots = some_slots(device, 16)
    slot = int(slots[5])
    for layer in pages.layers:
        layer[slot // 16, :, slot % 16, 3] = 3000.0
    error, _ = round_trip(codec(name), pages, slots)
    assert error < 0.02, "the outlier is most of the norm, and was clipped"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FIXED + CODED)
def test_what_is_not_finite_is_told(name: str, bad: float, codec: Callable[..., Codec], device: torch.device) -> None:
    pages, slots = gaussian_pages(device), some_slots(device, 16)
    pages.layers[1][int(slots[7]) // 16, 1, int(slots[7]) % 16, WIDTH + 2] = bad
    plane = codec(name).bind(SIDES, range(LAYERS), 0, pages.device)
    assert not bool(plane.pack([side.of(pages) for side in SIDES], slots).sound)


@pytest.mark.host  # the kernels' words are those of the host's coder, bit for bit
@pytest.mark.parametrize("name", CODED)
def test_the_entropy_stage_is_within_3_percent_of_the_entropy(name: str, device: torch.device) -> None:
    """64 tokens of 8 layers of 4 heads of 64 channels: lengths, states and tables included."""
    layers, heads, width, tokens = 8, 4, 64, 64
    profile = gaussian_profile(name, 0.4, layers, heads, width)
    sides = [Side("key", 0, width, heads), Side("value", width, width, heads)]
    kv = torch.randn(layers, 1, heads, tokens, 2 * width, generator=torch.Generator().manual_seed(3)).to(device)
    from lmcache.kernels.codecs.coded import CodedPlane

    plane = CodedPlane(profile, sides, range(layers), 0, device)
    pages, slots = PagedLayers(list(kv)), torch.arange(tokens, device=device)
    views = [side.of(pages) for side in sides]
    packed = plane.pack(views, slots)
    entropy = float(entropy_bits(plane.counts(views, slots).cpu().double()).sum())
    taken = 8 * sum(int(used) for used in packed.used)
    assert entropy < taken < 1.03 * entropy


@pytest.mark.parametrize("name", CODED)
def test_damage_is_told_on_a_cpu_and_never_crashes(
    name: str, codec: Callable[..., Codec], device: torch.device
) -> None:
    pages, slots = gaussian_pages(device), some_slots(device, 16)
    plane = codec(name).bind(SIDES, range(LAYERS), 0, device)
    parts = packed_parts(plane, pages, slots)
    views = [side.of(pages) for side in SIDES]
    for part, where in ((0, 0), (0, 3), (1, 0), (1, 50), (1, len(parts[1]) - 1), (2, 1)):
        damaged = [each.clone() for each in parts]
        damaged[part][where] ^= 0x10
        if device.type == "cpu":
            with pytest.raises(CorruptChunkError):
                plane.unpack(views, slots, damaged)
        else:
            plane.unpack(views, slots, damaged)
    with pytest.raises(CorruptChunkError):
        plane.unpack(views, slots, parts[:-1])
    with pytest.raises(CorruptChunkError):
        plane.unpack(views, slots, [parts[0][:-2], *parts[1:]])


@pytest.mark.host
@pytest.mark.parametrize("name", FIXED + CODED)
def test_equal_kv_makes_equal_bytes(name: str, codec: Callable[..., Codec], device: torch.device) -> None:
    plane = codec(name).bind(SIDES, range(LAYERS), 0, device)
    once, again = (packed_parts(plane, gaussian_pages(device), some_slots(device, 17)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.host
def test_ids_name_every_parameter(codec: Callable[..., Codec]) -> None:
    ids = [codec(name).id for name in FIXED + CODED]
    ids += [
        codec("klt", 0.3).id,
        codec("klt", sink_tokens=8).id,
        codec("int4", group=32).id,
        codec("int8", sink_tokens=4).id,
    ]
    ids += [codec("rotated", seed=1).id, codec("rotated", key_bits=3).id, codec("rotated", value_bits=3).id]
    assert len(set(ids)) == len(ids)
    assert all(len(each.encode()) <= 216 for each in ids)
    assert set(CODECS.names()) >= {*FIXED, *CODED}


@pytest.mark.host
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int5", "unknown codec 'int5'; known: raw"),
        ({"type": "int4", "bits": 3}, r"codec \(int4\): unknown key bits; known: sink_tokens, group"),
        ({"type": "int4", "group": "32"}, "group: Input should be a valid integer"),
        ({"type": "int4", "group": 24}, "group is 24; it must be a power of two"),
        ({"type": "rotated", "key_bits": 5}, "bits is 5; it must be 2, 3, 4 or 8"),
        ({"type": "raw", "group": 3}, "raw"),
        ("klt", "needs profile"),
        ({"type": "klt", "profile": "/nowhere"}, "no codec profile"),
        ({}, "unknown codec None"),
    ],
)
def test_wrong_options_are_explained(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_codec(given)


@pytest.mark.host
def test_raw_is_no_codec() -> None:
    assert build_codec("raw") is None
    assert build_codec({"type": "raw"}) is None


@pytest.mark.host
def test_a_profile_of_another_kind_or_model_is_refused(codec: Callable[..., Codec], tmp_path: Path) -> None:
    path = tmp_path / "klt.npz"
    gaussian_profile("klt").save(path)
    with pytest.raises(ConfigError, match="kind 'klt', not 'cachegen'"):
        build_codec({"type": "cachegen", "profile": str(path)})
    klt, cpu = codec("klt"), torch.device("cpu")
    with pytest.raises(KernelArgumentError, match="another model"):
        klt.bind(SIDES, [LAYERS], 0, cpu)
    with pytest.raises(KernelArgumentError, match="another model"):
        klt.bind(SIDES, range(LAYERS), 1, cpu)
    with pytest.raises(KernelArgumentError, match="head size 16"):
        klt.bind([Side("value", 0, 32, 1)], range(LAYERS), 0, cpu)


@pytest.mark.host
def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    for kind in CODED:
        profile, path = gaussian_profile(kind), tmp_path / "new" / f"{kind}.npz"
        profile.save(path)
        loaded = Profile.load(path)
        assert loaded.digest == profile.digest
        assert torch.equal(loaded.freqs, profile.freqs)
        assert all(file.suffix == ".npz" and file.name[0] != "." for file in path.parent.iterdir())


@pytest.mark.host
def test_every_array_changes_the_digest() -> None:
    profile = gaussian_profile("cachegen")
    digests = {profile.digest, dataclasses.replace(profile, kind="klt").digest}
    for field in ("freqs", "tables", "anchor_tables"):
        digests.add(dataclasses.replace(profile, **{field: getattr(profile, field) + 1}).digest)
    for field in ("mean", "bounds", "fine", "coarse", "coarse_bounds"):
        side = dataclasses.replace(profile.value, **{field: getattr(profile.value, field) + 1})
        digests.add(dataclasses.replace(profile, value=side).digest)
    assert len(digests) == 10


@pytest.mark.host
@pytest.mark.parametrize("what", ["cut", "empty", "text", "pickle", "array"])
def test_a_file_that_is_no_profile_is_an_error(what: str, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    gaussian_profile("klt").save(path)
    whole = path.read_bytes()
    if what == "array":
        np.savez(path, kind=np.array("klt"))
    else:
        path.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"hello", "pickle": pickle.dumps({"a": 1})}[what])
    with pytest.raises(KernelArgumentError, match="no codec profile"):
        Profile.load(path)


@pytest.mark.host
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda profile: profile.tables.fill_(99), "names tables 99 to 99"),
        (lambda profile: profile.tables.fill_(-1), "names tables -1"),
        (lambda profile: profile.value.inverse.view(-1)[3].fill_(torch.nan), "inverse is not finite"),
        (lambda profile: dataclasses.replace(profile, tables=profile.tables[:1]), "tables of its channels"),
        (lambda profile: dataclasses.replace(profile, freqs=profile.freqs[:, :100]), "frequencies have shape"),
        (
            lambda profile: dataclasses.replace(
                profile, value=dataclasses.replace(profile.value, bounds=profile.value.bounds[:1])
            ),
            "bounds is torch.float32 of shape",
        ),
    ],
)
def test_a_profile_that_kernels_could_not_trust_is_an_error(
    change: Callable[[Profile], Any], message: str, tmp_path: Path
) -> None:
    profile = gaussian_profile("klt")
    changed = change(profile)
    (changed if isinstance(changed, Profile) else profile).save(tmp_path / "p.npz")
    with pytest.raises(KernelArgumentError, match=message):
        Profile.load(tmp_path / "p.npz")


@pytest.mark.host
def test_a_part_has_the_layers_and_heads_that_were_asked_for() -> None:
    profile = gaussian_profile("klt")
    profile.key.mean.copy_(torch.arange(LAYERS * HEADS * WIDTH).view(LAYERS, HEADS, WIDTH))
    part = profile.part([2, 0], slice(1, 2), torch.device("cpu"))
    assert torch.equal(part.key.mean, profile.key.mean[[2, 0]][:, 1:2])
    assert part.tables.shape == (2, 2, 1, WIDTH)
    assert part.key.forward.is_contiguous()


@pytest.mark.host
def test_shared_tables_code_what_they_were_made_of() -> None:
    """Channels of very different spread: each symbol that was seen can be coded, within its channel's bounds."""
    generator = torch.Generator().manual_seed(2)
    spread = torch.logspace(-1, 1.4, 60)[:, None]
    symbols = (torch.randn(60, 500, generator=generator) * spread).round().clamp(-127, 127) + 128
    counts = torch.zeros(60, 256).scatter_add_(1, symbols.long(), torch.ones(60, 500))
    freqs, table_of, bounds = share_tables(counts, 8)
    assert bool((freqs.sum(1) == 4096).all())
    assert bool((freqs[table_of.long()][counts > 0] > 0).all())
    farthest = ((symbols - 128).abs()).amax(1)
    assert bool((bounds >= farthest).all())
    assert bool(((freqs[table_of.long()] > 0).sum(1) == 2 * bounds + 1).all()), "a table codes exactly its bounds"
    one, of_one, _ = share_tables(counts, 1)
    own = float(entropy_bits(counts).sum())
    few, single = (float(entropy_bits(counts, f[t.long()]).sum()) for f, t in ((freqs, table_of), (one, of_one)))
    assert own <= few < 0.9 * single
    assert few < 1.1 * own


@pytest.mark.parametrize("name", CODED)
def test_what_a_table_cannot_code_is_told(name: str, tmp_path: Path, device: torch.device) -> None:
    """Bounds that promise more than the tables hold: of a profile that someone has edited."""
    made = gaussian_profile(name)
    wide = dataclasses.replace(made.key, bounds=torch.full_like(made.key.bounds, 127.0))
    path = tmp_path / "edited.npz"
    dataclasses.replace(made, key=wide, value=wide).save(path)
    codec = build_codec({"type": name, "profile": str(path)})
    assert codec is not None
    pages = gaussian_pages(device, scale=10.0)
    views, plane = [side.of(pages) for side in SIDES], codec.bind(SIDES, range(LAYERS), 0, device)
    if runs_kernel(device):
        assert not bool(plane.pack(views, some_slots(device, 16)).sound)
    else:
        with pytest.raises(KernelArgumentError, match="has no slot"):
            plane.pack(views, some_slots(device, 16))
