"""Attention of some tokens of a prompt, at any positions, over the KV of the whole prompt.

CacheBlend (https://arxiv.org/abs/2405.16444) recomputes only selected tokens of a reused prompt; their queries see the
keys of every token up to their own position, recomputed or reused:

    position          0 1 2 3 4 5 6 7 8 9 ..
    keys, values      k k k k k k k k k k
    query at 2        x x x
    query at 5        x x x x x x
    query at 9        x x x x x x x x x x

    logit(i, j) = scale * q_i . k_j, or soft_cap * tanh(that / soft_cap);  j seen by i:  p_i - window < p_j <= p_i
    out_i = sum_j softmax_j(logit(i, j)) v_j,    lse_i = log sum_j exp(logit(i, j))

A query that sees no key gets zeros, and lse = -inf.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from lmcache.errors import KernelArgumentError
from lmcache.registry import Registry

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_SIZE = 256


@dataclasses.dataclass(frozen=True)
class PackedKV:
    """The KV of a batch, one request after the other. K and V may be views of one tensor: any strides, D contiguous.

    Key i of a request is at position i.
    """

    keys: torch.Tensor  # [T_kv, H_kv, D]
    values: torch.Tensor  # [T_kv, H_kv, V]
    cu_kv: torch.Tensor  # int32 or int64 [B + 1]: request b owns tokens cu_kv[b] .. cu_kv[b + 1]


@dataclasses.dataclass(frozen=True)
class PagedKV:
    """The KV of a batch in an engine's cache. Key i of request b is token i % N of block `block_table[b, i // N]`.

    K and V may be views of one tensor: any strides, D contiguous. Keys of a negative block are hidden.
    """

    keys: torch.Tensor  # [NB, H_kv, N, D]
    values: torch.Tensor  # [NB, H_kv, N, V]
    block_table: torch.Tensor  # int32 or int64 [B, blocks]
    kv_lens: torch.Tensor  # int32 or int64 [B]: tokens


KV: TypeAlias = PackedKV | PagedKV


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """What a provider solves: the checked arguments of sparse_prefill. It writes `out`, and `lse` unless None."""

    q: torch.Tensor  # [T_q, H_q, D]
    kv: KV
    q_positions: torch.Tensor  # int64 [T_q]
    cu_q: torch.Tensor  # [B + 1]
    out: torch.Tensor  # [T_q, H_q, V]
    lse: torch.Tensor | None  # fp32 [T_q, H_q]
    scale: float
    window: int | None
    soft_cap: float | None
    max_kv: int  # no request has more keys
    num_splits: int | None
    plan: dict[object, Any] | None = None

    @property
    def kv_heads(self) -> int:
        return self.kv.keys.shape[1]

    @property
    def batch(self) -> int:
        return len(self.cu_q) - 1


Provider: TypeAlias = Callable[[AttentionProblem], None]

PROVIDERS: Registry[Provider] = Registry(
    "attention provider",
    {
        "triton": "lmcache.kernels.attention.triton_provider:attend",
        "torch": "lmcache.kernels.attention.host_provider:attend",
        "flashinfer": "lmcache.kernels.attention.flashinfer_provider:attend",
    },
    "lmcache.attention_providers",
)


def sparse_prefill(
    q: torch.Tensor,
    kv: KV,
    q_positions: torch.Tensor,
    cu_q: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    max_kv: int | None = None,
    num_splits: int | None = None,
    plan: dict[object, Any] | None = None,
    provider: str = "triton",
) -> torch.Tensor:
    """Attention of the queries of B requests, each over the keys of its request at or before its position; into `out`.

    `q`: bf16, fp16 or fp32 `[T_q, H_q, D]`, D contiguous, the requests one after the other: b owns tokens `cu_q[b]` ..
    `cu_q[b + 1]` (int32 or int64 `[B + 1]`). `q_positions`: int64 `[T_q]`, below 2**31 - 1, in any order, fastest
    where they ascend within a request; a negative one sees no key. H_q is a multiple of H_kv; D and V are at most
    MAX_SIZE (of MLA: decompress first). `out`: `[T_q, H_q, V]` of q's dtype, V contiguous; allocated if None. `lse`:
    fp32 `[T_q, H_q]`, natural logarithms, written if given. `scale` is D ** -0.5 if None. `max_kv`: a bound on the keys
    of one request that is known to the host; only a hint. `num_splits`: over how many programs the keys of a tile are
    spread; chosen if None. `plan`: a dict, empty at first, in which a provider keeps what it works out of positions and
    lengths alone, for the next layer; it is good for one q_positions, cu_q and layout of the KV, unchanged.

    Raises KernelArgumentError for a tensor that does not fit, ConfigError for an unknown provider. Nothing is
    synchronised by "triton"; what cu_q, cu_kv, kv_lens and block_table say is believed, and checked only on a CPU.
    """
    attend = PROVIDERS.get(provider)
    problem = _problem(q, kv, q_positions, cu_q, scale, window, soft_cap, out, lse, max_kv, num_splits)
    if q.numel():
        attend(dataclasses.replace(problem, plan=plan))
    return problem.out


def sparse_prefill_torch(
    q: torch.Tensor,
    kv: KV,
    q_positions: torch.Tensor,
    cu_q: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of sparse_prefill in torch, in fp32; returns a new `out`."""
    problem = _problem(q, kv, q_positions, cu_q, scale, window, soft_cap, None, lse, None, None)
    for rows, keys, values, places in requests(problem):
        group = q.shape[1] // problem.kv_heads
        k = keys.float().repeat_interleave(group, 1)  # [L, H_q, D]
        v = values.float().repeat_interleave(group, 1)
        logits = torch.einsum("thd,lhd->htl", q[rows].float(), k) * problem.scale
        if soft_cap is not None:
            logits = soft_cap * (logits / soft_cap).tanh()
        logits = logits.masked_fill(~visible(q_positions[rows], places, window), -math.inf)
        total = logits.logsumexp(2, keepdim=True)  # [H_q, T, 1]
        weights = (logits - total).exp().where(logits > -math.inf, 0.0)
        problem.out[rows] = torch.einsum("htl,lhv->thv", weights, v).to(q.dtype)
        if lse is not None:
            lse[rows] = total[:, :, 0].T
    return problem.out


def visible(q_positions: torch.Tensor, kv_positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool `[queries, keys]`: whether the query sees the key."""
    seen = kv_positions[None, :] <= q_positions[:, None]
    if window is not None:
        seen &= kv_positions[None, :] > q_positions[:, None] - window
    return seen


def requests(problem: AttentionProblem) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each request with queries: its rows of q, and keys `[L, H_kv, D]`, values and positions `[L]` not hidden.

    Synchronises, and copies the keys of a paged KV.
    """
    kv = problem.kv
    bounds = problem.cu_q.tolist()
    kv_bounds = kv.cu_kv.tolist() if isinstance(kv, PackedKV) else kv.kv_lens.tolist()
    for b, (first, last) in enumerate(itertools.pairwise(bounds)):
        if first == last:
            continue
        if isinstance(kv, PackedKV):
            own = slice(kv_bounds[b], kv_bounds[b + 1])
            keys, values = kv.keys[own], kv.values[own]
            places = torch.arange(len(keys), device=keys.device)
        else:
            keys, values, places = _paged_request(kv, b, kv_bounds[b])
        yield slice(first, last), keys, values, places


def _paged_request(kv: PagedKV, b: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = kv.keys.shape[2]
    places = torch.arange(length, device=kv.keys.device)
    blocks = kv.block_table[b, : -(-length // tokens)].long()
    places = places[(blocks >= 0).repeat_interleave(tokens)[:length]]
    block, token = blocks[places // tokens], places % tokens
    return kv.keys[block, :, token], kv.values[block, :, token], places


def _problem(
    q: torch.Tensor,
    kv: KV,
    q_positions: torch.Tensor,
    cu_q: torch.Tensor,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    max_kv: int | None,
    num_splits: int | None,
) -> AttentionProblem:
    _check_rows("q", q, 3, None)
    _check_kv(q, kv)
    batch = len(cu_q) - 1 if cu_q.dim() == 1 else -1
    _check_index("cu_q", cu_q, (max(batch, 0) + 1,), q.device)
    _check_index("q_positions", q_positions, (len(q),), q.device, (torch.int64,))
    if isinstance(kv, PackedKV):
        _check_index("cu_kv", kv.cu_kv, (batch + 1,), q.device)
        limit = len(kv.keys)
    else:
        _check_index("kv_lens", kv.kv_lens, (batch,), q.device)
        blocks = kv.block_table.shape[1] if kv.block_table.dim() == 2 else 0
        _check_index("block_table", kv.block_table, (batch, blocks), q.device)
        limit = blocks * kv.keys.shape[2]
    for name, value in (("scale", scale), ("window", window), ("soft_cap", soft_cap), ("num_splits", num_splits)):
        if value is not None and not value > 0:
            raise KernelArgumentError(f"{name} is {value}; it must be above 0, or None")
    shape = (*q.shape[:2], kv.values.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
    _check_rows("out", out, 3, q)
    if tuple(out.shape) != shape:
        raise KernelArgumentError(f"out has shape {tuple(out.shape)}; it must be {shape}: tokens and heads of q, V")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != q.shape[:2] or lse.device != q.device):
        raise KernelArgumentError(
            f"lse is {lse.dtype} of shape {tuple(lse.shape)} on {lse.device}; it must be float32 {tuple(q.shape[:2])} "
            f"on {q.device}"
        )
    if q.device.type == "cpu":
        _check_contents(q, kv, cu_q, limit)
    return AttentionProblem(
        q,
        kv,
        q_positions,
        cu_q,
        out,
        lse,
        q.shape[2] ** -0.5 if scale is None else scale,
        window,
        soft_cap,
        limit if max_kv is None else min(max_kv, limit),
        num_splits,
    )


def _check_rows(name: str, tensor: torch.Tensor, dims: int, like: torch.Tensor | None) -> None:
    """A floating-point tensor of so many dimensions, the last contiguous, of the dtype and device of `like`."""
    if tensor.dtype not in DTYPES or tensor.dim() != dims or 0 in tensor.shape[-2:]:
        raise KernelArgumentError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be bf16, fp16 or fp32 of {dims} "
            "dimensions, without heads and components that are none"
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise KernelArgumentError(f"{name} has strides {tensor.stride()}; the last must be 1")
    if tensor.shape[-1] > MAX_SIZE:
        raise KernelArgumentError(
            f"{name} has heads of {tensor.shape[-1]} components; at most {MAX_SIZE} are supported"
        )
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise KernelArgumentError(
            f"{name} is {tensor.dtype} on {tensor.device}; it must be {like.dtype} on {like.device}, as q is"
        )


def _check_kv(q: torch.Tensor, kv: KV) -> None:
    dims = 3 if isinstance(kv, PackedKV) else 4
    _check_rows("keys", kv.keys, dims, q)
    _check_rows("values", kv.values, dims, q)
    if kv.keys.shape[:-1] != kv.values.shape[:-1]:
        raise KernelArgumentError(
            f"keys have shape {tuple(kv.keys.shape)}, values {tuple(kv.values.shape)}; all but the last must be equal"
        )
    if kv.keys.shape[-1] != q.shape[2] or q.shape[1] % kv.keys.shape[1]:
        raise KernelArgumentError(
            f"q has {q.shape[1]} heads of {q.shape[2]}, keys {kv.keys.shape[1]} of {kv.keys.shape[-1]}; sizes must be "
            "equal, and the heads of q a multiple of those of the keys"
        )


def _check_index(
    name: str,
    index: torch.Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = INDEX_DTYPES,
) -> None:
    if index.dtype not in dtypes or tuple(index.shape) != shape or (len(index) and index.stride(-1) != 1):
        raise KernelArgumentError(
            f"{name} is {index.dtype} of shape {tuple(index.shape)}, strides {index.stride()}; it must be "
            f"{' or '.join(str(d) for d in dtypes)} {shape}, the last dimension contiguous"
        )
    if index.device != device:
        raise KernelArgumentError(f"{name} is on {index.device}; it must be on {device}, as q is")


def _check_contents(q: torch.Tensor, kv: KV, cu_q: torch.Tensor, limit: int) -> None:
    """What can only be asked of tensors that the host can read."""
    lists = [("cu_q", cu_q, len(q))]
    if isinstance(kv, PackedKV):
        lists.append(("cu_kv", kv.cu_kv, len(kv.keys)))
    for name, index, total in lists:
        bounds = index.tolist()
        if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != total:
            raise KernelArgumentError(f"{name} is {bounds}; it must rise from 0 to {total}, the number of tokens")
    if isinstance(kv, PagedKV) and kv.kv_lens.numel():
        longest, shortest = int(kv.kv_lens.max()), int(kv.kv_lens.min())
        if shortest < 0 or longest > limit:
            raise KernelArgumentError(f"kv_lens holds {shortest} to {longest}; the block table has 0 to {limit} tokens")
        if kv.block_table.numel() and int(kv.block_table.max()) >= len(kv.keys):
            raise KernelArgumentError(
                f"block_table holds {int(kv.block_table.max())}; there are {len(kv.keys)} blocks, and keys of a "
                "negative one are hidden"
            )
