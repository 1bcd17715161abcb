"""The Triton kernel of sparse_prefill: one tile of (token, head of a GQA group) rows against the keys that it sees.

    tile rows     t0h0 t0h1 .. t0h(G-1) | t1h0 .. | ...      G query heads share one key head, so few tokens fill a tile
    keys          .. | window's edge | clear | diagonal | ..
                 unread    masked     no mask   masked   unread

A tile's keys run from the first one that its lowest position sees to its highest position; blocks of keys that every
row sees need no mask. With splits, the blocks of each tile are dealt out evenly to that many programs, whose parts
`merge_splits` puts together. Online softmax in base 2 (flash attention 2: https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.kernels.launch import device_function, lazy_jit

if TYPE_CHECKING:
    import triton.language as tl


@device_function
def _attend_blocks(
    acc: tl.tensor,  # fp32 [BLOCK_M, BLOCK_V]
    largest: tl.tensor,  # fp32 [BLOCK_M]: of the scores so far, in base 2
    total: tl.tensor,  # fp32 [BLOCK_M]
    q_head: tl.tensor,  # [BLOCK_M, BLOCK_D]: the first components
    q_tail: tl.tensor,  # [BLOCK_M, TAIL]: the others, if any
    position: tl.tensor,  # int32 [BLOCK_M]
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,  # this request's row of the block table
    first: tl.tensor,  # blocks first .. first + count of BLOCK_N keys; all but the first `turn` lie `jump` further
    count: tl.tensor,
    turn: tl.tensor,
    jump: tl.tensor,
    low: tl.tensor,  # keys outside low .. high are not read
    high: tl.tensor,
    k_block_stride: tl.tensor,
    k_token_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_token_stride: tl.tensor,
    scale: tl.tensor,  # of a score, before its cap
    factor: tl.tensor,  # of a score, into base 2
    MASKED: tl.constexpr,
    ALIKE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """acc, largest and total after `count` more blocks of keys."""
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    tail = BLOCK_D + tl.arange(0, TAIL if TAIL else 1)
    v_col = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    for i in range(0, count):
        block = first + i
        if MASKED:
            block += tl.where(i < turn, 0, jump)
        key = block * BLOCK_N + tl.arange(0, BLOCK_N)  # int32 [BLOCK_N]
        live = (key >= low) & (key < high)
        if PAGE:
            if MASKED:
                page = tl.load(table + key // PAGE, mask=live, other=-1).to(tl.int64)
            else:
                page = tl.load(table + key // PAGE).to(tl.int64)
            live = page >= 0
            token = (key % PAGE).to(tl.int64)
            k_offset = page * k_block_stride + token * k_token_stride
            v_offset = k_offset if ALIKE else page * v_block_stride + token * v_token_stride
        else:
            k_offset = key.to(tl.int64) * k_token_stride
            v_offset = k_offset if ALIKE else key.to(tl.int64) * v_token_stride
        k_row = keys + k_offset
        v_row = values + v_offset

        # What is not live may be anything, NaN included: it is never read, because 0 * NaN is not 0.
        if BLOCK_D > D:
            k = tl.load(k_row[:, None] + col[None, :], mask=live[:, None] & (col < D)[None, :], other=0.0)
        elif MASKED or PAGE:
            k = tl.load(k_row[:, None] + col[None, :], mask=live[:, None], other=0.0)
        else:
            k = tl.load(k_row[:, None] + col[None, :])
        score = tl.dot(q_head, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if TAIL:
            k = tl.load(k_row[:, None] + tail[None, :], mask=live[:, None] & (tail < D)[None, :], other=0.0)
            score = tl.dot(q_tail, tl.trans(k), score, input_precision="ieee")
        if CAPPED:
            score = 1.0 - 2.0 / (tl.exp2(score * scale) + 1.0)  # tanh
        if MASKED:
            seen = live[None, :] & (key[None, :] <= position[:, None])  # [BLOCK_M, BLOCK_N]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            score = tl.where(seen, score, float("-inf"))
        elif PAGE:
            score = tl.where(live[None, :], score, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(score, 1) * factor)
        shift = tl.where(new_largest > float("-inf"), new_largest, 0.0)  # 0 for a row that has seen no key
        p = tl.exp2(score * factor - shift[:, None])  # [BLOCK_M, BLOCK_N]
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(p, 1)
        largest = new_largest
        if BLOCK_V > V:
            v = tl.load(v_row[:, None] + v_col[None, :], mask=live[:, None] & (v_col < V)[None, :], other=0.0)
        elif MASKED or PAGE:
            v = tl.load(v_row[:, None] + v_col[None, :], mask=live[:, None], other=0.0)
        else:
            v = tl.load(v_row[:, None] + v_col[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, largest, total


@device_function
def _tokens_of(
    tile: tl.tensor, cu_q: tl.tensor, batch: tl.tensor, TOKENS: tl.constexpr, BLOCK_B: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(request, first token, end of the request's tokens) of a tile; one without tokens begins at that end or later.

    Request b owns tiles cu_q[b] // TOKENS + b ..; there may be one more than it needs.
    """
    entry = tl.arange(0, BLOCK_B)
    q_starts = tl.load(cu_q + entry, mask=entry < batch, other=0)
    b = tl.sum(((q_starts // TOKENS + entry <= tile) & (entry < batch)).to(tl.int32), 0) - 1
    q_start = tl.load(cu_q + b)
    return b, q_start + (tile - (q_start // TOKENS + b)) * TOKENS, tl.load(cu_q + b + 1)


@device_function
def _key_blocks(
    kv_len: tl.tensor,
    lowest: tl.tensor,  # of the positions of the queries
    highest: tl.tensor,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(low, high, begin, end, clear_begin, clear_end): which keys this program reads.

    Keys low .. high hold all that any row sees. Blocks begin .. end of BLOCK_N keys are this program's part of them;
    of these, every row sees all keys of clear_begin .. clear_end.
    """
    low = 0
    high = tl.minimum(kv_len, highest + 1)
    if WINDOW:
        low = tl.maximum(lowest - (WINDOW - 1), 0)
    begin = low // BLOCK_N
    end = tl.maximum((high + BLOCK_N - 1) // BLOCK_N, begin)
    if SPLIT:
        share = (end - begin + tl.num_programs(1) - 1) // tl.num_programs(1)
        begin = tl.minimum(begin + tl.program_id(1) * share, end)
        end = tl.minimum(begin + share, end)
    clear_begin = begin
    if WINDOW:
        edge = (tl.maximum(highest - (WINDOW - 1), 0) + BLOCK_N - 1) // BLOCK_N
        clear_begin = tl.minimum(tl.maximum(edge, begin), end)
    clear_end = tl.minimum(kv_len, lowest + 1) // BLOCK_N
    clear_end = tl.minimum(tl.maximum(clear_end, clear_begin), end)
    return low, high, begin, end, clear_begin, clear_end


@lazy_jit(do_not_specialize=["batch", "groups"])
def attend_tiles(
    q: tl.tensor,  # [T_q, H_q, D]
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,  # [T_q, H_q, V], or fp32 [splits, T_q, H_q, V]
    lse: tl.tensor,  # fp32 [T_q, H_q], or [splits, T_q, H_q]
    q_positions: tl.tensor,  # int64 [T_q]
    cu_q: tl.tensor,  # [batch + 1]
    kv_bounds: tl.tensor,  # cu_kv [batch + 1], or if PAGE the lengths [batch]
    block_table: tl.tensor,  # [batch, ..] if PAGE
    batch: tl.tensor,
    groups: tl.tensor,  # H_q / HEADS
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_block_stride: tl.tensor,
    k_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    table_stride: tl.tensor,
    out_split_stride: tl.tensor,
    out_token_stride: tl.tensor,
    out_head_stride: tl.tensor,
    lse_split_stride: tl.tensor,
    lse_token_stride: tl.tensor,
    lse_head_stride: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    HEADS: tl.constexpr,  # query heads a tile
    KV_GROUP: tl.constexpr,  # tiles of heads that share a key head
    SPLIT: tl.constexpr,
    HAS_LSE: tl.constexpr,
    ALIKE: tl.constexpr,  # keys and values have the same strides
    PAGE: tl.constexpr,  # tokens a block of a paged KV, else 0
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,  # components beyond BLOCK_D, rounded up; 0 where BLOCK_D >= D
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,  # >= batch
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Program (i, s) computes part s of tile i // groups, counted from the last: high positions take longest."""
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    group = tl.program_id(0) % groups
    tile = tl.num_programs(0) // groups - 1 - tl.program_id(0) // groups
    split = tl.program_id(1)

    b, first_token, q_end = _tokens_of(tile, cu_q, batch, TOKENS, BLOCK_B)
    if first_token >= q_end:
        return

    row = tl.arange(0, BLOCK_M)
    token = first_token.to(tl.int64) + row // HEADS  # [BLOCK_M]
    head = (group * HEADS + row % HEADS).to(tl.int64)
    row_live = (row < TOKENS * HEADS) & (token < q_end)
    position = tl.load(q_positions + token, mask=row_live, other=-1)
    position = tl.minimum(tl.maximum(position, -1), 2147483646).to(tl.int32)  # so that no sum of it overflows
    lowest = tl.min(tl.where(row_live, position, 2147483647), 0)
    highest = tl.max(position, 0)

    keys += (group // KV_GROUP).to(tl.int64) * k_head_stride
    values += (group // KV_GROUP).to(tl.int64) * v_head_stride
    table = block_table
    if PAGE:
        kv_len = tl.load(kv_bounds + b).to(tl.int32)
        table += b.to(tl.int64) * table_stride
    else:
        kv_start = tl.load(kv_bounds + b).to(tl.int64)
        kv_len = (tl.load(kv_bounds + b + 1) - kv_start).to(tl.int32)
        keys += kv_start * k_token_stride
        values += kv_start * v_token_stride

    low, high, begin, end, clear_begin, clear_end = _key_blocks(kv_len, lowest, highest, SPLIT, WINDOW, BLOCK_N)
    col = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    v_col = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    tail = BLOCK_D + tl.arange(0, TAIL if TAIL else 1)
    q_row = q + token * q_token_stride + head * q_head_stride  # [BLOCK_M]
    q_head = tl.load(q_row[:, None] + col[None, :], mask=row_live[:, None] & (col < D)[None, :], other=0.0)
    q_tail = tl.load(q_row[:, None] + tail[None, :], mask=row_live[:, None] & (tail < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, largest, total = _attend_blocks(
        acc, largest, total, q_head, q_tail, position, keys, values, table,
        clear_begin, clear_end - clear_begin, 0, 0, low, high,
        k_block_stride, k_token_stride, v_block_stride, v_token_stride, scale, factor,
        False, ALIKE, PAGE, WINDOW, CAPPED, D, V, BLOCK_D, TAIL, BLOCK_V, BLOCK_N,
    )  # fmt: skip
    turn = clear_begin - begin
    acc, largest, total = _attend_blocks(
        acc, largest, total, q_head, q_tail, position, keys, values, table,
        begin, turn + end - clear_end, turn, clear_end - clear_begin, low, high,
        k_block_stride, k_token_stride, v_block_stride, v_token_stride, scale, factor,
        True, ALIKE, PAGE, WINDOW, CAPPED, D, V, BLOCK_D, TAIL, BLOCK_V, BLOCK_N,
    )  # fmt: skip

    acc /= tl.where(total > 0, total, 1.0)[:, None]
    out_row = out + split.to(tl.int64) * out_split_stride + token * out_token_stride + head * out_head_stride
    out_live = row_live[:, None] & (v_col < V)[None, :]
    if SPLIT:
        out_live = out_live & (total != 0)[:, None]  # merge_splits does not read what saw no key
    tl.store(out_row[:, None] + v_col[None, :], acc.to(out.dtype.element_ty), mask=out_live)
    if HAS_LSE:
        lse_row = lse + split.to(tl.int64) * lse_split_stride + token * lse_token_stride + head * lse_head_stride
        tl.store(lse_row, (largest + tl.log2(total)) * 0.6931471805599453, mask=row_live)
