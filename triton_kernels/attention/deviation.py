"""How far the keys and values of each token have moved: CacheBlend's choice of what to recompute.

    k_dev[t] = sum over heads h and channels d of (k_new[t, h, d] - k_old[t, h, d])^2        the same for v

the square of the L2 distance, which orders tokens as the distance does (Yao et al. 2024, arXiv:2405.16444, section 4).
Differences, squares and sums are fp32; a NaN or an infinity in a token's KV makes its deviation NaN or infinite.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.launch import device_function, lazy_jit, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kv_deviation(
    k_new: torch.Tensor, k_old: torch.Tensor, v_new: torch.Tensor, v_old: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k_dev, v_dev), each fp32 `[T]`: squared L2 distance of the new from the old keys and values of each token.

    All four: `[T, H, D]` of one dtype, bf16, fp16 or fp32, any strides with D contiguous (halves of a `[T, H, 2 D]` are
    fine); values may have other H and D than keys. Each byte is read once, in one launch. Nothing is synchronised.
    Raises KernelArgumentError for anything else.
    """
    _check(k_new, k_old, v_new, v_old)
    if not runs_kernel(k_new.device):
        return kv_deviation_torch(k_new, k_old, v_new, v_old)
    num_tokens = k_new.shape[0]
    out = torch.empty(2, num_tokens, dtype=torch.float32, device=k_new.device)
    _launch(k_new, k_old, v_new, v_old, out)
    return out[0], out[1]


def kv_deviation_torch(
    k_new: torch.Tensor, k_old: torch.Tensor, v_new: torch.Tensor, v_old: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of kv_deviation in torch."""
    return _squared_distance(k_new, k_old), _squared_distance(v_new, v_old)


def _squared_distance(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new.float() - old.float()).square().sum(dim=(1, 2))


@lazy_jit(do_not_specialize=["num_tokens"])
def _sum_squares(
    k_new: tl.tensor,  # [T, H, D], as the next three
    k_old: tl.tensor,
    v_new: tl.tensor,
    v_old: tl.tensor,
    out: tl.tensor,  # fp32 [2, T]
    num_tokens: tl.tensor,
    k_new_token: tl.tensor,  # strides in elements
    k_new_head: tl.tensor,
    k_old_token: tl.tensor,
    k_old_head: tl.tensor,
    v_new_token: tl.tensor,
    v_new_head: tl.tensor,
    v_old_token: tl.tensor,
    v_old_head: tl.tensor,
    K_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    ALIGN: tl.constexpr,  # bytes that divide the address of every head of every token
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Program (i, 0) sums the keys of tokens i * BLOCK_T .., program (i, 1) their values."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    live = t < num_tokens
    if tl.program_id(1) == 0:
        new, old = k_new + t * k_new_token, k_old + t * k_old_token
        total = _token_sums(new, old, k_new_head, k_old_head, live, K_HEADS, K_DIM, ALIGN, BLOCK_T, BLOCK_W)
        tl.store(out + t, total, mask=live)
    else:
        new, old = v_new + t * v_new_token, v_old + t * v_old_token
        total = _token_sums(new, old, v_new_head, v_old_head, live, V_HEADS, V_DIM, ALIGN, BLOCK_T, BLOCK_W)
        tl.store(out + num_tokens + t, total, mask=live)


@device_function
def _token_sums(
    new_rows: tl.tensor,  # [BLOCK_T] pointers
    old_rows: tl.tensor,
    new_head: tl.tensor,
    old_head: tl.tensor,
    live: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> tl.tensor:
    new_rows, old_rows = tl.multiple_of(new_rows, ALIGN), tl.multiple_of(old_rows, ALIGN)
    total = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
    for begin in tl.static_range(0, HEADS * DIM, BLOCK_W):
        w = begin + tl.arange(0, BLOCK_W)  # [BLOCK_W]: element w % DIM of head w // DIM
        mask = live[:, None] & (w < HEADS * DIM)[None, :]  # [BLOCK_T, BLOCK_W]
        new_at = (w // DIM).to(tl.int64) * new_head + w % DIM
        old_at = (w // DIM).to(tl.int64) * old_head + w % DIM
        a = tl.load(new_rows[:, None] + new_at[None, :], mask=mask, other=0).to(tl.float32)
        b = tl.load(old_rows[:, None] + old_at[None, :], mask=mask, other=0).to(tl.float32)
        total += (a - b) * (a - b)
    return tl.sum(total, 1)


# 2,048 elements a program and tensor: 4 loads of 16 bytes in flight a thread for 16-bit KV.
_TILE = 2048
_NUM_WARPS = 4


def _launch(
    k_new: torch.Tensor, k_old: torch.Tensor, v_new: torch.Tensor, v_old: torch.Tensor, out: torch.Tensor
) -> None:
    sides = (k_new, k_old, v_new, v_old)
    steps = [(side.stride(0), side.stride(1)) for side in sides]
    size = k_new.element_size()
    widest = max(k_new[0].numel(), v_new[0].numel()) if len(k_new) else 1
    block_w = min(_TILE, 1 << (widest - 1).bit_length())
    block_t = _TILE // block_w
    _sum_squares.launch(
        (-(-len(k_new) // block_t), 2),
        k_new.device,
        *sides,
        out,
        len(k_new),
        *(step for pair in steps for step in pair),
        K_HEADS=k_new.shape[1],
        K_DIM=k_new.shape[2],
        V_HEADS=v_new.shape[1],
        V_DIM=v_new.shape[2],
        ALIGN=math.gcd(16, *(side.data_ptr() for side in sides), *(step * size for pair in steps for step in pair)),
        BLOCK_T=block_t,
        BLOCK_W=block_w,
        num_warps=_NUM_WARPS,
    )


def _check(k_new: torch.Tensor, k_old: torch.Tensor, v_new: torch.Tensor, v_old: torch.Tensor) -> None:
    for name, side in (("k_new", k_new), ("k_old", k_old), ("v_new", v_new), ("v_old", v_old)):
        if side.dtype not in _DTYPES or (side.dtype, side.device) != (k_new.dtype, k_new.device):
            raise KernelArgumentError(
                f"{name} is {side.dtype} on {side.device}; all must be of the dtype and on the device of k_new "
                f"({k_new.dtype} on {k_new.device}), one of {', '.join(map(str, _DTYPES))}"
            )
        if side.dim() != 3 or 0 in side.shape[1:]:
            raise KernelArgumentError(f"{name} has shape {tuple(side.shape)}; it must be [T, H, D], H and D not 0")
        if side.stride(2) != 1 and side.shape[2] > 1:
            raise KernelArgumentError(f"{name} has strides {side.stride()}; the last must be 1 (contiguous heads)")
    for name, side, other in (("k_old", k_old, k_new), ("v_old", v_old, v_new)):
        if side.shape != other.shape:
            raise KernelArgumentError(
                f"{name} has shape {tuple(side.shape)}; it must be that of the new, {tuple(other.shape)}"
            )
    if len(v_new) != len(k_new):
        raise KernelArgumentError(f"v_new has {len(v_new)} tokens and k_new {len(k_new)}; they must be the same")
