"""Range-ANS entropy coder: many independent streams at once, one lane of a kernel each; the same bytes from a CPU.

    state              32 bits, at least 2**16 between symbols; words have 16 bits, frequencies 12 (tables.py)
    encode a symbol    if state >> 20 >= f: emit the low word, state >>= 16
                       state = (state // f << 12) + start + state % f
    decode a symbol    slot = state & 4095, which says the symbol
                       state = f * (state >> 12) + slot - start;  if state < 2**16: state = state << 16 | next word

The encoder starts from state 2**16 at the last symbol and goes backwards, so that the decoder goes forwards:

    words  |high, low word of the last state|word|word| ..  |high, low|word| ..     lengths[s] words of each stream s,
           |<------- stream 0, lengths[0] words ----->|     |<- stream 1 ..         2 to 2 + 3 N // 4

A stream whose decoding does not end in state 2**16 with its last word was damaged. Source: Duda, "Asymmetric numeral
systems", arXiv:1311.2540; the variant with words is Giesen's, "Interleaved entropy coders", arXiv:1402.3392.

Choosing the streams. A lane's symbols depend on each other, so only more lanes make it faster: as many streams as the
size allows, and many chunks in one call. A stream costs 40 bits more than its symbols carry: 16 of length, and 32 of
last state, 8 of which are information. Neighbouring streams should share their table (16 KiB for the decoder, so that
32 lanes find it in one L1), and be neighbours in memory: with the codes of a plane as `[tokens * channels]`,
`codes.view(planes, N, S).transpose(1, 2)` are S interleaved streams a plane whose lanes read neighbouring bytes.
Streams of N contiguous bytes, N a multiple of 8, move as words of 8.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.entropy.host import rans_decode_numpy, rans_encode_numpy
from lmcache.kernels.entropy.tables import CODABLE, SLOTS, FrequencyTables
from lmcache.kernels.launch import lazy_jit, runs_kernel
from lmcache.kernels.layers import byte_offset, reinterpret

if TYPE_CHECKING:
    import triton.language as tl

MAX_SYMBOLS = 87_378  # a stream; with more, max_words might not fit a 16-bit length


@dataclasses.dataclass(frozen=True)
class Encoded:
    """words: uint16 `[capacity]`, of which the first `used` (int64 scalar, on the device) count. lengths: uint16 `[S]`.

    A length of 0 marks a stream with a symbol that its table cannot encode; decoding it reports damage.
    """

    words: torch.Tensor
    lengths: torch.Tensor
    used: torch.Tensor


def max_words(num_symbols: int) -> int:
    """The most words a stream of that many symbols can take: 12 bits a symbol, and the state."""
    return 2 + 3 * num_symbols // 4


def rans_encode(
    symbols: torch.Tensor, tables: FrequencyTables, table_of: torch.Tensor, out: torch.Tensor | None = None
) -> Encoded:
    """Encode every stream of `symbols`; symbol i of stream s by table `table_of[s, i % P]`.

    `symbols`: uint8 `[S, N]`, or `[G, S, N]` for G * S streams, any strides, N <= 87,378. `table_of`: dense int32
    `[streams, P]`, within the tables: refused otherwise on a CPU; on a GPU it is the caller's duty. `out`: dense
    uint16 of at least `streams * max_words(N)`, or None for a new one. Words beyond `used` keep what they held.
    All on the device of `tables`. Raises KernelArgumentError for anything else, and on a CPU for a symbol that has
    no slot in its table; a GPU gives that stream the length 0. Nothing synchronises.
    """
    lanes = _lanes(symbols, "symbols")
    _check(lanes, tables, table_of)
    capacity = lanes.shape[0] * lanes.shape[1] * max_words(lanes.shape[2])
    if out is None:
        out = torch.empty(capacity, dtype=torch.uint16, device=symbols.device)
    _check_dense(out, "out", torch.uint16, tables.device)
    if out.numel() < capacity:
        raise KernelArgumentError(
            f"out holds {out.numel()} words; it must have room for the worst case, {capacity} = streams * max_words(N)"
        )
    if runs_kernel(tables.device):
        return _encode_triton(lanes, tables, table_of, out)
    words, lengths = rans_encode_numpy(lanes.flatten(0, 1).numpy(), tables, table_of.numpy())
    out.numpy()[: len(words)] = words
    return Encoded(out, torch.from_numpy(lengths), torch.tensor(len(words)))


def rans_decode(
    words: torch.Tensor, lengths: torch.Tensor, tables: FrequencyTables, table_of: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Decode into `out`, uint8 `[S, N]` or `[G, S, N]`, any strides; returns bool `[streams]`, whether each is intact.

    `words`: dense uint16 `[n]`, at least the sum of `lengths` of them; `lengths`: dense uint16 `[streams]`;
    `table_of`: as for rans_encode. All on the device of `tables`. Whatever words and lengths hold, nothing outside
    the tensors is read or written: symbols of a damaged stream are arbitrary. Raises KernelArgumentError for wrong
    arguments. Nothing synchronises.
    """
    lanes = _lanes(out, "out")
    _check(lanes, tables, table_of)
    _check_dense(words, "words", torch.uint16, tables.device)
    _check_dense(lengths, "lengths", torch.uint16, tables.device)
    if len(lengths) != len(table_of):
        raise KernelArgumentError(f"lengths has {len(lengths)} entries; out has {len(table_of)} streams")
    if runs_kernel(tables.device):
        return _decode_triton(words, lengths, tables, table_of, lanes)
    by_step, intact = rans_decode_numpy(words.numpy(), lengths.numpy(), tables, table_of.numpy(), lanes.shape[2])
    lanes.copy_(torch.from_numpy(by_step).T.view(lanes.shape))
    return torch.from_numpy(intact)


@lazy_jit(do_not_specialize=["num_streams", "num_symbols", "row_words", "group"])
def _encode_streams(
    symbols: tl.tensor,  # uint8 [G, group, num_symbols]; WIDE: int64, 8 symbols each
    entries: tl.tensor,  # int64 [K, 256]
    table_of: tl.tensor,  # int32 [num_streams, P]
    rows: tl.tensor,  # uint16 [num_streams, row_words]; a stream is the last `length` words of its row
    lengths: tl.tensor,  # uint16 [num_streams]
    num_streams: tl.tensor,
    num_symbols: tl.tensor,
    row_words: tl.tensor,
    group: tl.tensor,
    group_stride: tl.tensor,  # this and the next two in elements of symbols
    stream_stride: tl.tensor,
    symbol_stride: tl.tensor,
    P: tl.constexpr,
    WIDE: tl.constexpr,
    IDENTITY: tl.constexpr,  # entry that leaves a state as it is
    BLOCK_S: tl.constexpr,
) -> None:
    """Lane j of program i encodes stream i * BLOCK_S + j, eight symbols an iteration, the last ones first.

    The next symbols are loaded, and all eight entries looked up, before the chain of dependent states: Triton keeps
    the order of loads and stores.
    """
    lane = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S], as all below
    stream = lane.to(tl.int64)
    live = stream < num_streams
    mine = symbols + (lane // group).to(tl.int64) * group_stride + (lane % group).to(tl.int64) * stream_stride
    table = tl.load(table_of + stream * P, mask=live, other=0)
    row = rows + stream * row_words
    end = tl.zeros([BLOCK_S], tl.int32) + row_words
    state = tl.full([BLOCK_S], 65536, tl.uint32)
    codable = tl.full([BLOCK_S], -1, tl.int64)
    count = tl.where(live, num_symbols, 0)

    num_eights = (num_symbols + 7) // 8
    packed = tl.zeros([BLOCK_S], tl.int64)
    for back in range(num_eights + 1):
        eight = num_eights - back  # of `packed`; the first is beyond the end, and all its entries are IDENTITY
        before = tl.maximum(eight - 1, 0)
        if WIDE:
            upcoming = tl.load(mine + before, mask=live, other=0)
        else:
            upcoming = tl.zeros([BLOCK_S], tl.int64)
            for j in tl.static_range(8):
                i = before * 8 + j
                symbol = tl.load(mine + i.to(tl.int64) * symbol_stride, mask=i < count, other=0)
                upcoming |= symbol.to(tl.int64) << 8 * j
        looked_up = ()
        for j in tl.static_range(8):
            i = eight * 8 + 7 - j
            inside = i < count
            if P > 1:
                table = tl.load(table_of + stream * P + i % P, mask=inside, other=0)
            symbol = (packed >> (56 - 8 * j)) & 255
            entry = tl.load(entries + table.to(tl.int64) * 256 + symbol, mask=inside, other=IDENTITY)
            looked_up += (entry,)  # type: ignore[assignment]
        for j in tl.static_range(8):
            entry = looked_up[j]
            codable &= entry
            high = (entry >> 32).to(tl.uint32)  # type: ignore[attr-defined]
            rest = high & 4095  # 4096 - f
            full = (state >> 20) >= 4096 - rest
            tl.store(row + end - 1, state.to(tl.uint16), mask=full)
            end -= full.to(tl.int32)
            state = tl.where(full, state >> 16, state)
            quotient = tl.umulhi(state, entry.to(tl.uint32))  # right, or one too small
            short = state - quotient * (4096 - rest) >= 4096 - rest
            state += ((high >> 12) & 4095) + (quotient + short.to(tl.uint32)) * rest
        packed = upcoming
    tl.store(row + end - 1, state.to(tl.uint16), mask=live)
    tl.store(row + end - 2, (state >> 16).to(tl.uint16), mask=live)
    num_words = tl.where((codable >> 56) & 1 == 1, row_words - end + 2, 0)
    tl.store(lengths + stream, num_words.to(tl.uint16), mask=live)


@lazy_jit(do_not_specialize=["num_streams", "row_words"])
def _pack_rows(
    rows: tl.tensor,  # uint16 [num_streams, row_words]
    lengths: tl.tensor,  # uint16 [num_streams]
    ends: tl.tensor,  # int64 [num_streams]: inclusive prefix sum of lengths
    words: tl.tensor,  # uint16 [ends[-1] or more]
    num_streams: tl.tensor,
    row_words: tl.tensor,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Copy the last words of BLOCK_S rows to where they end."""
    stream = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    live = stream < num_streams
    length = tl.load(lengths + stream, mask=live, other=0).to(tl.int32)
    source = rows + (stream + 1) * row_words - length
    target = words + tl.load(ends + stream, mask=live, other=0) - length
    for first in range(0, tl.max(length, 0), BLOCK_W):
        word = first + tl.arange(0, BLOCK_W)[None, :]
        inside = word < length[:, None]  # [BLOCK_S, BLOCK_W]
        tl.store(target[:, None] + word, tl.load(source[:, None] + word, mask=inside), mask=inside)


@lazy_jit(do_not_specialize=["num_streams", "num_symbols", "num_words", "group"])
def _decode_streams(
    words: tl.tensor,  # uint16 [num_words]
    lengths: tl.tensor,  # uint16 [num_streams]
    ends: tl.tensor,  # int64 [num_streams]: inclusive prefix sum of lengths
    entries: tl.tensor,  # int32 [K, 4096]
    table_of: tl.tensor,  # int32 [num_streams, P]
    symbols: tl.tensor,  # uint8 [G, group, num_symbols]; WIDE: int64, 8 symbols each
    intact: tl.tensor,  # uint8 [num_streams]
    num_words: tl.tensor,
    num_streams: tl.tensor,
    num_symbols: tl.tensor,
    group: tl.tensor,
    group_stride: tl.tensor,  # this and the next two in elements of symbols
    stream_stride: tl.tensor,
    symbol_stride: tl.tensor,
    P: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Lane j of program i decodes stream i * BLOCK_S + j. The word that comes next is always there already."""
    lane = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S], as all below
    stream = lane.to(tl.int64)
    live = stream < num_streams
    mine = symbols + (lane // group).to(tl.int64) * group_stride + (lane % group).to(tl.int64) * stream_stride
    table = tl.load(table_of + stream * P, mask=live, other=0)
    length = tl.load(lengths + stream, mask=live, other=0).to(tl.int64)
    start = tl.load(ends + stream, mask=live, other=0) - length
    # Lengths may lie, by more than 32 bits hold.
    limit = tl.maximum(tl.minimum(length, num_words - start), 0).to(tl.int32)
    source = words + start
    state = tl.load(source, mask=limit > 0, other=0).to(tl.uint32) << 16
    state |= tl.load(source + 1, mask=limit > 1, other=0).to(tl.uint32)
    taken = tl.full([BLOCK_S], 2, tl.int32)
    word = tl.load(source + 2, mask=limit > 2, other=0)

    STEP: tl.constexpr = 8 if WIDE else 1
    for first in range(0, num_symbols, STEP):
        packed = tl.zeros([BLOCK_S], tl.int64)
        for j in tl.static_range(STEP):
            slot = table.to(tl.int64) * 4096 + (state & 4095).to(tl.int64)
            entry = tl.load(entries + slot).to(tl.uint32, bitcast=True)
            if P > 1:
                table = tl.load(table_of + stream * P + (first + j + 1) % P, mask=live, other=0)
            packed |= (entry & 255).to(tl.int64) << 8 * j
            state = (((entry >> 8) & 4095) + 1) * (state >> 12) + (entry >> 20)
            empty = state < 65536
            state = tl.where(empty, (state << 16) | word.to(tl.uint32), state)
            taken += empty.to(tl.int32)
            word = tl.load(source + taken, mask=empty & (taken < limit), other=word)
        tl.store(mine, packed.to(symbols.dtype.element_ty), mask=live)
        mine += symbol_stride
    whole = (state == 65536) & (taken == length) & (limit == length)
    tl.store(intact + stream, whole.to(tl.uint8), mask=live)


# One warp a program spreads few streams over many multiprocessors; AMD's have 64 lanes.
_LANES = 64 if torch.version.hip else 32
_PACK_STREAMS, _PACK_WORDS = 4, 256


def _encode_triton(lanes: torch.Tensor, tables: FrequencyTables, table_of: torch.Tensor, out: torch.Tensor) -> Encoded:
    """Into rows long enough for the worst case, then packed: the rows are written and read only as far as used."""
    groups, group, num_symbols = lanes.shape
    num_streams, device = groups * group, lanes.device
    row_words = max_words(num_symbols)
    rows = torch.empty((num_streams, row_words), dtype=torch.uint16, device=device)
    lengths = torch.empty(num_streams, dtype=torch.uint16, device=device)
    words_of_lanes, wide = _widen(lanes)
    _encode_streams.launch(
        (-(-num_streams // _LANES),),
        device,
        words_of_lanes,
        tables.encode_entries,
        table_of,
        rows,
        lengths,
        num_streams,
        num_symbols,
        row_words,
        group,
        *words_of_lanes.stride(),
        P=table_of.shape[1],
        WIDE=wide,
        IDENTITY=(2**32 - 1) // SLOTS | CODABLE,
        BLOCK_S=_LANES,
        num_warps=1,
    )
    ends = lengths.to(torch.int64).cumsum(0)
    _pack_rows.launch(
        (-(-num_streams // _PACK_STREAMS),),
        device,
        rows,
        lengths,
        ends,
        out,
        num_streams,
        row_words,
        BLOCK_S=_PACK_STREAMS,
        BLOCK_W=_PACK_WORDS,
        num_warps=4,
    )
    return Encoded(out, lengths, ends[-1] if num_streams else torch.zeros((), dtype=torch.int64, device=device))


def _decode_triton(
    words: torch.Tensor, lengths: torch.Tensor, tables: FrequencyTables, table_of: torch.Tensor, lanes: torch.Tensor
) -> torch.Tensor:
    groups, group, num_symbols = lanes.shape
    num_streams, device = groups * group, lanes.device
    intact = torch.empty(num_streams, dtype=torch.uint8, device=device)
    words_of_lanes, wide = _widen(lanes)
    _decode_streams.launch(
        (-(-num_streams // _LANES),),
        device,
        words,
        lengths,
        lengths.to(torch.int64).cumsum(0),
        tables.decode_entries,
        table_of,
        words_of_lanes,
        intact,
        words.numel(),
        num_streams,
        num_symbols,
        group,
        *words_of_lanes.stride(),
        P=table_of.shape[1],
        WIDE=wide,
        BLOCK_S=_LANES,
        num_warps=1,
    )
    return intact.view(torch.bool)


def _widen(lanes: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Streams of whole aligned 8-byte words as int64 `[G, S, N / 8]`, else as they are; and whether they are."""
    groups, group, num_symbols = lanes.shape
    spans = (num_symbols, lanes.stride(0), lanes.stride(1), lanes.data_ptr(), byte_offset(lanes))
    if num_symbols == 0 or lanes.stride(2) != 1 or math.gcd(8, *spans) < 8:
        return lanes, False
    strides = (lanes.stride(0) // 8, lanes.stride(1) // 8, 1)
    return reinterpret(lanes, 8, (groups, group, num_symbols // 8), strides), True


def _lanes(symbols: torch.Tensor, what: str) -> torch.Tensor:
    """`symbols` as `[G, S, N]`."""
    if symbols.dtype != torch.uint8 or symbols.dim() not in (2, 3):
        raise KernelArgumentError(
            f"{what} is {symbols.dtype} of shape {tuple(symbols.shape)}; it must be uint8 [S, N] or [G, S, N]"
        )
    if symbols.shape[-1] > MAX_SYMBOLS:
        raise KernelArgumentError(f"{what} has {symbols.shape[-1]} symbols a stream; the most is {MAX_SYMBOLS}")
    return symbols if symbols.dim() == 3 else symbols.unsqueeze(0)


def _check(lanes: torch.Tensor, tables: FrequencyTables, table_of: torch.Tensor) -> None:
    num_streams = lanes.shape[0] * lanes.shape[1]
    if lanes.device != tables.device:
        raise KernelArgumentError(f"symbols are on {lanes.device}; they must be on {tables.device}, as the tables are")
    if table_of.dim() != 2 or table_of.shape[0] != num_streams or table_of.shape[1] == 0:
        raise KernelArgumentError(f"table_of has shape {tuple(table_of.shape)}; it must be [{num_streams}, P], P >= 1")
    _check_dense(table_of, "table_of", torch.int32, tables.device)
    if tables.device.type == "cpu" and num_streams:
        low, high = torch.aminmax(table_of)
        if low < 0 or high >= tables.num_tables:
            raise KernelArgumentError(f"table_of holds {int(low)} .. {int(high)}; there are {tables.num_tables} tables")


def _check_dense(tensor: torch.Tensor, what: str, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise KernelArgumentError(
            f"{what} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; it must be a dense {dtype} "
            f"on {device}, as the tables are"
        )
    if what != "table_of" and tensor.dim() != 1:
        raise KernelArgumentError(f"{what} has shape {tuple(tensor.shape)}; it must have one dimension")
