"""Packing: back within half a step of the truth, no byte outside, and kernels that agree with their definition."""

from __future__ import annotations

import mmap

import pytest
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels import PagedLayers
from lmcache.kernels.quantise.packing import pack_pages, pack_pages_torch, unpack_pages, unpack_pages_torch
from lmcache.kernels.quantise.scheme import FP8_MAX, Scheme, SideLayout, rotation, scales_are_finite

SCHEMES = {
    "fp8": Scheme(8, fp8=True),
    "int8": Scheme(8),
    "int4_token": Scheme(4),
    "int4_channel": Scheme(4, "channel", group=32),
    "int8_channel": Scheme(8, "channel", group=64),
    "int3_channel": Scheme(3, "channel", group=16),
    "int2_channel": Scheme(2, "channel", group=32),
    "int2_token": Scheme(2),
    "rotated4": Scheme(4, rotate=True),
    "rotated3": Scheme(3, rotate=True, seed=5),
    "rotated2": Scheme(2, rotate=True),
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
RED = 64
MAP_NORESERVE = 0x4000  # Linux's, which Python 3.11 does not name
# Relative size of one unit in the last place.
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}


class Side:
    """L layers of pages [B, H, N, C] whose side is C[start : start + width], filled with offsets and noise."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, heads: int = 2, width: int = 32, tokens: int = 100
    ) -> None:
        self.dtype, self.heads, self.width, self.tokens = dtype, heads, width, tokens
        generator = torch.Generator().manual_seed(tokens * 1000 + width)
        n, blocks = 16, tokens // 16 + 3
        shape = (blocks, heads, n, 2 * width)
        channel = torch.randn(2, 1, heads, 1, 2 * width, generator=generator) * 3
        data = torch.randn(2, *shape, generator=generator) + channel
        self.caches = [layer.to(dtype).to(device) for layer in data]
        self.pages = PagedLayers([cache[..., width:] for cache in self.caches])
        self.slots = torch.randperm(blocks * n, generator=generator)[:tokens].to(device)

    def rows(self) -> torch.Tensor:
        """What the slots hold, float64 [L, T, H, D]; zeros where a slot is negative."""
        out = torch.zeros(2, self.tokens, self.heads, self.width, dtype=torch.float64)
        for layer, cache in enumerate(self.caches):
            flat = cache[..., self.width :].cpu().double().transpose(1, 2).flatten(0, 1)  # [B * N, H, D]
            live = self.slots.cpu() >= 0
            out[layer, live] = flat[self.slots.cpu()[live]]
        return out

    def wiped(self) -> tuple[list[torch.Tensor], PagedLayers]:
        """Pages like these, poisoned."""
        caches = [torch.full_like(cache, float("nan")) for cache in self.caches]
        return caches, PagedLayers([cache[..., self.width :] for cache in caches])


def packed_buffer(layout: SideLayout, layers: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer with red zones, view [layers, nbytes]) of 0xFF bytes, layers apart."""
    step = layout.nbytes + 16
    buffer = torch.full((RED + layers * step + RED,), 0xFF, dtype=torch.uint8, device=device)
    return buffer, buffer.as_strided((layers, layout.nbytes), (step, 1), RED)


def steps_of(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Width of one code for every element of x [L, T, H, D], as the definition has it, in float64."""
    if scheme.rotate:
        x = x @ rotation(x.shape[-1], scheme.seed, torch.device("cpu")).double()
    if scheme.axis == "token":
        span = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
        return span.expand_as(x) / scheme.levels
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], scheme.group):
        part = x[:, start : start + scheme.group]
        out[:, start : start + scheme.group] = (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)).expand_as(
            part
        ) / scheme.levels
    return out


def check_round_trip(name: str, side: Side, device: torch.device, *, definition: bool = False) -> None:
    scheme = SCHEMES[name]
    layout = SideLayout(scheme, side.tokens, side.heads, side.width)
    buffer, packed = packed_buffer(layout, 2, device)
    before = [cache.clone() for cache in side.caches]
    (pack_pages_torch if definition else pack_pages)(side.pages, side.slots, scheme, packed)
    assert all(torch.equal(a, b) for a, b in zip(before, side.caches, strict=True)), "packing wrote to the pages"
    outside = buffer.clone()
    outside.as_strided(packed.shape, packed.stride(), RED).fill_(0xFF)
    assert bool((outside == 0xFF).all()), "packing wrote outside of the packed side"
    assert bool(scales_are_finite(packed, layout))

    caches, pages = side.wiped()
    (unpack_pages_torch if definition else unpack_pages)(pages, side.slots, scheme, packed)
    x, live = side.rows(), side.slots.cpu() >= 0
    for layer, cache in enumerate(caches):
        assert bool(cache[..., : side.width].isnan().all()), "unpacking wrote beside its side"
        flat = cache[..., side.width :].cpu().double().transpose(1, 2).flatten(0, 1)
        got = flat[side.slots.cpu()[live]]
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[side.slots.cpu()[live]] = False
        assert bool(flat[untouched].isnan().all()), "unpacking wrote to another token"
        error = (got - x[layer, live]).abs()
        rounding = x[layer, live].abs() * ULP[side.dtype] + 1e-6
        if scheme.fp8:
            top = x[layer, live].abs().amax(-1, keepdim=True)
            bound = x[layer, live].abs() * (0.0625 + 2.0**-9) + top / FP8_MAX * 2.0**-9
            assert bool((error <= bound + rounding).all())
        elif scheme.rotate:
            # An orthonormal rotation keeps the norm of the error: at most half a step a channel. tf32 adds 2^-10.
            step = steps_of(x, scheme)[layer, live]
            norm = (step.square().sum(-1).sqrt() * 0.52) + x[layer, live].norm(dim=-1) * (2.0**-9 + ULP[side.dtype])
            assert bool((error.norm(dim=-1) <= norm).all())
        else:
            step = steps_of(x, scheme)[layer, live]
            widened = x[layer].abs().amax() * 2.0**-9 / scheme.levels
            assert bool((error <= 0.505 * (step + widened) + rounding).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_what_comes_back_is_within_half_a_step(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check_round_trip(name, Side(dtype, device), device)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_definition_keeps_that_bound_too(name: str, device: torch.device) -> None:
    check_round_trip(name, Side(torch.bfloat16, device), device, definition=True)


@pytest.mark.parametrize(
    ("tokens", "heads", "width"), [(1, 1, 32), (63, 2, 24), (129, 1, 80), (16, 2, 7), (70, 1, 320)]
)
@pytest.mark.parametrize("name", SCHEMES)
def test_ragged_sizes(name: str, tokens: int, heads: int, width: int, device: torch.device) -> None:
    if SCHEMES[name].rotate and width > 256:
        pytest.skip("the kernel cannot rotate them")
    check_round_trip(name, Side(torch.float32, device, heads, width, tokens), device)


@pytest.mark.parametrize("name", SCHEMES)
def test_skipped_slots_count_for_nothing(name: str, device: torch.device) -> None:
    side = Side(torch.float32, device, tokens=41)
    skipped = torch.arange(0, 41, 3)
    for cache in side.caches:  # what skipped slots name must not be read
        flat = cache.transpose(1, 2).flatten(0, 1)
        assert flat.data_ptr() != cache.data_ptr()  # a copy: write through the cache itself
        for slot in side.slots[skipped.to(device)].tolist():
            cache[slot // 16, :, slot % 16] = 1e30
    side.slots[skipped.to(device)] = -7
    check_round_trip(name, side, device)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_kernel_packs_what_its_definition_packs(name: str, device: torch.device) -> None:
    side, scheme = Side(torch.bfloat16, device, tokens=72), SCHEMES[name]
    layout = SideLayout(scheme, side.tokens, side.heads, side.width)
    both = [packed_buffer(layout, 2, device)[1] for _ in range(2)]
    pack_pages(side.pages, side.slots, scheme, both[0])
    pack_pages_torch(side.pages, side.slots, scheme, both[1])
    scales = [layout.scales(packed).cpu().float() for packed in both]
    torch.testing.assert_close(scales[0], scales[1], rtol=2e-3, atol=1e-4)
    different = (both[0] != both[1])[:, : layout.scales_start].float().mean()
    # Ties may round either way where sums are taken in another order (and in tf32, on a GPU).
    assert different < (0.1 if scheme.rotate else 0.01)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_cannot_be_packed_is_told(name: str, bad: float, device: torch.device) -> None:
    side, scheme = Side(torch.float32, device, tokens=24), SCHEMES[name]
    slot = int(side.slots[5])
    side.caches[1][slot // 16, 1, slot % 16, side.width + 3] = bad
    layout = SideLayout(scheme, side.tokens, side.heads, side.width)
    _, packed = packed_buffer(layout, 2, device)
    pack_pages(side.pages, side.slots, scheme, packed)
    assert not bool(scales_are_finite(packed, layout))


@pytest.mark.parametrize("definition", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_largest_fp16_comes_back_finite(name: str, definition: bool, device: torch.device) -> None:
    side, scheme = Side(torch.float16, device), SCHEMES[name]
    for cache in side.caches:
        cache[:, :, ::3] = 65504.0
    if scheme.rotate:  # one coefficient is beyond fp16
        signs = rotation(side.width, scheme.seed, torch.device("cpu"))[:, 0].sign()
        for cache in side.caches:
            cache[:, :, ::3] = (20000 * signs.repeat(2)).to(torch.float16).to(device)
            cache[:, :, 1::3] = 0
    layout = SideLayout(scheme, side.tokens, side.heads, side.width)
    _, packed = packed_buffer(layout, 2, device)
    (pack_pages_torch if definition else pack_pages)(side.pages, side.slots, scheme, packed)
    assert bool(scales_are_finite(packed, layout))
    (unpack_pages_torch if definition else unpack_pages)(side.pages, side.slots, scheme, packed)
    assert all(bool(cache.isfinite().all()) for cache in side.caches)


def test_a_range_of_layers(device: torch.device) -> None:
    side, scheme = Side(torch.float16, device), SCHEMES["int4_channel"]
    layout = SideLayout(scheme, side.tokens, side.heads, side.width)
    _, whole = packed_buffer(layout, 2, device)
    _, second = packed_buffer(layout, 1, device)
    pack_pages(side.pages, side.slots, scheme, whole)
    pack_pages(side.pages, side.slots, scheme, second, first_layer=1)
    assert torch.equal(whole[1], second[0])
    caches, pages = side.wiped()
    unpack_pages(pages, side.slots, scheme, second, first_layer=1)
    assert bool(caches[0].isnan().all())
    assert not bool(caches[1].isnan().all())


@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_is_nothing(name: str, device: torch.device) -> None:
    side, scheme = Side(torch.float32, device), SCHEMES[name]
    layout = SideLayout(scheme, 0, side.heads, side.width)
    none = torch.empty(0, dtype=torch.int64, device=device)
    _, packed = packed_buffer(layout, 2, device)
    pack_pages(side.pages, none, scheme, packed)
    unpack_pages(side.pages, none, scheme, packed)


def test_constant_and_zero_rows_are_exact(device: torch.device) -> None:
    for value in (0.0, 2.5):
        side = Side(torch.float32, device, tokens=16)
        for cache in side.caches:
            cache.fill_(value)
        for name, scheme in SCHEMES.items():
            if scheme.rotate:
                continue  # a constant is not constant once rotated
            layout = SideLayout(scheme, 16, side.heads, side.width)
            _, packed = packed_buffer(layout, 2, device)
            pack_pages(side.pages, side.slots, scheme, packed)
            caches, pages = side.wiped()
            unpack_pages(pages, side.slots, scheme, packed)
            flat = caches[0][..., side.width :].transpose(1, 2).flatten(0, 1)[side.slots]
            assert bool(((flat - value).abs() <= value * 0.002).all()), name


def test_bits_an_element() -> None:
    """What the README says of the codecs: bits an element at head size 64, scales included, for 64 tokens."""
    want = {"fp8": 8.25, "int8": 8.5, "int4_token": 4.5, "int4_channel": 5.0, "rotated3": 3.5, "int2_token": 2.5}
    for name, bits in want.items():
        layout = SideLayout(SCHEMES[name], 64, 3, 64)
        assert layout.nbytes * 8 / (64 * 3 * 64) == pytest.approx(bits, abs=0.01)


def test_wrong_arguments_are_explained(device: torch.device) -> None:
    side, scheme = Side(torch.float32, device, tokens=16), SCHEMES["int4_token"]
    layout = SideLayout(scheme, 16, side.heads, side.width)
    _, packed = packed_buffer(layout, 2, device)
    integers = PagedLayers([torch.zeros(4, 2, 16, 8, dtype=torch.int32, device=device)])
    with pytest.raises(KernelArgumentError, match="bfloat16, float16 and float32"):
        pack_pages(integers, side.slots, scheme, packed)
    with pytest.raises(KernelArgumentError, match="dense int64"):
        pack_pages(side.pages, side.slots.int(), scheme, packed)
    with pytest.raises(KernelArgumentError, match=f"uint8 \\[layers, {layout.nbytes}\\]"):
        pack_pages(side.pages, side.slots, scheme, packed[:, :-1])
    with pytest.raises(KernelArgumentError, match="first_layer=1; there are 2"):
        unpack_pages(side.pages, side.slots, scheme, packed, first_layer=1)
    buffer = torch.zeros(2 * layout.nbytes + 16, dtype=torch.uint8, device=device)
    with pytest.raises(KernelArgumentError, match="multiple of 16"):
        unpack_pages(side.pages, side.slots, scheme, buffer[1 : 2 * layout.nbytes + 1].view(2, -1))
    with pytest.raises(KernelArgumentError, match="2, 3, 4 or 8"):
        Scheme(5)
    with pytest.raises(KernelArgumentError, match="'token' or 'channel'"):
        Scheme(4, "row")
    with pytest.raises(KernelArgumentError, match="power of two"):
        Scheme(4, "channel", group=24)
    with pytest.raises(KernelArgumentError, match="axis='token'"):
        Scheme(4, "channel", rotate=True)


@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 7])
def test_a_rotation_is_orthonormal(width: int) -> None:
    matrix = rotation(width, 3, torch.device("cpu")).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["int4_channel", "rotated2"])
def test_heads_may_lie_gigabytes_apart(name: str) -> None:
    step, scheme = 2**30, SCHEMES[name]
    # 8 GiB of which a few KiB are touched. The layer starts in the middle, so that no overflow can leave it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 9 << 30, flags=flags), dtype=torch.float16)
    layer = memory.as_strided((1, 3, 16, 16), (16 * 16, step, 16, 1), 2 * step)
    layer.copy_(torch.randn(1, 3, 16, 16))
    true, pages = layer.clone(), PagedLayers([layer])
    packed = torch.zeros(1, SideLayout(scheme, 16, 3, 16).nbytes, dtype=torch.uint8)
    pack_pages(pages, torch.arange(16), scheme, packed)
    layer.zero_()
    unpack_pages(pages, torch.arange(16), scheme, packed)
    assert float((layer - true).float().norm() / true.float().norm()) < 0.5
