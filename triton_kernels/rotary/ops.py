"""Move keys that a rotary position embedding has turned from the positions they had to those they get.

A key is turned by angle(p) at position p, pair by pair; moved to q it is turned by angle(q) - angle(p) more:

    c = cos q cos p + sin q sin p        low'  = c low - s high
    s = sin q cos p - cos q sin p        high' = s low + c high

where low and high are elements i and R / 2 + i of the R that turn (GPT-NeoX), or 2 i and 2 i + 1 (GPT-J, interleaved).
This is re-rotation as in CacheBlend (Yao et al. 2024, arXiv:2405.16444): no error but that of one rounding to the keys'
dtype, as everything is calculated in fp32 from fp32 tables. A factor on all keys (YaRN's) cancels and is kept as it is.

    content [C]   |0 .. rotary_start: copied|R elements: turned|the rest (other dimensions, values): copied|

Guarantees: a token whose old and new positions are equal keeps its bits (cos^2 + sin^2 is not quite 1 in fp32, so this
takes a case of its own); so does all that is copied, NaNs included. A token with a negative position is
skipped: its part of the destination keeps what it held. Positions that a table does not have are refused on a CPU; on a
GPU, where looking would stall the stream, keeping them in range is the caller's duty. Nothing is synchronised.

A model with two ropes (Gemma 3) has two tables: call once for each run of layers that share one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.launch import device_function, lazy_jit, runs_kernel
from lmcache.kernels.rotary.tables import RotaryTable

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shift_rotary(
    keys: torch.Tensor,
    old_positions: torch.Tensor,
    new_positions: torch.Tensor,
    table: RotaryTable,
    *,
    interleaved: bool = False,
    rotary_start: int = 0,
    out: torch.Tensor | None = None,
) -> None:
    """Turn `keys[.., t, :, :]` from old_positions[t] to new_positions[t] into `out`, which is `keys` by default.

    `keys`, `out`: bf16, fp16 or fp32 `[L, T, H, D]` or `[T, H, D]`, any strides with D contiguous, the same memory or
    memory that does not overlap. Positions: int64 `[T]`. Elements outside rotary_start ..
    rotary_start + table.width are copied. Raises KernelArgumentError for anything else.
    """
    out = keys if out is None else out
    _check_rows(keys, "keys")
    _check_rows(out, "out")
    if (out.shape, out.dtype, out.device) != (keys.shape, keys.dtype, keys.device):
        raise KernelArgumentError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be as keys, {keys.dtype} "
            f"{tuple(keys.shape)} on {keys.device}"
        )
    _check_turn(table, rotary_start, keys, old_positions, new_positions)
    if keys.numel() == 0:
        return
    if runs_kernel(keys.device):
        layers = (keys, out) if keys.dim() == 4 else (keys[None], out[None])
        _launch(*layers, old_positions, new_positions, table, rotary_start, interleaved)
    else:
        shift_rotary_torch(
            keys, old_positions, new_positions, table, interleaved=interleaved, rotary_start=rotary_start, out=out
        )


def shift_rotary_torch(
    keys: torch.Tensor,
    old_positions: torch.Tensor,
    new_positions: torch.Tensor,
    table: RotaryTable,
    *,
    interleaved: bool = False,
    rotary_start: int = 0,
    out: torch.Tensor | None = None,
) -> None:
    """The definition of shift_rotary in torch."""
    out = keys if out is None else out
    live = (old_positions >= 0) & (new_positions >= 0)
    if out is not keys:
        out.copy_(torch.where(live[:, None, None], keys, out))
    moved = torch.nonzero(live & (old_positions != new_positions)).flatten()
    old = table.cos_sin[old_positions[moved]][:, :, None]  # [moved, 2, 1, R / 2]
    new = table.cos_sin[new_positions[moved]][:, :, None]
    cos = new[:, 0] * old[:, 0] + new[:, 1] * old[:, 1]  # [moved, 1, R / 2]
    sin = new[:, 1] * old[:, 0] - new[:, 0] * old[:, 1]
    part = slice(rotary_start, rotary_start + table.width)
    x = keys[..., moved, :, part].float()  # [.., moved, H, R]
    low, high = halves(x, interleaved)
    pair = (low * cos - high * sin, low * sin + high * cos)
    out[..., moved, :, part] = torch.stack(pair, -1 if interleaved else -2).flatten(-2).to(out.dtype)


def halves(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second elements of all pairs: of `x [.., R]`, two views `[.., R / 2]`."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


@lazy_jit(do_not_specialize=["num_tokens", "num_rows", "rows_each"])
def _shift_rows(
    source: tl.tensor,  # [l, T, H, C]
    target: tl.tensor,  # [l, T, H, C]
    old_positions: tl.tensor,  # int64 [T]
    new_positions: tl.tensor,  # int64 [T]
    table: tl.tensor,  # fp32 [P, 2, HALF]
    num_tokens: tl.tensor,
    num_rows: tl.tensor,  # l * HEADS
    rows_each: tl.tensor,
    source_layer_stride: tl.tensor,  # all strides in elements
    source_token_stride: tl.tensor,
    source_head_stride: tl.tensor,
    layer_stride: tl.tensor,  # of the target, as the next two
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    CONTENT: tl.constexpr,  # C
    START: tl.constexpr,
    HALF: tl.constexpr,  # R / 2
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SOURCE_ALIGN: tl.constexpr,  # bytes that divide the address of each token's head
    TARGET_ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Program (i, k) moves tokens i * BLOCK_T .. of rows (layer, head) k * rows_each ..: the angles are read once."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    old = tl.load(old_positions + t, mask=t < num_tokens, other=-1)
    new = tl.load(new_positions + t, mask=t < num_tokens, other=-1)
    live = (old >= 0) & (new >= 0)

    d = tl.arange(0, BLOCK_D)
    wanted = live[:, None] & (d < HALF)[None, :]  # [BLOCK_T, BLOCK_D]
    old_row = table + old[:, None] * (2 * HALF) + d[None, :]
    new_row = table + new[:, None] * (2 * HALF) + d[None, :]
    old_cos = tl.load(old_row, mask=wanted, other=0)
    old_sin = tl.load(old_row + HALF, mask=wanted, other=0)
    new_cos = tl.load(new_row, mask=wanted, other=0)
    new_sin = tl.load(new_row + HALF, mask=wanted, other=0)
    cos = new_cos * old_cos + new_sin * old_sin
    sin = new_sin * old_cos - new_cos * old_sin
    moved = (old != new)[:, None]  # [BLOCK_T, 1]

    first = tl.program_id(1).to(tl.int64) * rows_each
    for k in range(tl.minimum(rows_each, num_rows - first)):
        row = first + k
        layer, head = row // HEADS, row % HEADS
        read = source + layer * source_layer_stride + head * source_head_stride + t * source_token_stride
        read = tl.multiple_of(read, SOURCE_ALIGN)  # [BLOCK_T]
        write = target + layer * layer_stride + head * head_stride + t * token_stride
        write = tl.multiple_of(write, TARGET_ALIGN)  # [BLOCK_T]
        if INTERLEAVED:
            e = tl.arange(0, 2 * BLOCK_D)
            both = live[:, None] & (e < 2 * HALF)[None, :]  # [BLOCK_T, 2 * BLOCK_D]
            x = tl.load(read[:, None] + (START + e)[None, :], mask=both)
            low, high = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_D, 2]))
            low, high = _rotate(low, high, cos, sin, moved)
            pairs = tl.reshape(tl.join(low, high), [BLOCK_T, 2 * BLOCK_D])
            tl.store(write[:, None] + (START + e)[None, :], pairs, mask=both)
        else:
            low = tl.load(read[:, None] + (START + d)[None, :], mask=wanted)
            high = tl.load(read[:, None] + (START + HALF + d)[None, :], mask=wanted)
            low, high = _rotate(low, high, cos, sin, moved)
            tl.store(write[:, None] + (START + d)[None, :], low, mask=wanted)
            tl.store(write[:, None] + (START + HALF + d)[None, :], high, mask=wanted)
        if not IN_PLACE:
            _copy_columns(read, write, live, 0, START, BLOCK_C)
            _copy_columns(read, write, live, START + 2 * HALF, CONTENT, BLOCK_C)


@device_function
def _rotate(
    low: tl.tensor, high: tl.tensor, cos: tl.tensor, sin: tl.tensor, moved: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """In fp32; what does not move keeps its bits."""
    a, b = low.to(tl.float32), high.to(tl.float32)
    new_low = (a * cos - b * sin).to(low.dtype)
    new_high = (a * sin + b * cos).to(low.dtype)
    return tl.where(moved, new_low, low), tl.where(moved, new_high, high)


@device_function
def _copy_columns(
    read: tl.tensor, write: tl.tensor, live: tl.tensor, BEGIN: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    for begin in tl.static_range(BEGIN, END, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        mask = live[:, None] & (c < END)[None, :]  # [BLOCK_T, BLOCK]
        tl.store(write[:, None] + c[None, :], tl.load(read[:, None] + c[None, :], mask=mask), mask=mask)


# A tile of 1,024 pairs: two loads of 16 bytes in flight a thread for 16-bit keys, with 128 threads a program.
_TILE_PAIRS = 1024
_NUM_WARPS = 2 if torch.version.hip else 4
# Enough programs to fill a GPU come first; then, as the angles are read once a program, many rows each.
_PROGRAMS = 1024
_ROWS_EACH = (8, 64)


def _launch(
    source: torch.Tensor,  # [l, T, H, C]
    target: torch.Tensor,
    old_positions: torch.Tensor,
    new_positions: torch.Tensor,
    table: RotaryTable,
    start: int,
    interleaved: bool,
) -> None:
    num_layers, num_tokens, heads, content = source.shape
    size, rest = source.element_size(), content - table.width
    block_d = 1 << (table.pairs - 1).bit_length()
    block_t = max(1, min(_TILE_PAIRS // block_d, 1 << (num_tokens - 1).bit_length()))
    block_c = max(1, min(1 << (rest - 1).bit_length() if rest else 1, 2 * _TILE_PAIRS // block_t))
    num_rows, token_tiles = num_layers * heads, -(-num_tokens // block_t)
    rows_each = min(max(token_tiles * num_rows // _PROGRAMS, _ROWS_EACH[0]), _ROWS_EACH[1])
    _shift_rows.launch(
        (token_tiles, -(-num_rows // rows_each)),
        source.device,
        source,
        target,
        old_positions,
        new_positions,
        table.cos_sin,
        num_tokens,
        num_rows,
        rows_each,
        *source.stride()[:3],
        *target.stride()[:3],
        HEADS=heads,
        CONTENT=content,
        START=start,
        HALF=table.pairs,
        INTERLEAVED=interleaved,
        IN_PLACE=(source.data_ptr(), source.stride()) == (target.data_ptr(), target.stride()),
        SOURCE_ALIGN=math.gcd(16, source.data_ptr(), *(step * size for step in source.stride()[:3])),
        TARGET_ALIGN=math.gcd(16, target.data_ptr(), *(step * size for step in target.stride()[:3])),
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        BLOCK_C=block_c,
        num_warps=_NUM_WARPS,
    )


def _check_rows(rows: torch.Tensor, what: str) -> None:
    if rows.dtype not in DTYPES:
        raise KernelArgumentError(f"{what} is {rows.dtype}; it must be one of {', '.join(map(str, DTYPES))}")
    if rows.dim() not in (3, 4):
        raise KernelArgumentError(f"{what} has shape {tuple(rows.shape)}; it must be [L, T, H, D] or [T, H, D]")
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        raise KernelArgumentError(f"{what} has strides {rows.stride()}; the last must be 1 (contiguous heads)")


def _check_turn(
    table: RotaryTable, start: int, rows: torch.Tensor, old_positions: torch.Tensor, new_positions: torch.Tensor
) -> None:
    width, content = table.width, rows.shape[-1]
    if start < 0 or width == 0 or start + width > content:
        raise KernelArgumentError(
            f"table turns {width} elements from rotary_start={start}; a head has {content} elements"
        )
    if table.cos_sin.device != rows.device:
        raise KernelArgumentError(f"table is on {table.cos_sin.device}; it must be on {rows.device}; use .to()")
    for name, positions in (("old_positions", old_positions), ("new_positions", new_positions)):
        if positions.dtype != torch.int64 or positions.shape != rows.shape[-3:-2] or not positions.is_contiguous():
            raise KernelArgumentError(
                f"{name} is {positions.dtype} of shape {tuple(positions.shape)}, strides {positions.stride()}; it must "
                f"be a dense int64 [{rows.shape[-3]}]"
            )
        if positions.device != rows.device:
            raise KernelArgumentError(f"{name} is on {positions.device}; it must be on {rows.device}")
        if rows.device.type == "cpu" and positions.numel() and (last := int(positions.max())) >= table.positions:
            raise KernelArgumentError(f"{name} holds {last}; the table has {table.positions} positions")
