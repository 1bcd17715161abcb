"""The one kernel that copies between pages and a chunk: every gather, scatter and host transfer on a GPU launches it.

A layer's units (pages or tokens) are cut into strips of contiguous words, and the strips into tiles of at most 1,024
words. Tile i of a launch is columns `i % COLUMNS` of rows `i // COLUMNS % row_tiles` of layer `i // COLUMNS //
row_tiles`. A program moves tiles i, i + programs, i + 2 * programs, ..: copies within the device's memory start a
program for every tile, direct copies to host memory only a few, because a link is slower than memory.

    rows of one layer, STRIPS = 2:   unit 0 strip 0 | unit 0 strip 1 | unit 1 strip 0 | ..     one row of words each
    chunk side                       row r begins at word r * STRIP
    page side                        strip s of unit u begins where ids[u] and the layer's strides say
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lmcache.kernels.launch import lazy_jit
from lmcache.kernels.layers import PagedLayers, Units, byte_offset

if TYPE_CHECKING:
    import triton.language as tl


@lazy_jit(do_not_specialize=["address", "first_layer", "num_rows", "num_tiles", "row_tiles"])
def copy_rows(
    pointers: tl.tensor,  # int64 [L]: address of each layer
    ids: tl.tensor,  # int64 [n]
    address: tl.tensor,  # of the chunk, words [l, n, STRIPS, STRIP], on the device or in pinned host memory
    first_layer: tl.tensor,
    num_rows: tl.tensor,  # n * STRIPS
    num_tiles: tl.tensor,  # l * row_tiles * COLUMNS
    row_tiles: tl.tensor,  # tiles that the rows of a layer make
    chunk_layer_stride: tl.tensor,  # this and the next three in words
    block_stride: tl.tensor,
    unit_stride: tl.tensor,
    strip_stride: tl.tensor,
    COLUMNS: tl.constexpr,  # tiles that a strip makes
    WORD: tl.constexpr,  # bytes
    PER_BLOCK: tl.constexpr,  # units a block; 0 where all units of a layer are evenly spaced
    STRIPS: tl.constexpr,
    STRIP: tl.constexpr,  # words a strip
    ALIGN: tl.constexpr,  # bytes that divide the address of every strip, in the layers and in the chunk
    SCATTER: tl.constexpr,  # from the chunk to the pages
    ZEROS: tl.constexpr,  # gather: a skipped unit leaves zeros in the chunk, rather than what was there
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    word_type: tl.constexpr = (
        tl.int64 if WORD == 8 else (tl.int32 if WORD == 4 else (tl.int16 if WORD == 2 else tl.uint8))
    )
    chunk = address.to(tl.int64).to(tl.pointer_type(word_type))
    tile = tl.program_id(0).to(tl.int64)
    while tile < num_tiles:
        word = (tile % COLUMNS).to(tl.int32) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
        row = tile // COLUMNS % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        j = tile // COLUMNS // row_tiles
        layer = tl.load(pointers + first_layer + j).to(tl.pointer_type(word_type))

        unit = tl.load(ids + row // STRIPS, mask=row < num_rows, other=-1)  # [BLOCK_R]
        live = (unit >= 0)[:, None] & (word < STRIP)[None, :]  # [BLOCK_R, BLOCK_W]
        offset = row % STRIPS * strip_stride
        if PER_BLOCK == 0:
            offset += unit * unit_stride
        else:
            offset += unit // PER_BLOCK * block_stride + unit % PER_BLOCK * unit_stride

        page_rows = tl.multiple_of(layer + offset, ALIGN)  # [BLOCK_R]
        chunk_rows = tl.multiple_of(chunk + j * chunk_layer_stride + row * STRIP, ALIGN)  # [BLOCK_R]
        page_words = page_rows[:, None] + word[None, :]  # [BLOCK_R, BLOCK_W]
        chunk_words = chunk_rows[:, None] + word[None, :]
        if SCATTER:
            tl.store(page_words, tl.load(chunk_words, mask=live), mask=live)
        elif ZEROS:
            inside = (row < num_rows)[:, None] & (word < STRIP)[None, :]
            tl.store(chunk_words, tl.load(page_words, mask=live, other=0), mask=inside)
        else:
            tl.store(chunk_words, tl.load(page_words, mask=live), mask=live)
        tile += tl.num_programs(0)


# 8 KiB of 8-byte words a program: 4 loads of 16 bytes in flight a thread on NVIDIA (128 threads), 2 on AMD (256).
_TILE_WORDS = 1024
_NUM_WARPS = 4


def _tile(strip: int, word: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_W) for strips of that many words: as wide as leaves no ragged end, unless that is narrow."""
    exact = strip & -strip  # the largest power of two that divides it
    width = exact if exact * word >= 64 else 1 << (strip - 1).bit_length()
    width = min(width, _TILE_WORDS)
    return _TILE_WORDS // width, width


def launch_copy(
    pages: PagedLayers,
    units: Units,
    ids: torch.Tensor,
    chunk: torch.Tensor,
    first_layer: int,
    *,
    scatter: bool,
    zeros: bool = False,
    address: int | None = None,
    programs: int | None = None,
) -> None:
    """Queue the copy between `pages` and `chunk` on the current stream; both were checked by the caller.

    `address`: where kernels find the chunk, if that is not its own address. `programs`: at most so many; otherwise one
    for each tile.
    """
    num_layers, n = chunk.shape[:2]
    layer_stride = chunk.stride(0) * chunk.element_size()
    steps = (layer_stride, units.block_stride, units.unit_stride, units.strip_stride)
    align = math.gcd(16, chunk.data_ptr(), byte_offset(chunk), pages.address_gcd, units.strip_bytes, *steps)
    word = min(align, 8)
    num_rows, strip = n * units.strips, units.strip_bytes // word
    block_r, block_w = _tile(strip, word)
    row_tiles, columns = -(-num_rows // block_r), -(-strip // block_w)
    tiles = row_tiles * num_layers * columns
    copy_rows.launch(
        (min(tiles, programs or tiles),),
        pages.device,
        pages.pointers,
        ids,
        chunk.data_ptr() if address is None else address,
        first_layer,
        num_rows,
        tiles,
        row_tiles,
        *(step // word for step in steps),
        COLUMNS=columns,
        WORD=word,
        PER_BLOCK=0 if units.blocks == 1 else units.per_block,
        STRIPS=units.strips,
        STRIP=strip,
        ALIGN=align,
        SCATTER=scatter,
        ZEROS=zeros,
        BLOCK_R=block_r,
        BLOCK_W=block_w,
        num_warps=_NUM_WARPS,
    )
