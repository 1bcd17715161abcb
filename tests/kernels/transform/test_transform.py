"""Transform coding: symbols within half a step of the truth and within their tables, and back; nothing is clipped."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels import PagedLayers
from lmcache.kernels.transform.ops import (
    ANCHOR_GROUP,
    CENTRE,
    Symbols,
    Transform,
    pack_symbols,
    pack_symbols_torch,
    unpack_symbols,
    unpack_symbols_torch,
)

KINDS = ("klt", "delta")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LAYERS, BLOCK, RED = 2, 16, 64
# Relative size of one unit in the last place.
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}


def random_transform(kind: str, heads: int, width: int, device: torch.device, *, tight: bool = False) -> Transform:
    """Of channels with offsets, in steps of a fraction of what they spread. tight: bounds that most rows leave."""
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(LAYERS, heads, *shape, generator=generator)

    mean = normal(width) * 2
    bounds = torch.randint(1, 4, mean.shape, generator=generator).float()
    bounds, reach = (bounds, bounds + 3) if tight else (8 * bounds + 40, bounds + 124)
    wide, narrow = torch.zeros(LAYERS, heads, 0, 0), torch.zeros(LAYERS, heads, 0)
    if kind == "klt":
        basis = torch.linalg.qr(normal(width, width).double())[0]
        spread = torch.linspace(1.0, 6.0, width, dtype=torch.float64)
        forward = basis * spread  # y = x @ forward; no orthogonal matrix, but a tame one
        inverse = (basis / spread).mT
        parts = (mean, bounds, forward.float(), inverse.float(), narrow, narrow, narrow)
    else:
        fine, coarse = normal(width).abs() * 0.2 + 0.1, normal(width).abs() * 0.02 + 0.08
        parts = (mean, bounds, wide, wide, fine, coarse, reach)
    return Transform(*(part.contiguous().to(device) for part in parts))


@dataclasses.dataclass
class Pages:
    """Layers [B, H, N, C] of which a side is C[width :], filled with offsets and noise; some slots of them."""

    dtype: torch.dtype
    device: torch.device
    heads: int = 2
    width: int = 32
    tokens: int = 100

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.tokens * 1000 + self.width)
        blocks = self.tokens // BLOCK + 2
        data = torch.randn(LAYERS, blocks, self.heads, BLOCK, 2 * self.width, generator=generator)
        data += torch.randn(2 * self.width, generator=generator) * 2
        self.caches = [layer.to(self.dtype).to(self.device) for layer in data]
        self.slots = torch.randperm(blocks * BLOCK, generator=generator)[: self.tokens].to(self.device)

    @property
    def side(self) -> PagedLayers:
        return PagedLayers([cache[..., self.width :] for cache in self.caches])

    def rows(self, caches: list[torch.Tensor] | None = None) -> torch.Tensor:
        """What the slots hold, float64 [L, H, T, D]; zeros where a slot is negative."""
        out = torch.zeros(LAYERS, self.heads, self.tokens, self.width, dtype=torch.float64)
        slots = self.slots.cpu()
        for layer, cache in enumerate(caches or self.caches):
            flat = cache[..., self.width :].cpu().double().transpose(0, 1).flatten(1, 2)  # [H, B * N, D]
            out[layer, :, slots >= 0] = flat[:, slots[slots >= 0]]
        return out

    def place(self, token: int, layer: int, head: int, channel: int, value: float) -> None:
        block, row = divmod(int(self.slots[token]), BLOCK)
        self.caches[layer][block, head, row, self.width + channel] = value

    def poisoned(self) -> tuple[list[torch.Tensor], PagedLayers]:
        caches = [torch.full_like(cache, float("nan")) for cache in self.caches]
        return caches, PagedLayers([cache[..., self.width :] for cache in caches])


class Guarded:
    """Symbols of 0xFF, each field between red zones."""

    def __init__(self, pages: Pages, kind: str, layers: int = LAYERS) -> None:
        shape = (layers, pages.heads, pages.tokens, pages.width)
        like = Symbols.empty(*shape, delta=kind == "delta", device=pages.device)
        self.buffers, views = [], []
        for field in dataclasses.fields(Symbols):
            part = getattr(like, field.name)
            self.buffers.append(torch.full((2 * RED + part.numel(),), 0xFF, dtype=torch.uint8, device=pages.device))
            views.append(self.buffers[-1][RED : RED + part.numel()].view(part.shape))
        self.symbols = Symbols(*views)

    def check(self) -> None:
        for buffer in self.buffers:
            assert bool((buffer[:RED] == 0xFF).all()), "written before the symbols"
            assert bool((buffer[len(buffer) - RED :] == 0xFF).all()), "written behind the symbols"


def step(exponents: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponents.cpu().double())[..., None]


def value(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """What symbols stand for, in steps: float64 [L, H, T, D]."""
    return (codes.cpu().double() - CENTRE) * step(exponents)


def spread_anchors(symbols: Symbols, transform: Transform, tokens: int) -> torch.Tensor:
    values = value(symbols.anchors, symbols.anchor_exponents) * transform.coarse.cpu().double()[:, :, None]
    return values.repeat_interleave(ANCHOR_GROUP, 2)[:, :, :tokens]


def check_codes(
    y: torch.Tensor, noise: torch.Tensor, bounds: torch.Tensor, codes: torch.Tensor, exponents: torch.Tensor
) -> None:
    """`y`: the exact ones, of which arithmetic may be off by `noise`."""
    bounds = bounds.cpu().double()[:, :, None]
    assert bool(((codes.cpu().double() - CENTRE).abs() <= bounds).all()), "a code is outside of its table"
    # The code's own sum has 2^-17 of a step left.
    assert bool(((y - value(codes, exponents)).abs() <= (0.5 + 2.0**-16) * step(exponents) + noise).all())
    e = exponents.cpu().double()
    at_least = ((y.abs() - noise) / (bounds + 0.499)).amax(-1) * (1 - 1e-6)
    at_most = ((y.abs() + noise) / (bounds + 0.499)).amax(-1) * (1 + 1e-6)
    assert bool((at_least <= torch.exp2(e)).all()), "a row needs a higher exponent"
    assert bool(((e == 0) | (at_most > torch.exp2(e - 1))).all()), "a lower exponent would do"


def check_symbols(pages: Pages, transform: Transform, symbols: Symbols) -> None:
    live = (pages.slots.cpu() >= 0)[:, None]
    x = torch.where(live, pages.rows() - transform.mean.cpu().double()[:, :, None], 0)
    rounding = x.abs() * 2.0**-22 + transform.mean.cpu().abs()[:, :, None] * 2.0**-22  # of x - mean in fp32
    if not transform.is_delta:
        forward = transform.forward.cpu().double()
        precision = 2.0**-10 if pages.device.type == "cuda" else 2.0**-20  # tf32: both factors to 11 bits
        noise = (x.abs() * precision + rounding) @ forward.abs()
        check_codes(x @ forward, noise, transform.bounds, symbols.codes, symbols.exponents)
        return
    first, coarse = x[:, :, ::ANCHOR_GROUP], transform.coarse.cpu().double()[:, :, None]
    noise = rounding[:, :, ::ANCHOR_GROUP] / coarse
    check_codes(first / coarse, noise, transform.coarse_bounds, symbols.anchors, symbols.anchor_exponents)
    fine = transform.fine.cpu().double()[:, :, None]
    anchors = spread_anchors(symbols, transform, pages.tokens)
    y = torch.where(live, (x - anchors) / fine, 0)
    y[:, :, ::ANCHOR_GROUP] = 0
    noise = (rounding + anchors.abs() * 2.0**-22) / fine
    check_codes(y, noise, transform.bounds, symbols.codes, symbols.exponents)
    assert bool((symbols.codes[:, :, ::ANCHOR_GROUP] == CENTRE).all()), "an anchor is coded twice"
    assert bool((symbols.exponents[:, :, ::ANCHOR_GROUP] == 0).all())


def check_round_trip(pages: Pages, transform: Transform, symbols: Symbols, caches: list[torch.Tensor]) -> None:
    """`caches`, poisoned before, now hold the tokens, and nothing but the tokens."""
    slots = pages.slots.cpu()
    live = slots >= 0
    got, x = pages.rows(caches)[:, :, live], pages.rows()[:, :, live]
    half = 0.5 * step(symbols.exponents)
    if transform.is_delta:
        bound = half * transform.fine.cpu().double()[:, :, None]
        of_anchors = 0.5 * step(symbols.anchor_exponents) * transform.coarse.cpu().double()[:, :, None]
        bound[:, :, ::ANCHOR_GROUP] = of_anchors
        noise = torch.zeros_like(bound)
    else:
        inverse = transform.inverse.cpu().double().abs()
        bound = half * inverse.sum(-2)[:, :, None]
        precision = 2.0**-10 if pages.device.type == "cuda" else 2.0**-20
        noise = value(symbols.codes, symbols.exponents).abs() @ inverse * precision
        noise += (pages.rows() - transform.mean.cpu().double()[:, :, None]).abs() * precision * 4
    mean = transform.mean.cpu().double().abs()[:, :, None]
    limit = bound[:, :, live] * (1 + 2.0**-12) + noise[:, :, live]
    limit += (x.abs() + limit) * ULP[pages.dtype] + (x.abs() + mean) * 2.0**-18
    assert bool(((got - x).abs() <= limit).all())
    for cache in caches:
        assert bool(cache[..., : pages.width].isnan().all()), "written beside the side"
        flat = cache[..., pages.width :].transpose(1, 2).flatten(0, 1).cpu()
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[slots[live]] = False
        assert bool(flat[untouched].isnan().all()), "written to another token"


def check_all(pages: Pages, kind: str, *, tight: bool = False, definition: bool = False) -> Symbols:
    transform = random_transform(kind, pages.heads, pages.width, pages.device, tight=tight)
    guarded, before = Guarded(pages, kind), [cache.clone() for cache in pages.caches]
    sound = (pack_symbols_torch if definition else pack_symbols)(pages.side, pages.slots, transform, guarded.symbols)
    assert sound.shape == ()
    assert bool(sound)
    for old, new in zip(before, pages.caches, strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8)), "packing wrote to the pages"
    guarded.check()
    check_symbols(pages, transform, guarded.symbols)
    caches, side = pages.poisoned()
    (unpack_symbols_torch if definition else unpack_symbols)(side, pages.slots, transform, guarded.symbols)
    check_round_trip(pages, transform, guarded.symbols, caches)
    return guarded.symbols


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_symbols_are_within_half_a_step_there_and_back(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    check_all(Pages(dtype, device), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_so_are_those_of_the_definition(kind: str, device: torch.device) -> None:
    check_all(Pages(torch.bfloat16, device), kind, definition=True)


@pytest.mark.parametrize(
    ("tokens", "heads", "width"), [(1, 1, 16), (15, 2, 24), (16, 1, 80), (17, 2, 64), (65, 1, 128), (33, 3, 7)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_sizes(kind: str, tokens: int, heads: int, width: int, device: torch.device) -> None:
    check_all(Pages(torch.float32, device, heads, width, tokens), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_leaves_its_table_raises_the_exponent_of_its_row(kind: str, device: torch.device) -> None:
    symbols = check_all(Pages(torch.bfloat16, device, tokens=40), kind, tight=True)
    assert int(symbols.exponents.max()) >= 2
    assert len(symbols.exponents.unique()) >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_outliers_are_not_clipped(kind: str, device: torch.device) -> None:
    pages = Pages(torch.float32, device, tokens=40)
    for token, outlier in ((3, 1e3), (16, -1e7), (35, 1e30)):
        pages.place(token, 1, 0, 5, outlier)
    symbols = check_all(pages, kind)
    exponents = symbols.exponents[1, 0].tolist()
    assert 1 <= exponents[3] < exponents[35] < 126
    assert exponents[4] < exponents[3]
    if kind == "delta":
        # An anchor that is an outlier is one of its own group; its group follows it.
        assert symbols.anchor_exponents[1, 0].tolist()[1] > symbols.anchor_exponents[1, 0].tolist()[0]
    else:
        assert exponents[16] > exponents[3]
    assert int(symbols.exponents[0].max()) < 2  # the other layer is as it was


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside the interpreter
@pytest.mark.parametrize("token", [5, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_exponent_is_told(kind: str, bad: float, token: int, device: torch.device) -> None:
    pages = Pages(torch.float32, device, tokens=24)
    transform = random_transform(kind, pages.heads, pages.width, device)
    pages.place(token, 1, 1, 3, bad)
    for pack in (pack_symbols, pack_symbols_torch):
        guarded = Guarded(pages, kind)
        assert not bool(pack(pages.side, pages.slots, transform, guarded.symbols))
        symbols = guarded.symbols
        if kind == "delta" and token == 16:
            assert bool((symbols.anchors[1, 1, 1] == CENTRE).all())
        else:
            assert bool((symbols.codes[1, 1, token] == CENTRE).all())
        # All of them are codable all the same.
        within = (symbols.codes.float() - CENTRE).abs() <= transform.bounds[:, :, None]
        assert bool(within.all())
        assert int(symbols.exponents.max()) <= 126


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_slots_have_the_symbols_of_nothing(kind: str, device: torch.device) -> None:
    pages = Pages(torch.float32, device, tokens=41)
    skipped = torch.arange(0, 41, 3)  # a group's first token among them
    for token in skipped.tolist():  # what is there must not be read
        pages.place(token, 0, 1, 2, float("nan"))
    pages.slots[skipped.to(device)] = -7
    symbols = check_all(pages, kind)
    assert bool((symbols.codes[:, :, skipped.to(device)] == CENTRE).all())
    assert bool((symbols.exponents[:, :, skipped.to(device)] == 0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_makes_the_symbols_of_its_definition(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    pages = Pages(dtype, device, width=64, tokens=72)
    transform = random_transform(kind, pages.heads, pages.width, device)
    both = [Guarded(pages, kind).symbols for _ in range(2)]
    assert bool(pack_symbols(pages.side, pages.slots, transform, both[0]))
    assert bool(pack_symbols_torch(pages.side, pages.slots, transform, both[1]))
    for field in dataclasses.fields(Symbols):
        different = (getattr(both[0], field.name) != getattr(both[1], field.name)).float()
        # Ties may round either way where sums are taken in another order; in tf32, on a GPU, more of them.
        limit = 0.02 if device.type == "cuda" else 0.001
        assert different.numel() == 0 or float(different.mean()) <= limit, field.name
    caches = []
    for unpack in (unpack_symbols, unpack_symbols_torch):
        written, side = pages.poisoned()
        unpack(side, pages.slots, transform, both[1])
        caches.append(pages.rows(written))
    torch.testing.assert_close(
        caches[0], caches[1], rtol=2 * ULP[dtype] + 1e-5, atol=2e-2 if device.type == "cuda" else 1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_fp16_comes_back_finite(kind: str, device: torch.device) -> None:
    pages = Pages(torch.float16, device)
    for cache in pages.caches:
        cache[:, :, ::2] = 65504.0
        cache[:, :, 1::4, ::2] = -65504.0
    transform, symbols = random_transform(kind, pages.heads, pages.width, device), Guarded(pages, kind).symbols
    assert bool(pack_symbols(pages.side, pages.slots, transform, symbols))
    for unpack in (unpack_symbols, unpack_symbols_torch):
        caches, side = pages.poisoned()
        unpack(side, pages.slots, transform, symbols)
        assert not any(bool(cache.isinf().any()) for cache in caches)


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_of_layers(kind: str, device: torch.device) -> None:
    pages = Pages(torch.float16, device, tokens=20)
    whole = random_transform(kind, pages.heads, pages.width, device)
    second = Transform(*(getattr(whole, f.name)[1:].contiguous() for f in dataclasses.fields(whole)))
    both = Guarded(pages, kind).symbols
    one = Guarded(pages, kind, layers=1)
    pack_symbols(pages.side, pages.slots, whole, both)
    pack_symbols(pages.side, pages.slots, second, one.symbols, first_layer=1)
    one.check()
    for field in dataclasses.fields(Symbols):
        assert torch.equal(getattr(both, field.name)[1:], getattr(one.symbols, field.name))
    caches, side = pages.poisoned()
    unpack_symbols(side, pages.slots, second, one.symbols, first_layer=1)
    assert bool(caches[0].isnan().all())
    assert not bool(pages.rows(caches)[1].isnan().any())


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_of_a_token_may_lie_together(kind: str, device: torch.device) -> None:
    pages = Pages(torch.bfloat16, device, heads=3, tokens=33)
    pages.caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in pages.caches]
    check_all(pages, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_nothing(kind: str, device: torch.device) -> None:
    pages = Pages(torch.float32, device, tokens=0)
    transform = random_transform(kind, pages.heads, pages.width, device)
    symbols = Guarded(pages, kind).symbols
    assert bool(pack_symbols(pages.side, pages.slots, transform, symbols))
    unpack_symbols(pages.side, pages.slots, transform, symbols)


def test_wrong_arguments_are_explained(device: torch.device) -> None:
    pages = Pages(torch.float32, device, tokens=20)
    for kind in KINDS:
        transform = random_transform(kind, pages.heads, pages.width, device)
        symbols = Guarded(pages, kind).symbols
        integers = PagedLayers([torch.zeros(4, 2, 16, 32, dtype=torch.int32, device=device)] * 2)
        with pytest.raises(KernelArgumentError, match="bfloat16, float16 and float32"):
            pack_symbols(integers, pages.slots, transform, symbols)
        with pytest.raises(KernelArgumentError, match="dense int64"):
            pack_symbols(pages.side, pages.slots.int(), transform, symbols)
        with pytest.raises(KernelArgumentError, match="first_layer=1; there are 2"):
            unpack_symbols(pages.side, pages.slots, transform, symbols, first_layer=1)
        for owner in (symbols, transform):
            for field in dataclasses.fields(owner):
                part = getattr(owner, field.name)
                wrong = {"symbols": symbols, "transform": transform}
                for bad in (part.to(torch.int16), part[:, :1], torch.cat([part, part], -1)[..., ::2]):
                    if bad.is_contiguous() and bad.shape == part.shape and bad.dtype == part.dtype:
                        continue  # nothing to see in what is empty
                    name = "symbols" if owner is symbols else "transform"
                    wrong[name] = dataclasses.replace(owner, **{field.name: bad})
                    with pytest.raises(KernelArgumentError, match=f"{field.name} is .* must be a dense torch"):
                        pack_symbols(pages.side, pages.slots, wrong["transform"], wrong["symbols"])
    klt, symbols = random_transform("klt", pages.heads, pages.width, device), Guarded(pages, "delta").symbols
    with pytest.raises(KernelArgumentError, match="anchors is"):
        pack_symbols(pages.side, pages.slots, klt, symbols)


@pytest.mark.interpret
@pytest.mark.parametrize("width", [32, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_touch_only_what_they_are_given(kind: str, width: int, device: torch.device) -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    pages = Pages(torch.float16, device, width=width, tokens=35)
    pages.slots[::5] = -1
    transform = random_transform(kind, pages.heads, width, device)
    symbols, side = Guarded(pages, kind).symbols, pages.side
    with sanitized(*side.layers) as watched:
        assert bool(pack_symbols(side, pages.slots, transform, symbols))
        unpack_symbols(side, pages.slots, transform, symbols)
    assert watched.programs > 0
