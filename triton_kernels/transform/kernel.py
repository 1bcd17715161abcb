"""The kernels of ops.py, which defines what they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.kernels.launch import device_function, lazy_jit
from lmcache.kernels.quantise.packing import slot_rows, to_pages

if TYPE_CHECKING:
    import triton.language as tl


@device_function
def _power(exponent: tl.tensor) -> tl.tensor:
    """2^exponent, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@device_function
def _bits(ratio: tl.tensor) -> tl.tensor:
    """|ratio| as an integer: of the same order, and NaN above infinity."""
    return ratio.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@device_function
def _exponent(most: tl.tensor) -> tl.tensor:
    """(the least e >= 0 with a ratio of these bits <= 2^e, whether that is at most 126); 0 where it is not."""
    sound = most <= 0x7E800000  # 2^126
    return tl.maximum(((tl.where(sound, most, 0) + 0x7FFFFF) >> 23) - 127, 0), sound


@device_function
def _codes(y: tl.tensor, scale: tl.tensor, sound: tl.tensor) -> tl.tensor:
    """round(y * scale) + 128 as uint8; 128 where not sound."""
    # 1.5 * 2^23 + 128: the sum has no room for a fraction, and its last byte is the code.
    return tl.where(sound, (y * scale + 12583040.0).to(tl.int32, bitcast=True), 128).to(tl.uint8)


@device_function
def _dequantise(codes: tl.tensor) -> tl.tensor:
    return (codes.to(tl.int32) - 128).to(tl.float32)


@lazy_jit(do_not_specialize=["first_layer", "num_tokens"])
def _pack_symbols(
    pointers: tl.tensor,  # int64 [L]: address of each layer
    sample: tl.tensor,  # anything of the pages' dtype
    slots: tl.tensor,  # int64 [T]
    codes: tl.tensor,  # uint8 [l, H, T, D]
    exponents: tl.tensor,  # uint8 [l, H, T]
    anchors: tl.tensor,  # uint8 [l, H, A, D]
    anchor_exponents: tl.tensor,  # uint8 [l, H, A]
    mean: tl.tensor,  # fp32 [l, H, D], as bounds, fine, coarse and coarse_bounds
    bounds: tl.tensor,
    matrix: tl.tensor,  # fp32 [l, H, D, D]
    fine: tl.tensor,
    coarse: tl.tensor,
    coarse_bounds: tl.tensor,
    broken: tl.tensor,  # int32 [1]: set to 1 by what has no exponent
    first_layer: tl.tensor,
    num_tokens: tl.tensor,
    block_stride: tl.tensor,  # this and the next two in elements
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,  # N
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DELTA: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide the address of every token's row
    BLOCK_T: tl.constexpr,  # a group of anchors where DELTA; half a program's tokens elsewhere
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,  # channels of a step of the matrix product
) -> None:
    """Program (i, h, j) makes the symbols of a run of tokens of head h of layer first_layer + j.

    Channels beyond D are zeros throughout, so that they need no mask where symbols are made.
    """
    i, h, j = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_D)  # [BLOCK_D], as all parameters
    layer = tl.load(pointers + first_layer + j).to(tl.pointer_type(sample.dtype.element_ty))
    layer += h.to(tl.int64) * head_stride
    head = j * HEADS + h
    inside = c < D
    ratio = 1.0 / (tl.load(bounds + head * D + c, mask=inside, other=1) + 0.499)
    if DELTA:
        token = i * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        rows, live = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        wanted = live[:, None] & inside[None, :]
        x = tl.load(rows[:, None] + c[None, :], mask=wanted, other=0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        middle = tl.load(mean + head * D + c, mask=inside, other=0)
        token = i * BLOCK_T
        row, there = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        known = c < tl.where(there, D, 0)
        first = tl.load(row + c, mask=known, other=0).to(tl.float32)
        step = tl.load(coarse + head * D + c, mask=inside, other=1)
        first = tl.where(known, first - middle, 0.0) * (1.0 / step)
        reach = tl.load(coarse_bounds + head * D + c, mask=inside, other=1) + 0.499
        e, sound = _exponent(tl.max(_bits(first * (1.0 / reach)), 0))
        code = _codes(first, _power(-e), sound)
        at = head * tl.cdiv(num_tokens, BLOCK_T) + i
        tl.store(anchors + at * D + c, code, mask=inside)
        tl.store(anchor_exponents + at, e.to(tl.uint8))
        tl.store(broken, 1, mask=~sound)
        predicted = middle + _dequantise(code) * (_power(e) * step)
        finer = 1.0 / tl.load(fine + head * D + c, mask=inside, other=1)
        # The first token is its anchor.
        wanted = wanted & (tl.arange(0, BLOCK_T) > 0)[:, None]
        y = tl.where(wanted, (x - predicted[None, :]) * finer[None, :], 0.0)
        _store_symbols(y, ratio, codes, exponents, broken, head * num_tokens, i * BLOCK_T, num_tokens, D)
    else:
        # Two tiles, so that weights are loaded once for both. One of 64 rows would take the tensor cores' larger
        # instructions, for which triton 3.7 stores fp32 weights 4 bytes at a time on sm_90, and fails on sm_100.
        token = 2 * i * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        a, live_a = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        token += BLOCK_T
        b, live_b = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        y_a = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        y_b = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            within = k[None, :] < D
            middle = tl.load(mean + head * D + k, mask=k < D, other=0)[None, :]
            weights = matrix + (head * D + k)[:, None] * D + c[None, :]
            weights = tl.load(weights, mask=(k < D)[:, None] & inside[None, :], other=0)
            x = tl.load(a[:, None] + k[None, :], mask=live_a[:, None] & within, other=0).to(tl.float32)
            x = tl.where(live_a[:, None] & within, x - middle, 0.0)  # [BLOCK_T, BLOCK_K]
            y_a = tl.dot(x, weights, y_a, input_precision="tf32")
            x = tl.load(b[:, None] + k[None, :], mask=live_b[:, None] & within, other=0).to(tl.float32)
            x = tl.where(live_b[:, None] & within, x - middle, 0.0)
            y_b = tl.dot(x, weights, y_b, input_precision="tf32")
        _store_symbols(y_a, ratio, codes, exponents, broken, head * num_tokens, 2 * i * BLOCK_T, num_tokens, D)
        _store_symbols(y_b, ratio, codes, exponents, broken, head * num_tokens, (2 * i + 1) * BLOCK_T, num_tokens, D)


@device_function
def _store_symbols(
    y: tl.tensor,  # [BLOCK_T, BLOCK_D]
    ratio: tl.tensor,
    codes: tl.tensor,
    exponents: tl.tensor,
    broken: tl.tensor,
    row: tl.tensor,  # of the head's first token
    first: tl.tensor,  # token of y
    num_tokens: tl.tensor,
    D: tl.constexpr,
) -> None:
    e, sound = _exponent(tl.max(_bits(y * ratio[None, :]), 1))  # [BLOCK_T]
    code = _codes(y, _power(-e)[:, None], sound[:, None])
    c = tl.arange(0, y.shape[1])
    token = first + tl.arange(0, y.shape[0])
    wanted = token < num_tokens
    tl.store(codes + (row + token)[:, None] * D + c[None, :], code, mask=wanted[:, None] & (c < D)[None, :])
    tl.store(exponents + row + token, e.to(tl.uint8), mask=wanted)
    tl.store(broken, 1, mask=tl.min(sound.to(tl.int32), 0) == 0)


@lazy_jit(do_not_specialize=["first_layer", "num_tokens"])
def _unpack_symbols(
    pointers: tl.tensor,  # the arguments of _pack_symbols
    sample: tl.tensor,
    slots: tl.tensor,
    codes: tl.tensor,
    exponents: tl.tensor,
    anchors: tl.tensor,
    anchor_exponents: tl.tensor,
    mean: tl.tensor,
    matrix: tl.tensor,
    fine: tl.tensor,
    coarse: tl.tensor,
    first_layer: tl.tensor,
    num_tokens: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DELTA: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Program (i, h, j) writes a run of tokens of head h of layer first_layer + j."""
    i, h, j = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_D)  # [BLOCK_D], as all parameters
    layer = tl.load(pointers + first_layer + j).to(tl.pointer_type(sample.dtype.element_ty))
    layer += h.to(tl.int64) * head_stride
    head = j * HEADS + h
    inside = c < D
    middle = tl.load(mean + head * D + c, mask=inside, other=0)
    if DELTA:
        token = i * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        a, live_a = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        at_a = head * num_tokens + token
        wanted = live_a[:, None] & inside[None, :]
        y = _dequantise(tl.load(codes + at_a[:, None] * D + c[None, :], mask=wanted, other=128))  # [BLOCK_T, BLOCK_D]
        scale = _power(tl.load(exponents + at_a, mask=live_a, other=0).to(tl.int32))  # [BLOCK_T]
        group = head * tl.cdiv(num_tokens, BLOCK_T) + i
        step = tl.load(coarse + head * D + c, mask=inside, other=1)
        step *= _power(tl.load(anchor_exponents + group).to(tl.int32))
        predicted = middle + _dequantise(tl.load(anchors + group * D + c, mask=inside, other=128)) * step
        width = tl.load(fine + head * D + c, mask=inside, other=1)
        x = y * scale[:, None] * width[None, :] + predicted[None, :]
        tl.store(a[:, None] + c[None, :], to_pages(x, sample.dtype.element_ty), mask=wanted)
    else:
        token = 2 * i * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        a, live_a = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        at_a = head * num_tokens + token
        token += BLOCK_T
        b, live_b = slot_rows(layer, slots, token, num_tokens, block_stride, token_stride, BLOCK_TOKENS, ALIGN)
        at_b = head * num_tokens + token
        x_a = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        x_b = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            within = k[None, :] < D
            weights = matrix + (head * D + k)[:, None] * D + c[None, :]
            weights = tl.load(weights, mask=(k < D)[:, None] & inside[None, :], other=0)
            y = tl.load(codes + at_a[:, None] * D + k[None, :], mask=live_a[:, None] & within, other=128)
            x_a = tl.dot(_dequantise(y), weights, x_a, input_precision="tf32")
            y = tl.load(codes + at_b[:, None] * D + k[None, :], mask=live_b[:, None] & within, other=128)
            x_b = tl.dot(_dequantise(y), weights, x_b, input_precision="tf32")
        scale = _power(tl.load(exponents + at_a, mask=live_a, other=0).to(tl.int32))  # [BLOCK_T]
        x_a = to_pages(x_a * scale[:, None] + middle[None, :], sample.dtype.element_ty)
        tl.store(a[:, None] + c[None, :], x_a, mask=live_a[:, None] & inside[None, :])
        scale = _power(tl.load(exponents + at_b, mask=live_b, other=0).to(tl.int32))
        x_b = to_pages(x_b * scale[:, None] + middle[None, :], sample.dtype.element_ty)
        tl.store(b[:, None] + c[None, :], x_b, mask=live_b[:, None] & inside[None, :])
