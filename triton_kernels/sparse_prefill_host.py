"""sparse_prefill through torch's own attention: what a CPU runs, and the provider "torch" on any device.

Each request's queries go in slabs, so that the mask stays small and a slab reads no key that none of its queries sees.
"""

from __future__ import annotations

import math

import torch

from lmcache.kernels.sparse_prefill import AttentionProblem, requests, visible

_SLAB_SCORES = 1 << 24  # scores held at once, over all heads


def attend(problem: AttentionProblem) -> None:
    """The provider "torch". Waits for the stream: it needs the lengths of the requests."""
    for rows, keys, values, places in requests(problem):
        slab = max(16, _SLAB_SCORES // max(1, len(keys) * problem.q.shape[1]))
        for first in range(rows.start, rows.stop, slab):
            _attend_slab(problem, slice(first, min(first + slab, rows.stop)), keys, values, places)


def _attend_slab(
    problem: AttentionProblem, rows: slice, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor
) -> None:
    seen = visible(problem.q_positions[rows], places, problem.window)  # [T, L]
    used = torch.nonzero(seen.any(0)).flatten()
    if len(used) == 0:
        problem.out[rows] = 0
        if problem.lse is not None:
            problem.lse[rows] = -math.inf
        return
    span = slice(int(used[0]), int(used[-1]) + 1)
    seen = seen[:, span]
    tokens, q_heads, size = problem.q[rows].shape
    # A KV head is a batch, the query heads that share it are heads: nothing is copied for them.
    q = problem.q[rows].view(tokens, problem.kv_heads, -1, size).permute(1, 2, 0, 3)  # [H_kv, G, T, D]
    k = keys[span].transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1)  # [H_kv, G, L, D]
    v = values[span].transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1)
    if problem.lse is None and problem.soft_cap is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=problem.scale)
    else:
        out, total = _attend_in_full(problem, q, k, v, seen)
        if problem.lse is not None:
            problem.lse[rows] = total.permute(2, 0, 1).reshape(tokens, q_heads)
    blind = ~seen.any(1)
    out = out.masked_fill(blind[:, None], 0.0)
    problem.out[rows] = out.permute(2, 0, 1, 3).reshape(tokens, q_heads, -1).to(problem.out.dtype)


def _attend_in_full(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out `[H_kv, G, T, V]` and log-sum-exp `[H_kv, G, T]` in fp32, where torch's own attention lacks something."""
    logits = (q.float() @ k.float().transpose(2, 3)).mul_(problem.scale)
    if problem.soft_cap is not None:
        logits.div_(problem.soft_cap).tanh_().mul_(problem.soft_cap)
    logits.masked_fill_(~seen, -math.inf)
    total = logits.logsumexp(3)
    weights = logits.sub_(total.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp_()
    return weights @ v.float(), total
