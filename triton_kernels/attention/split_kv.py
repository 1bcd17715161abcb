"""Attention over parts of the KV, merged: softmax over all keys from the softmax over each part and its log-sum-exp.

    out = sum_s exp(lse_s - lse) out_s,    lse = log sum_s exp(lse_s)

(flash-decoding: https://crfm.stanford.edu/2023/10/12/flashdecoding.html.) A part that saw no key has lse = -inf and an
`out_s` of any content, NaN included; where no part saw one, out is 0 and lse is -inf.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.launch import lazy_jit, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def merge_splits(
    parts: torch.Tensor, part_lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None
) -> None:
    """Merge S attentions over disjoint keys into `out`, and their log-sum-exps into `lse`.

    `parts`: fp32 `[S, T, H, D]`, `part_lses`: fp32 `[S, T, H]`, natural logarithms, both dense. `out`: bf16, fp16 or
    fp32 `[T, H, D]`, `lse`: fp32 `[T, H]`, any strides but D contiguous. Raises KernelArgumentError for anything else.
    """
    _check(parts, part_lses, out, lse)
    if out.numel() == 0:
        return
    if runs_kernel(out.device):
        _merge_triton(parts, part_lses, out, lse)
    else:
        merge_splits_torch(parts, part_lses, out, lse)


def merge_splits_torch(
    parts: torch.Tensor, part_lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None
) -> None:
    """The definition of merge_splits in torch."""
    total = part_lses.logsumexp(0)  # [T, H]
    weights = (part_lses - total).exp().where(part_lses > -math.inf, 0.0)  # [S, T, H]
    out.copy_((weights[..., None] * parts.where(weights[..., None] > 0, 0.0)).sum(0))
    if lse is not None:
        lse.copy_(total)


@lazy_jit(do_not_specialize=["rows", "splits"])
def _merge_rows(
    parts: tl.tensor,  # fp32 [S, rows, D]
    part_lses: tl.tensor,  # fp32 [S, rows]
    out: tl.tensor,  # [T, HEADS, D]
    lse: tl.tensor,  # fp32 [T, HEADS]
    rows: tl.tensor,  # T * HEADS
    splits: tl.tensor,
    out_token_stride: tl.tensor,
    out_head_stride: tl.tensor,
    lse_token_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Program i merges rows i * BLOCK_R .. of all heads and tokens; a row is one token and head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    live = row < rows
    step = rows.to(tl.int64)

    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for s in range(splits):
        part_lse = tl.load(part_lses + s * step + row, mask=live, other=float("-inf"))
        largest = tl.maximum(largest, part_lse)
    largest = tl.where(largest > float("-inf"), largest, 0.0)

    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for s in range(splits):
        part_row = s * step + row
        part_lse = tl.load(part_lses + part_row, mask=live, other=float("-inf"))
        weight = tl.exp2((part_lse - largest) * 1.4426950408889634)  # [BLOCK_R]
        # The output of a part without keys may be anything: it must not be multiplied, not even by 0.
        seen = (weight > 0)[:, None] & (col < D)[None, :]  # [BLOCK_R, BLOCK_D]
        part = tl.load(parts + part_row[:, None] * D + col[None, :], mask=seen, other=0.0)
        acc += weight[:, None] * part
        total += weight

    acc /= tl.where(total > 0, total, 1.0)[:, None]
    token, head = row // HEADS, row % HEADS
    out_row = token * out_token_stride + head * out_head_stride
    out_live = live[:, None] & (col < D)[None, :]
    tl.store(out + out_row[:, None] + col[None, :], acc.to(out.dtype.element_ty), mask=out_live)
    if HAS_LSE:
        lse_row = token * lse_token_stride + head * lse_head_stride
        tl.store(lse + lse_row, largest + tl.log2(total) * 0.6931471805599453, mask=live)


def _merge_triton(parts: torch.Tensor, part_lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    tokens, heads, size = out.shape
    block_d = 1 << (size - 1).bit_length()
    # 8 KiB of fp32 a program and split: 4 loads of 16 bytes in flight a thread.
    block_r = max(1, 2048 // block_d)
    lse_strides = (0, 0) if lse is None else lse.stride()
    _merge_rows.launch(
        (-(-tokens * heads // block_r),),
        out.device,
        parts,
        part_lses,
        out,
        part_lses if lse is None else lse,
        tokens * heads,
        parts.shape[0],
        out.stride(0),
        out.stride(1),
        *lse_strides,
        HEADS=heads,
        D=size,
        HAS_LSE=lse is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )


def _check(parts: torch.Tensor, part_lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    if out.dtype not in _OUT_DTYPES or out.dim() != 3 or (out.shape[2] > 1 and out.stride(2) != 1):
        raise KernelArgumentError(
            f"out is {out.dtype} of shape {tuple(out.shape)}, strides {out.stride()}; it must be bf16, fp16 or fp32 "
            "[T, H, D] with D contiguous"
        )
    splits = parts.shape[0] if parts.dim() else 0
    wanted = {"parts": (parts, (splits, *out.shape)), "part_lses": (part_lses, (splits, *out.shape[:2]))}
    if lse is not None:
        wanted["lse"] = (lse, tuple(out.shape[:2]))
    for name, (tensor, shape) in wanted.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or splits == 0:
            raise KernelArgumentError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; with out {tuple(out.shape)} it must be fp32 "
                f"{shape}, of at least one split"
            )
        if tensor.device != out.device:
            raise KernelArgumentError(f"{name} is on {tensor.device}; it must be on {out.device}, as out is")
        if name != "lse" and not tensor.is_contiguous():
            raise KernelArgumentError(f"{name} has strides {tensor.stride()}; it must be dense")
