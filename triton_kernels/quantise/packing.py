"""Quantise KV (int8, int4, int2, fp8) while it is copied out of the pages, and back: it crosses memory once.

One *side* (the keys, or the values) of each layer is packed by a `Scheme`. A head's `x [T, D]` becomes codes of
`bits` bits and fp16 scales, by `x ~ zero + scale * code` (or `scale * e4m3`), over one of two axes:

    axis="channel"   a scale and a zero for each channel of a group of tokens: keys, whose channels have offsets (KIVI,
                     Liu et al. 2024, arXiv:2402.02750)
    axis="token"     for each token and head: values; with `rotate`, after a randomised Hadamard rotation of the head
                     (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; TurboQuant, Zandieh et al. 2025, arXiv:2504.19874)

A packed side `[l, side_bytes]`, each layer one run of bytes, T8 = T rounded up to 8 tokens:

    codes   8 bits: [H, T8, D] bytes.  2, 3, 4 bits: [H, T8 / 8, D] words of 8 codes, code j of word r is token 8 r + j;
            3-bit words are a plane of their low 16 bits, then a plane of their high 8
    scales  fp16: axis "token" [H, T8] scales, then [H, T8] zeros; "channel" [H, groups, D] scales, then as many zeros
            (fp8 has no zeros); starts at a multiple of 16 bytes

What is not finite, or too large for an fp16 scale, leaves a scale that is not finite: `scales_are_finite` finds it, and
such a chunk must not be used. A negative slot is skipped: on packing it counts for no scale, on unpacking nothing is
written.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.copy.pages import check_ids, check_layers, gather_tokens, scatter_tokens
from lmcache.kernels.launch import LazyKernel, device_function, lazy_jit, runs_kernel
from lmcache.kernels.layers import PagedLayers
from lmcache.kernels.quantise.scheme import FLOATS, FP8_MAX, SLACK, Scheme, SideLayout, rotation, rotation_signs

if TYPE_CHECKING:
    import triton.language as tl


def pack_pages(
    pages: PagedLayers, slots: torch.Tensor, scheme: Scheme, out: torch.Tensor, first_layer: int = 0
) -> None:
    """Quantise the tokens at `slots` of layers first_layer.. into `out`.

    `pages`: one side, views `[B, H, N, D]` of bf16, fp16 or fp32. `slots`: int64 `[T]`; slot s is token s % N of block
    s // N. `out`: uint8 `[l, SideLayout.nbytes]`, a layer one run of bytes at a multiple of 16. Nothing is
    synchronised. Raises KernelArgumentError for anything else.
    """
    layout = _check(pages, slots, scheme, out, first_layer, "out")
    if slots.numel() == 0 or out.shape[0] == 0:
        return
    if runs_kernel(pages.device):
        _launch(_pack_tile, pages, slots, layout, out, first_layer)
    else:
        pack_pages_torch(pages, slots, scheme, out, first_layer)


def unpack_pages(
    pages: PagedLayers, slots: torch.Tensor, scheme: Scheme, packed: torch.Tensor, first_layer: int = 0
) -> None:
    """The reverse of pack_pages: write token t of `packed` to `slots[t]`, rounded to the dtype of the pages."""
    layout = _check(pages, slots, scheme, packed, first_layer, "packed")
    if slots.numel() == 0 or packed.shape[0] == 0:
        return
    if runs_kernel(pages.device):
        _launch(_unpack_tile, pages, slots, layout, packed, first_layer)
    else:
        unpack_pages_torch(pages, slots, scheme, packed, first_layer)


def pack_pages_torch(
    pages: PagedLayers, slots: torch.Tensor, scheme: Scheme, out: torch.Tensor, first_layer: int = 0
) -> None:
    """The definition of pack_pages in torch."""
    layout = SideLayout(scheme, len(slots), pages.heads, pages.content)
    x = torch.zeros(len(out), len(slots), pages.heads, pages.content, dtype=pages.dtype, device=pages.device)
    gather_tokens(pages, slots, x, first_layer)
    x = _pad_to_words(x.float().transpose(1, 2))  # [l, H, T8, D]
    live = _pad_to_words((slots >= 0)[None, None, :, None])  # [1, 1, T8, 1]
    if scheme.rotate:
        x = x @ rotation(pages.content, scheme.seed, pages.device)
    if scheme.fp8:
        scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX * (1 + SLACK)).half().float()
        codes = _divide(x, scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        scales = [scale]
    else:
        low, high = _ranges(x, live, scheme)
        zero = (low - low.abs() * SLACK).half().float()
        scale = ((high - zero) / scheme.levels * (1 + SLACK)).half().float()
        per_token = [_spread(part, scheme, x.shape[2]) for part in (scale, zero)]
        codes = (_divide(x - per_token[1], per_token[0]) + 0.5).clamp(0, scheme.levels)
        codes = torch.where(live, codes, 0).to(torch.uint8)
        scales = [scale, zero]
    packed = _join_codes(codes, scheme.bits)
    out[:, : packed.shape[1]] = packed
    layout.scales(out).copy_(torch.cat([part.flatten(1) for part in scales], 1))


def unpack_pages_torch(
    pages: PagedLayers, slots: torch.Tensor, scheme: Scheme, packed: torch.Tensor, first_layer: int = 0
) -> None:
    """The definition of unpack_pages in torch."""
    layout = SideLayout(scheme, len(slots), pages.heads, pages.content)
    num_layers, heads = packed.shape[0], layout.heads
    codes = _split_codes(packed, layout)  # [l, H, T8, D]
    scales = layout.scales(packed).float().view(num_layers, -1, heads, layout.scale_rows).unbind(1)
    width = 1 if scheme.axis == "token" else layout.width
    parts = [_spread(part.view(num_layers, heads, -1, width), scheme, layout.rows * 8) for part in scales]
    x = codes.view(torch.float8_e4m3fn).float() * parts[0] if scheme.fp8 else parts[1] + codes.float() * parts[0]
    if scheme.rotate:
        x = x @ rotation(pages.content, scheme.seed, pages.device).T
    rows = to_pages_torch(x.transpose(1, 2)[:, : len(slots)], pages.dtype).contiguous()
    scatter_tokens(pages, slots, rows, first_layer)


def to_pages_torch(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` rounded to the dtype of the pages. Half a step beyond the largest fp16 must not become infinity."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def _pad_to_words(x: torch.Tensor) -> torch.Tensor:
    """Zeros behind dimension 2 up to a multiple of 8."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % 8))


def _ranges(x: torch.Tensor, live: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest value of each scale's elements: `[l, H, T8, 1]`, or `[l, H, groups, D]`."""
    if scheme.axis == "token":
        low, high = x.aminmax(dim=-1, keepdim=True)
        return low, high
    pad = (0, 0, 0, -x.shape[2] % scheme.group)
    shape = (*x.shape[:2], -1, scheme.group, x.shape[3])
    low = torch.nn.functional.pad(x.masked_fill(~live, math.inf), pad, value=math.inf).reshape(shape).amin(3)
    high = torch.nn.functional.pad(x.masked_fill(~live, -math.inf), pad, value=-math.inf).reshape(shape).amax(3)
    empty = low > high
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _spread(part: torch.Tensor, scheme: Scheme, tokens: int) -> torch.Tensor:
    """Scales as they apply to tokens: `[l, H, tokens, 1 or D]`."""
    if scheme.axis == "token":
        return part
    return part.repeat_interleave(scheme.group, 2)[:, :, :tokens]


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.where(scale > 0, 1 / scale, 0)


def _join_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 `[l, H, T8, D]` -> bytes `[l, H * T8 * D * bits / 8]`."""
    if bits == 8:
        return codes.flatten(1)
    words = codes.view(*codes.shape[:2], -1, 8, codes.shape[3]).int()  # [l, H, T8 / 8, 8, D]
    word: torch.Tensor = functools.reduce(torch.bitwise_or, (words[:, :, :, j] << (bits * j) for j in range(8)))
    if bits == 4:
        return word.contiguous().view(torch.uint8).flatten(1)
    low = word.to(torch.int16).contiguous().view(torch.uint8).flatten(1)
    return low if bits == 2 else torch.cat([low, (word >> 16).to(torch.uint8).flatten(1)], 1)


def _split_codes(packed: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """The reverse: uint8 `[l, H, T8, D]`."""
    bits, shape = layout.scheme.bits, (len(packed), layout.heads, layout.rows, layout.width)
    count = layout.heads * layout.rows * layout.width
    if bits == 8:
        return packed[:, : 8 * count].view(shape[0], shape[1], -1, shape[3])
    if bits == 4:
        word = packed[:, : 4 * count].view(torch.int32).view(shape)
    else:
        word = packed[:, : 2 * count].view(torch.int16).view(shape).int()
        if bits == 3:
            word = (word & 0xFFFF) | (packed[:, 2 * count : 3 * count].view(shape).int() << 16)
    shifts = bits * torch.arange(8, dtype=torch.int32, device=packed.device)
    codes = (word[:, :, :, None] >> shifts[:, None]) & layout.scheme.levels  # [l, H, T8 / 8, 8, D]
    return codes.to(torch.uint8).flatten(2, 3)


@lazy_jit(do_not_specialize=["first_layer", "num_tokens", "num_scales"])
def _pack_tile(
    pointers: tl.tensor,  # int64 [L]: address of each layer
    sample: tl.tensor,  # anything of the pages' dtype
    slots: tl.tensor,  # int64 [T]
    packed: tl.tensor,  # uint8 [l, packed_stride]
    matrix: tl.tensor,  # [D, D] of -1, 0, 1 in the pages' dtype: the rotation, but for its factor
    first_layer: tl.tensor,
    num_tokens: tl.tensor,
    num_scales: tl.tensor,  # a head
    block_stride: tl.tensor,  # this and the next two in elements
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    packed_stride: tl.tensor,  # this and the next in bytes
    scales_start: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,  # N
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROTATE: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide the address of every token's row
    FACTOR: tl.constexpr,
    UNROLL: tl.constexpr,  # of the eight tokens of a word
    BLOCK_R: tl.constexpr,  # words of eight tokens a program; a group of tokens where CHANNEL
    BLOCK_D: tl.constexpr,
) -> None:
    """Program (i, h, j) packs tokens i * 8 * BLOCK_R .. of head h of layer first_layer + j."""
    i, h, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    r = i * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    rows = (num_tokens + 7) // 8
    layer = tl.load(pointers + first_layer + j).to(tl.pointer_type(sample.dtype.element_ty)) + h * head_stride
    base = packed + j * packed_stride
    scales = (base + scales_start).to(tl.pointer_type(tl.float16))
    levels: tl.constexpr = 448 if FP8 else (1 << BITS) - 1
    inside = c[None, :] < D
    wanted = (r[:, None] < rows) & inside  # [BLOCK_R, BLOCK_D]

    if CHANNEL:
        lows = tl.full([BLOCK_R, BLOCK_D], float("inf"), tl.float32)
        highs = tl.full([BLOCK_R, BLOCK_D], float("-inf"), tl.float32)
        broken = tl.zeros([BLOCK_R, BLOCK_D], tl.int32)
        for k in tl.static_range(8):
            token = r * 8 + k
            row, there = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
            live = there[:, None] & inside
            x = tl.load(row[:, None] + c[None, :], mask=live, other=0).to(tl.float32)
            lows = tl.minimum(lows, tl.where(live, x, float("inf")))
            highs = tl.maximum(highs, tl.where(live, x, float("-inf")))
            broken |= (x != x).to(tl.int32)
        low, high = tl.min(lows, 0), tl.max(highs, 0)  # [BLOCK_D]
        empty = low > high
        low, high = tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)
        scale, zero = _scales(low, high, tl.max(broken, 0), levels)  # [BLOCK_D]
        at = (h * tl.cdiv(num_tokens, 8 * BLOCK_R) + i) * D + c
        tl.store(scales + at, scale, mask=c < D)
        tl.store(scales + HEADS * num_scales + at, zero, mask=c < D)
        zeros, inverse = zero.to(tl.float32)[None, :], _inverse(scale)[None, :]  # [1, BLOCK_D]
    if ROTATE:
        weights = tl.load(matrix + c[:, None] * D + c[None, :], mask=(c[:, None] < D) & inside, other=0)

    word = tl.zeros([BLOCK_R, BLOCK_D], tl.int32)
    for k in tl.range(8, loop_unroll_factor=UNROLL):
        token = r * 8 + k
        row, there = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        live = there[:, None] & inside
        x = tl.load(row[:, None] + c[None, :], mask=live, other=0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
        if ROTATE:
            # The tile and the signs are exact in the pages' dtype, so tensor cores lose nothing but in tf32.
            x = tl.dot(x.to(sample.dtype.element_ty), weights, input_precision="tf32") * FACTOR
        if not CHANNEL:
            broken = tl.max((x != x).to(tl.int32), 1)  # [BLOCK_R]
            at = h * num_scales + token
            if FP8:
                low, high = tl.zeros([BLOCK_R], tl.float32), tl.max(tl.abs(x), 1)
            else:
                low = tl.min(tl.where(inside, x, float("inf")), 1)
                high = tl.max(tl.where(inside, x, float("-inf")), 1)
            scale, zero = _scales(low, high, broken, levels)
            tl.store(scales + at, scale, mask=r < rows)
            if not FP8:
                tl.store(scales + HEADS * num_scales + at, zero, mask=r < rows)
            zeros, inverse = zero.to(tl.float32)[:, None], _inverse(scale)[:, None]  # [BLOCK_R, 1]
        if FP8:
            code = _to_e4m3(x * inverse)
        else:
            y = tl.minimum(tl.maximum((x - zeros) * inverse + 0.5, 0.0), levels)
            code = tl.where(live, y.to(tl.int32), 0)
        if BITS == 8:
            at_codes = base + (h * rows * 8 + token)[:, None] * D + c[None, :]
            tl.store(at_codes, code.to(tl.uint8), mask=wanted)
        else:
            word |= code << (BITS * k)
    if BITS != 8:
        at_words = (h * rows + r)[:, None] * D + c[None, :]
        if BITS == 4:
            tl.store(base.to(tl.pointer_type(tl.int32)) + at_words, word, mask=wanted)
        else:
            tl.store(base.to(tl.pointer_type(tl.int16)) + at_words, word.to(tl.int16), mask=wanted)
        if BITS == 3:
            tl.store(base + HEADS * rows * D * 2 + at_words, (word >> 16).to(tl.uint8), mask=wanted)


@lazy_jit(do_not_specialize=["first_layer", "num_tokens", "num_scales"])
def _unpack_tile(
    pointers: tl.tensor,  # the arguments of _pack_tile
    sample: tl.tensor,
    slots: tl.tensor,
    packed: tl.tensor,
    matrix: tl.tensor,
    first_layer: tl.tensor,
    num_tokens: tl.tensor,
    num_scales: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    packed_stride: tl.tensor,
    scales_start: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    CHANNEL: tl.constexpr,
    ROTATE: tl.constexpr,
    ALIGN: tl.constexpr,
    FACTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Program (i, h, j) unpacks tokens i * 8 * BLOCK_R .. of head h of layer first_layer + j."""
    i, h, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    r = i * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    rows = (num_tokens + 7) // 8
    layer = tl.load(pointers + first_layer + j).to(tl.pointer_type(sample.dtype.element_ty)) + h * head_stride
    base = packed + j * packed_stride
    scales = (base + scales_start).to(tl.pointer_type(tl.float16))
    levels: tl.constexpr = (1 << BITS) - 1
    inside = c[None, :] < D
    wanted = (r[:, None] < rows) & inside

    at_words = (h * rows + r)[:, None] * D + c[None, :]  # [BLOCK_R, BLOCK_D]
    if BITS == 4:
        word = tl.load(base.to(tl.pointer_type(tl.int32)) + at_words, mask=wanted, other=0)
    elif BITS != 8:
        word = tl.load(base.to(tl.pointer_type(tl.int16)) + at_words, mask=wanted, other=0).to(tl.int32)
    if BITS == 3:
        top = tl.load(base + HEADS * rows * D * 2 + at_words, mask=wanted, other=0).to(tl.int32)
        word = (word & 0xFFFF) | (top << 16)
    if CHANNEL:
        at = (h * tl.cdiv(num_tokens, 8 * BLOCK_R) + i) * D + c
        step = tl.load(scales + at, mask=c < D, other=0).to(tl.float32)[None, :]
        zeros = tl.load(scales + HEADS * num_scales + at, mask=c < D, other=0).to(tl.float32)[None, :]
    if ROTATE:
        weights = tl.load(matrix + c[None, :] * D + c[:, None], mask=(c[:, None] < D) & inside, other=0)

    for k in tl.range(8, loop_unroll_factor=UNROLL):
        token = r * 8 + k
        if not CHANNEL:
            at = h * num_scales + token
            step = tl.load(scales + at, mask=r < rows, other=0).to(tl.float32)[:, None]
            if not FP8:
                zeros = tl.load(scales + HEADS * num_scales + at, mask=r < rows, other=0).to(tl.float32)[:, None]
        if BITS == 8:
            at_codes = base + (h * rows * 8 + token)[:, None] * D + c[None, :]
            code = tl.load(at_codes, mask=wanted, other=0).to(tl.int32)
        else:
            code = (word >> (BITS * k)) & levels
        x = _from_e4m3(code) * step if FP8 else zeros + code.to(tl.float32) * step
        if ROTATE:
            # Rounding to the pages' dtype before the rotation, not only behind it, costs a fraction of a step.
            x = to_pages(tl.where(inside, x * FACTOR, 0.0), sample.dtype.element_ty)
            x = tl.dot(x, weights, input_precision="tf32")
        row, there = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        x = to_pages(x, sample.dtype.element_ty)
        tl.store(row[:, None] + c[None, :], x, mask=there[:, None] & inside)


@device_function
def slot_rows(
    layer: tl.tensor,
    slots: tl.tensor,
    token: tl.tensor,
    num_tokens: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tl.tensor:
    """(start of each token's row, whether there is one)"""
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    rows = layer + slot // BLOCK_TOKENS * block_stride + slot % BLOCK_TOKENS * token_stride
    return tl.multiple_of(rows, ALIGN), slot >= 0


@device_function
def _scales(low: tl.tensor, high: tl.tensor, broken: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """(scale, zero) of what lies between low and high, as fp16; the scale is NaN where something was NaN (`broken`)."""
    slack: tl.constexpr = 1.0 / 1024
    zero = (low - tl.abs(low) * slack).to(tl.float16)
    span = (high - zero.to(tl.float32)) * (1.0 / LEVELS) * (1 + slack)
    return tl.where(broken > 0, float("nan"), span).to(tl.float16), zero


@device_function
def _inverse(scale: tl.tensor) -> tl.tensor:
    step = scale.to(tl.float32)
    return tl.where(step > 0, 1.0 / step, 0.0)


@device_function
def to_pages(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 rounded to the dtype of the pages. Half a step beyond the largest fp16 must not become infinity."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@device_function
def _to_e4m3(x: tl.tensor) -> tl.tensor:
    """fp32 -> the bits of fp8 e4m3fn, saturating, to nearest even, in integers: sm_80 and gfx942 have no such type."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # the exponent's bias goes from 127 to 7: 120 << 3
    # Below 2^-6 the codes count units of 2^-9, which are the last bit of a float of 2^14.
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, small, normal)
    return tl.where(x < 0, code | 0x80, code)


@device_function
def _from_e4m3(code: tl.tensor) -> tl.tensor:
    """The reverse; exact. Codes 0x7F and 0xFF, NaN in e4m3fn, are never written."""
    low = code & 0x7F
    normal = ((low << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(low < 8, low.to(tl.float32) * 0.001953125, normal)
    return tl.where(code >= 0x80, -magnitude, magnitude)


def _launch(
    kernel: LazyKernel, pages: PagedLayers, slots: torch.Tensor, layout: SideLayout, packed: torch.Tensor, first: int
) -> None:
    scheme, layer = layout.scheme, pages.layers[0]
    block_d = 1 << (layout.width - 1).bit_length()
    if scheme.axis == "channel":
        block_r = scheme.group // 8
    else:
        block_r = max(16, _TILE // block_d)  # at least 16 rows for tl.dot
        block_r = min(block_r, 1 << max(4, (layout.rows - 1).bit_length()))
        if not scheme.rotate:
            block_r = min(block_r, max(1, _WIDEST_TILE // block_d))
    if scheme.rotate:
        if block_d > _WIDEST_ROTATION:
            raise KernelArgumentError(
                f"heads of {layout.width} elements; the kernel can rotate those of at most {_WIDEST_ROTATION}"
            )
        block_d = max(16, block_d)
        matrix, factor = rotation_signs(layout.width, scheme.seed, pages.device, pages.dtype)
    else:
        matrix, factor = slots, 1.0  # not read
    strides = [step * layer.element_size() for step in layer.stride()[:3]]
    kernel.launch(
        (-(-layout.rows // block_r), layout.heads, len(packed)),
        pages.device,
        pages.pointers,
        layer,
        slots,
        packed,
        matrix,
        first,
        layout.tokens,
        layout.scale_rows,
        *layer.stride()[:3],
        packed.stride(0),
        layout.scales_start,
        BLOCK_TOKENS=pages.block_tokens,
        HEADS=layout.heads,
        D=layout.width,
        BITS=scheme.bits,
        FP8=scheme.fp8,
        CHANNEL=scheme.axis == "channel",
        ROTATE=scheme.rotate,
        ALIGN=math.gcd(16, pages.address_gcd, *strides),
        FACTOR=factor,
        # The rotation's weights fill the registers of one token's turn already.
        UNROLL=1 if scheme.rotate else 8,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=max(1, min(4, block_r * block_d // 256)),
    )


# 1,024 elements a tile: 16 bytes of bf16 a thread of 4 warps, eight such loads a program.
_TILE = 1024
# More elements than that, and what a thread holds of the eight tokens is spilled.
_WIDEST_TILE = 2048
# A program holds all of the rotation in shared memory.
_WIDEST_ROTATION = 256


def _check(
    pages: PagedLayers, slots: torch.Tensor, scheme: Scheme, packed: torch.Tensor, first_layer: int, what: str
) -> SideLayout:
    if pages.dtype not in FLOATS:
        raise KernelArgumentError(f"pages are {pages.dtype}; quantised are bfloat16, float16 and float32")
    check_ids(pages, pages.token_units, slots, "slots")
    layout = SideLayout(scheme, len(slots), pages.heads, pages.content)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != layout.nbytes:
        raise KernelArgumentError(
            f"{what} is {packed.dtype} of shape {tuple(packed.shape)}; it must be uint8 [layers, {layout.nbytes}]"
        )
    if packed.device != pages.device:
        raise KernelArgumentError(f"{what} is on {packed.device}; it must be on {pages.device}, as the pages are")
    if packed.numel() and (packed.stride(1) != 1 or packed.stride(0) % 16 or packed.data_ptr() % 16):
        raise KernelArgumentError(
            f"{what} has strides {packed.stride()}, address {packed.data_ptr():#x}; each layer must be one run of "
            "bytes at a multiple of 16"
        )
    check_layers(pages, first_layer, len(packed), what)
    return layout
