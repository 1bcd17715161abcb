"""sparse_prefill through FlashInfer (https://docs.flashinfer.ai/api/attention.html), where that is installed.

NOT RUN: written from FlashInfer's documentation and source, on machines where it cannot be installed. The tests check
only what is handed to it. Choose it by name, and compare it with provider "torch" before relying on it.

FlashInfer's causal mask aligns the last query with the last key, so positions go in as a custom mask, one truth value
a query and key: memory and traffic grow with queries x keys, and no key is skipped, unlike in provider "triton". Its
planner needs the lengths on the host, so every call waits for the stream.
"""

from __future__ import annotations

import functools
import importlib
import math
import types
from typing import Any

import torch

from lmcache.errors import ConfigError, KernelArgumentError
from lmcache.kernels.attention.sparse_prefill import AttentionProblem, PackedKV, PagedKV, visible

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


def attend(problem: AttentionProblem) -> None:
    """The provider "flashinfer": bf16 and fp16 on CUDA. ConfigError where it is not installed."""
    flashinfer = _import()
    _check(problem)
    lengths = _kv_lengths(problem)
    mask = torch.cat([part.flatten() for part in _masks(problem, lengths)])
    options: dict[str, Any] = {
        "head_dim_vo": problem.kv.values.shape[-1],
        "custom_mask": mask,
        "sm_scale": problem.scale,
        "logits_soft_cap": problem.soft_cap,
        "q_data_type": problem.q.dtype,
        "kv_data_type": problem.kv.keys.dtype,
    }
    heads = (problem.q.shape[1], problem.kv_heads, problem.q.shape[2])
    cu_q = problem.cu_q.int()
    if isinstance(problem.kv, PackedKV):
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(problem.q.device), "NHD")
        wrapper.plan(cu_q, problem.kv.cu_kv.int(), *heads, **options)
        operands: tuple[Any, ...] = (problem.kv.keys, problem.kv.values)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(problem.q.device), "HND")
        wrapper.plan(cu_q, *_pages(problem.kv, lengths), *heads, problem.kv.keys.shape[2], **options)
        operands = ((problem.kv.keys, problem.kv.values),)
    out, lse = wrapper.run(problem.q, *operands, return_lse=True)
    # A row that sees no key: neither its output nor its sum is specified. The sums are logarithms to base 2.
    blind = torch.cat([~part.any(1) for part in _masks(problem, lengths)])
    problem.out.copy_(out.masked_fill(blind[:, None, None], 0.0))
    if problem.lse is not None:
        problem.lse.copy_((lse * math.log(2)).masked_fill(blind[:, None], -math.inf))


def _import() -> types.ModuleType:
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise ConfigError(
            f"attention provider 'flashinfer' needs the package flashinfer-python, which cannot be imported ({error}); "
            "install it, or choose 'triton' or 'torch'"
        ) from error


def _check(problem: AttentionProblem) -> None:
    if problem.q.dtype == torch.float32:
        raise KernelArgumentError("q is torch.float32; provider 'flashinfer' takes bf16 and fp16")
    if isinstance(problem.kv, PagedKV) and problem.kv.keys.stride() != problem.kv.values.stride():
        raise KernelArgumentError(
            f"keys have strides {problem.kv.keys.stride()}, values {problem.kv.values.stride()}; provider 'flashinfer' "
            "takes pages of equal strides only"
        )


def _kv_lengths(problem: AttentionProblem) -> list[int]:
    """Keys of each request; of a paged KV at least one, masked, as FlashInfer's arithmetic does not know empty ones."""
    kv = problem.kv
    return (kv.cu_kv.diff() if isinstance(kv, PackedKV) else kv.kv_lens.clamp_min(1)).tolist()


def _masks(problem: AttentionProblem, lengths: list[int]) -> list[torch.Tensor]:
    """Of each request, bool `[queries, keys]`: what is seen, hidden keys included."""
    kv, bounds, masks = problem.kv, problem.cu_q.tolist(), []
    for b, length in enumerate(lengths):
        places = torch.arange(length, device=problem.q.device)
        if isinstance(kv, PagedKV):
            present = (kv.block_table[b, places // kv.keys.shape[2]] >= 0) & (places < kv.kv_lens[b])
        else:
            present = torch.ones_like(places, dtype=torch.bool)
        masks.append(visible(problem.q_positions[bounds[b] : bounds[b + 1]], places, problem.window) & present)
    return masks


def _pages(kv: PagedKV, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len. A missing block becomes block 0, which is masked."""
    tokens = kv.keys.shape[2]
    counts = [-(-length // tokens) for length in lengths]
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = [kv.block_table[b, :count].clamp_min(0) for b, count in enumerate(counts)]
    last = [length - (count - 1) * tokens for length, count in zip(lengths, counts, strict=True)]
    device = kv.keys.device
    return indptr.to(device), torch.cat(rows).int(), torch.tensor(last, dtype=torch.int32, device=device)


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
