"""sparse_prefill through torch's own attention: what a CPU runs, and the provider "torch" on any device.

Each request's queries go in slabs, so that the mask stays small and a slab reads no key that none of its queries sees.
Within a slab the query heads that share a KV head are rows of one: torch packs keys and values once for each head and
call, which is also why slabs should not be small. A request that computes all of its tokens needs no mask: torch skips
what a causal attention does not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lmcache.kernels.attention.sparse_prefill import AttentionProblem, requests, visible

_SLAB_ROWS = 192
_SLAB_SCORES = 1 << 24  # scores held at once, over all heads
_SHARED_KEYS = 1536  # that all queries of a slab see, for which a call of their own pays
_PLAN_SCORES = 1 << 25  # of the masks that a plan keeps


class _Slab(NamedTuple):
    """Some queries of a request, and the keys that they see: those of `span` that the mask leaves.

    shared: all queries see the first shared + 1 keys of the span, so that each sees one of those behind `shared`.
    """

    rows: slice
    span: slice
    shared: int
    mask: torch.Tensor | None  # added to the logits, [T G, L]; None: all are seen
    blind: torch.Tensor | None  # bool [T], queries that see no key; None: none of them
    causal: bool = False  # query i sees the keys .. i of the span


def attend(problem: AttentionProblem) -> None:
    """The provider "torch". Waits for the stream: it needs the lengths of the requests."""
    group = problem.q.shape[1] // problem.kv_heads
    plan = {} if problem.plan is None else problem.plan
    for rows, keys, values, places in requests(problem):
        key = ("torch", rows.start, problem.window, group, problem.q.dtype, _fused(problem))
        slabs = plan.get(key)
        if slabs is None:
            slabs = _slabs(problem, rows, places, group)
            if problem.plan is not None and group * len(places) * (rows.stop - rows.start) <= _PLAN_SCORES:
                slabs = plan[key] = list(slabs)
        for slab in slabs:
            _attend_slab(problem, slab, keys, values)


def _slabs(problem: AttentionProblem, rows: slice, places: torch.Tensor, group: int) -> Iterator[_Slab]:
    """Of one request."""
    if _is_causal(problem, problem.q_positions[rows], places):
        yield _Slab(rows, slice(0, len(places)), 0, None, None, causal=True)
        return
    total = rows.stop - rows.start
    most = min(_SLAB_ROWS, max(16, _SLAB_SCORES // max(1, len(places) * problem.q.shape[1])))
    size = max(1, -(-total // max(1, -(-total // most))))  # no more slabs than that takes, all alike
    for start in range(rows.start, rows.stop, size):
        part = slice(start, min(start + size, rows.stop))
        queries = problem.q_positions[part]
        first, last, blind = _bounds(problem, queries, places)
        span, shared, mask = slice(first, max(first, last)), 0, None
        seen = visible(queries, places[span], problem.window)  # [T, L]
        if not bool(seen.all()):
            mask = torch.zeros(seen.shape, dtype=problem.q.dtype, device=seen.device).masked_fill_(~seen, -math.inf)
            mask = mask.repeat_interleave(group, 0)
            shared = max(0, int(seen.all(0).logical_not().nonzero()[0]) - 1)
        yield _Slab(part, span, shared, mask, blind if bool(blind.any()) else None)


def _fused(problem: AttentionProblem) -> bool:
    """Whether torch's own attention does all that is asked for."""
    return problem.lse is None and problem.soft_cap is None


def _is_causal(problem: AttentionProblem, queries: torch.Tensor, places: torch.Tensor) -> bool:
    """Whether query i sees the keys .. i; asked only where torch would not hold the scores of them all."""
    if not _fused(problem) or problem.kv.keys.shape[-1] != problem.kv.values.shape[-1] or len(queries) != len(places):
        return False
    if problem.window is not None and int(places[-1] - places[0]) >= problem.window:
        return False
    return torch.equal(queries, places)


def _attend_slab(problem: AttentionProblem, slab: _Slab, keys: torch.Tensor, values: torch.Tensor) -> None:
    rows, span, shared, mask, blind, causal = slab
    if span.start == span.stop:
        problem.out[rows] = 0
        if problem.lse is not None:
            problem.lse[rows] = -math.inf
        return
    tokens, q_heads, size = problem.q[rows].shape
    group = q_heads // problem.kv_heads
    if causal:
        k, v = (side[span].transpose(0, 1).repeat_interleave(group, 0)[None] for side in (keys, values))
        q = problem.q[rows].transpose(0, 1)[None]  # [1, H_q, T, D]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=problem.scale)
        problem.out[rows] = out[0].transpose(0, 1)
        return
    q = problem.q[rows].view(tokens, -1, group, size).transpose(0, 1).flatten(1, 2)[None]  # [1, H_kv, T G, D]
    k, v = (side[span].transpose(0, 1)[None] for side in (keys, values))  # [1, H_kv, L, D]
    if _fused(problem):
        if mask is not None and shared >= _SHARED_KEYS and q.device.type == "cpu" and q.shape[3] == v.shape[3]:
            out = _attend_in_two(q, k, v, shared, mask[:, shared:], problem.scale)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.scale)
    else:
        out, total = _attend_in_full(problem, q, k, v, mask)
        if problem.lse is not None:
            problem.lse[rows] = total.view(-1, tokens, group).transpose(0, 1).flatten(1)
    out = out.view(problem.kv_heads, tokens, group, -1).transpose(0, 1).flatten(1, 2)  # [T, H_q, V]
    problem.out[rows] = out if blind is None else out.masked_fill(blind[:, None, None], 0.0)


def _attend_in_two(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shared: int, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """The first keys without a mask, and the others, of which each query sees one at least."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, total = attend(q, k[:, :, :shared], v[:, :, :shared], scale=scale)
    rest, rest_total = attend(q, k[:, :, shared:], v[:, :, shared:], attn_mask=mask, scale=scale)
    weight = torch.sigmoid(rest_total - total)[..., None]
    return torch.lerp(out, rest, weight.to(out.dtype))


def _bounds(problem: AttentionProblem, queries: torch.Tensor, places: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """Keys first .. last - 1 hold all that are seen (none are if first >= last); bool `[T]`: queries that see none."""
    stops = torch.searchsorted(places, queries, right=True)
    if problem.window is None:
        return 0, int(stops.max()), stops == 0
    starts = torch.searchsorted(places, queries - problem.window, right=True)
    blind = starts >= stops
    live = ~blind
    return (int(starts[live].min()), int(stops.max()), blind) if bool(live.any()) else (0, 0, blind)


def _attend_in_full(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out `[1, H_kv, T G, V]` and log-sum-exp `[1, H_kv, T G]` in fp32, where torch's own attention lacks something."""
    logits = (q.float() @ k.float().transpose(2, 3)).mul_(problem.scale)
    if problem.soft_cap is not None:
        logits.div_(problem.soft_cap).tanh_().mul_(problem.soft_cap)
    if mask is not None:
        logits.add_(mask)
    total = logits.logsumexp(3)
    weights = logits.sub_(total.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp_()
    return weights @ v.float(), total
