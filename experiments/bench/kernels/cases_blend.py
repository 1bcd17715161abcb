"""What kernel_bench measures of blending: moving keys, choosing tokens, attending from them. As cases.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from experiments.bench.kernels.case import Case, Setup, agree, on_gpu, within
from lmcache.kernels.attention.deviation import kv_deviation, kv_deviation_torch
from lmcache.kernels.attention.select import select_tokens, select_tokens_torch
from lmcache.kernels.attention.sparse_prefill import PackedKV, sparse_prefill, sparse_prefill_torch
from lmcache.kernels.rotary.ops import shift_rotary, shift_rotary_torch
from lmcache.kernels.rotary.tables import RopeFrequencies, RotaryTable


def rotary(setup: Setup) -> Iterator[Case]:
    """Every key read and written once; the table is small."""
    size = setup.lighter.size
    inverse = 500000.0 ** -(torch.arange(0, size.head_size, 2, dtype=torch.float64) / size.head_size)
    table = RotaryTable.from_frequencies(RopeFrequencies(inverse), 8 * size.tokens, device=setup.device)
    keys = setup.random(size.tokens, size.heads, size.head_size).expand(4, size.layers, -1, -1, -1).contiguous()
    rounds = itertools.cycle(keys)
    old, new = (torch.arange(size.tokens, device=setup.device) + start for start in (0, 3 * size.tokens))
    yield Case(
        name="shift_rotary",
        size=f"{size}, in place",
        nbytes=2 * keys[0].numel() * keys.element_size(),
        run=lambda: shift_rotary(next(rounds), old, new, table),
        check=lambda: agree(
            lambda: shift_rotary(keys[0], old, new, table),
            lambda: shift_rotary_torch(keys[0], old, new, table),
            [keys[0]],
            within(2**-7, 2**-7),
        ),
        peer=on_gpu(setup.device, lambda: shift_rotary_torch(next(rounds), old, new, table)),
        peer_name="torch",
    )


def deviation(setup: Setup) -> Iterator[Case]:
    """Keys and values of a layer, new and old, each read once."""
    size = setup.size
    shape = (4 * size.tokens, size.heads, size.head_size)
    given = [setup.random(*shape, seed=seed) for seed in range(4)]
    yield Case(
        name="kv_deviation",
        size=f"{shape[0]} x {size.width} bf16",
        nbytes=4 * given[0].numel() * 2 + 8 * shape[0],
        run=lambda: kv_deviation(*given),
        check=lambda: all(map(within(1e-5, 1e-3), kv_deviation(*given), kv_deviation_torch(*given))),
        peer=on_gpu(setup.device, lambda: kv_deviation_torch(*given)),
        work=lambda size: size.tokens,
    )


def selection(setup: Setup) -> Iterator[Case]:
    """Scores read once, indices written; a launch or a few, so the time is not that of the bytes."""
    tokens = 8 * setup.size.tokens
    scores = setup.random(tokens, dtype=torch.float32)
    count = tokens * 15 // 100
    yield Case(
        name="select_tokens",
        size=f"{count} of {tokens} fp32",
        nbytes=4 * tokens + 8 * count,
        run=lambda: select_tokens(scores, count),
        check=lambda: torch.equal(select_tokens(scores, count), select_tokens_torch(scores, count)),
        peer=lambda: scores.topk(count).indices.sort(),
        peer_name="topk, sort",
        work=lambda size: size.tokens,
    )


def attention(setup: Setup) -> Iterator[Case]:
    """A sixth of the tokens of a prompt, spread over it, attends to all before them; 4 query heads a KV head."""
    size = setup.size
    tokens, heads = 4 * size.tokens, 4 * size.heads
    places = torch.arange(5, tokens, 6, device=setup.device)
    q = setup.random(len(places), heads, size.head_size, seed=1)
    keys, values = (setup.random(tokens, size.heads, size.head_size, seed=seed) for seed in (2, 3))
    cu_q, cu_kv = (torch.tensor([0, n], dtype=torch.int32, device=setup.device) for n in (len(places), tokens))
    kv, out = PackedKV(keys, values, cu_kv), torch.empty_like(q)
    # In the peer's favour: its mask and its copies of each KV head for 4 query heads are not part of the time.
    mask = torch.arange(tokens, device=setup.device)[None, :] <= places[:, None]
    q_peer = q.transpose(0, 1)[None]
    k_peer, v_peer = (x.transpose(0, 1).repeat_interleave(4, 0)[None] for x in (keys, values))

    def check() -> bool:
        out.fill_(torch.nan)
        sparse_prefill(q, kv, places, cu_q, out=out)
        return within(2**-6, 2**-8)(out, sparse_prefill_torch(q, kv, places, cu_q))

    yield Case(
        name="sparse_prefill",
        size=f"{len(places)} of {tokens}, {heads}/{size.heads} x {size.head_size} bf16",
        nbytes=2 * (2 * q.numel() + keys.numel() + values.numel()),
        run=lambda: sparse_prefill(q, kv, places, cu_q, out=out),
        check=check,
        peer=lambda: torch.nn.functional.scaled_dot_product_attention(q_peer, k_peer, v_peer, attn_mask=mask),
        peer_name="SDPA",
        flops=4 * heads * size.head_size * int((places + 1).sum()),
        work=lambda size: size.tokens,
    )
