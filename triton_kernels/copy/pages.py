"""Copies between the pages of a paged KV cache and a contiguous chunk, all layers in one launch.

A plane is L layers, each a view `[B, H, N, C]`: blocks, heads, tokens a block, content elements. Two granularities:

    gather_pages / scatter_pages     whole pages, verbatim: how a page is laid out inside is the engine's business
    gather_tokens / scatter_tokens   single tokens: slot s is token s % N of block s // N

Both are one operation on *units* (`Units`): a page is a unit of one strip of H*N*C elements, a token is a unit of H
strips of C elements, or of one strip of H*C where the heads of a token are neighbours in memory.

    chunk [L, n, unit]   |unit 0: strip|strip|..|unit 1: strip|strip|..|  ...          one layer, contiguous
    layer                .. strip ..... strip ............ strip ..... strip ..        any strides

On a GPU, and under the interpreter, `copy_rows` of kernel.py does it; on a CPU numpy does.

Bytes move as integer words, the widest that every address allows, so any dtype is copied bit for bit. A negative id
skips its unit: that part of the destination keeps what it held. Writing one unit twice in a scatter leaves either of
the two values. Ids beyond the cache are refused on a CPU; on a GPU, where looking would stall the stream, keeping them
in range is the caller's duty. Nothing is synchronised: on a GPU the copy is queued on the current stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.copy.kernel import launch_copy
from lmcache.kernels.launch import runs_kernel
from lmcache.kernels.layers import PagedLayers, Units, byte_offset, reinterpret


def gather_pages(pages: PagedLayers, block_ids: torch.Tensor, out: torch.Tensor, first_layer: int = 0) -> None:
    """Copy pages `block_ids[i]` of layers first_layer.. to `out[:, i]`; a negative id leaves its rows of `out` alone.

    `block_ids`: int64 `[n]`. `out`: any dtype, `[l, n, ...]` holding `page_bytes` a row, rows of a layer contiguous,
    layers at any stride; l says how many layers. Both on the device of `pages`. Needs `pages.pages_are_dense`.
    """
    _copy(pages, pages.page_units, block_ids, out, first_layer, scatter=False, what="block_ids")


def scatter_pages(pages: PagedLayers, block_ids: torch.Tensor, chunk: torch.Tensor, first_layer: int = 0) -> None:
    """The inverse of gather_pages: write `chunk[:, i]` to pages `block_ids[i]`; a negative id writes nothing."""
    _copy(pages, pages.page_units, block_ids, chunk, first_layer, scatter=True, what="block_ids")


def gather_tokens(pages: PagedLayers, slots: torch.Tensor, out: torch.Tensor, first_layer: int = 0) -> None:
    """Copy the tokens at `slots[t]` of layers first_layer.. to `out[:, t]`; a negative slot leaves its rows alone.

    `slots`: int64 `[T]`. `out`: any dtype, `[l, T, ...]` holding `token_bytes` a row in the order `[H, C]`, rows of a
    layer contiguous, layers at any stride. Only meaningful where a block is a plain `[H, N, C]`: vLLM's CPU attention
    packs blocks its own way, and its pages can only be moved whole.
    """
    _copy(pages, pages.token_units, slots, out, first_layer, scatter=False, what="slots")


def scatter_tokens(pages: PagedLayers, slots: torch.Tensor, chunk: torch.Tensor, first_layer: int = 0) -> None:
    """The inverse of gather_tokens: write `chunk[:, t]` to `slots[t]`; a negative slot writes nothing."""
    _copy(pages, pages.token_units, slots, chunk, first_layer, scatter=True, what="slots")


def gather_pages_torch(pages: PagedLayers, block_ids: torch.Tensor, out: torch.Tensor, first_layer: int = 0) -> None:
    """The definition of gather_pages in torch."""
    _copy_torch(pages, pages.page_units, block_ids, out, first_layer, scatter=False)


def scatter_pages_torch(pages: PagedLayers, block_ids: torch.Tensor, chunk: torch.Tensor, first_layer: int = 0) -> None:
    """The definition of scatter_pages in torch."""
    _copy_torch(pages, pages.page_units, block_ids, chunk, first_layer, scatter=True)


def gather_tokens_torch(pages: PagedLayers, slots: torch.Tensor, out: torch.Tensor, first_layer: int = 0) -> None:
    """The definition of gather_tokens in torch."""
    _copy_torch(pages, pages.token_units, slots, out, first_layer, scatter=False)


def scatter_tokens_torch(pages: PagedLayers, slots: torch.Tensor, chunk: torch.Tensor, first_layer: int = 0) -> None:
    """The definition of scatter_tokens in torch."""
    _copy_torch(pages, pages.token_units, slots, chunk, first_layer, scatter=True)


def _copy(
    pages: PagedLayers,
    units: Units,
    ids: torch.Tensor,
    chunk: torch.Tensor,
    first_layer: int,
    *,
    scatter: bool,
    what: str,
) -> None:
    check_ids(pages, units, ids, what)
    check_chunk(pages, units, ids, chunk, first_layer, "chunk" if scatter else "out", pages.device)
    if ids.numel() == 0 or chunk.numel() == 0:
        return
    if runs_kernel(pages.device):
        launch_copy(pages, units, ids, chunk, first_layer, scatter=scatter)
    else:
        _copy_host(pages, units, ids, chunk, first_layer, scatter=scatter)


def _copy_torch(
    pages: PagedLayers, units: Units, ids: torch.Tensor, chunk: torch.Tensor, first_layer: int, *, scatter: bool
) -> None:
    """The definition: `chunk[l, i] = layer[block, :, unit]` or the reverse, in words, for every id >= 0."""
    live = torch.nonzero(ids >= 0).flatten()
    block, unit = ids[live] // units.per_block, ids[live] % units.per_block
    for layer, part in _layer_pairs(pages, units, chunk, first_layer):
        for there, here in zip(layer, part, strict=True):  # [blocks, strips, per_block, words], [n, strips, words]
            if scatter:
                there[block, :, unit] = here[live]
            else:
                here[live] = there[block, :, unit]


def _copy_host(
    pages: PagedLayers, units: Units, ids: torch.Tensor, chunk: torch.Tensor, first_layer: int, *, scatter: bool
) -> None:
    """On a CPU: one strided copy, all layers at once, for each run of successive ids; row by row where runs are short.

    numpy copies in the calling thread, with the GIL released. torch would use all threads of its pool: up to twice
    the rate on an idle machine of two cores, but a tenth or less of it as soon as anyone else wants a core, because
    every small copy then waits for the slowest thread (measured; README.md).
    """
    rows = ids.numpy()
    runs = _runs(rows, units)
    all_live = sum(length for *_, length in runs) == len(rows)
    short = units.blocks == units.strips == 1 and all_live and 2 * len(runs) > len(rows) > 1
    for layers, part in _layer_pairs(pages, units, chunk, first_layer):
        there = layers.numpy().swapaxes(2, 3)  # [l, blocks, per_block, strips, words]
        here = part.numpy()  # [l, n, strips, words]
        if short and (scatter or layers[0, 0, 0].is_contiguous()):  # np.take would copy all of a strided layer first
            for layer, chunk_rows in zip(there[:, 0, :, 0], here[:, :, 0], strict=True):
                if scatter:
                    layer[rows] = chunk_rows
                else:
                    np.take(layer, rows, axis=0, out=chunk_rows, mode="clip")
            continue
        for position, block, unit, length in runs:
            page_side = there[:, block, unit : unit + length]
            chunk_side = here[:, position : position + length]
            if scatter:
                np.copyto(page_side, chunk_side)
            else:
                np.copyto(chunk_side, page_side)


def _runs(ids: np.ndarray[Any, np.dtype[np.int64]], units: Units) -> list[tuple[int, int, int, int]]:
    """(position, block, unit, length) of each maximal run of successive ids >= 0 within one block."""
    cut = (np.diff(ids) != 1) | (ids[:-1] < 0) | (ids[1:] % units.per_block == 0)
    starts = np.concatenate(([0], np.flatnonzero(cut) + 1))
    lengths = np.diff(starts, append=len(ids))
    found = zip(starts.tolist(), ids[starts].tolist(), lengths.tolist(), strict=True)
    return [(start, *divmod(first, units.per_block), length) for start, first, length in found if first >= 0]


def _layer_pairs(
    pages: PagedLayers, units: Units, chunk: torch.Tensor, first_layer: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """By storage: layers `[l, blocks, strips, per_block, words]`, their part of the chunk `[l, n, strips, words]`."""
    num_layers, n = chunk.shape[:2]
    layer_stride = chunk.stride(0) * chunk.element_size()
    word = math.gcd(pages.word_bytes(units), byte_offset(chunk), layer_stride)
    strip = units.strip_bytes // word
    strides = (layer_stride // word, units.unit_bytes // word, strip, 1)
    chunk_words = reinterpret(chunk, word, (num_layers, n, units.strips, strip), strides)
    for first, every, plane in pages.planes(units, word):
        low = max(0, -((first - first_layer) // every))  # the first of the plane's layers that is asked for
        here = first + low * every - first_layer
        part = chunk_words[here::every][: max(0, plane.shape[0] - low)]
        if len(part):
            yield plane[low : low + len(part)], part


def check_ids(pages: PagedLayers, units: Units, ids: torch.Tensor, what: str) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        raise KernelArgumentError(
            f"{what} is {ids.dtype} of shape {tuple(ids.shape)}, strides {ids.stride()}; it must be a dense int64 [n]"
        )
    if ids.device != pages.device:
        raise KernelArgumentError(f"{what} is on {ids.device}; it must be on {pages.device}, as the pages are")
    if ids.device.type == "cpu" and ids.numel() and (highest := int(ids.max())) >= units.count:
        raise KernelArgumentError(f"{what} holds {highest}; the cache has {units.count}, and a negative one is skipped")


def check_layers(pages: PagedLayers, first_layer: int, num_layers: int, what: str) -> None:
    if first_layer < 0 or first_layer + num_layers > pages.num_layers:
        raise KernelArgumentError(
            f"{what} holds {num_layers} layers, from first_layer={first_layer}; there are {pages.num_layers}"
        )


def check_chunk(
    pages: PagedLayers,
    units: Units,
    ids: torch.Tensor,
    chunk: torch.Tensor,
    first_layer: int,
    what: str,
    device: torch.device,
) -> None:
    if chunk.device != device:
        where = "as the pages are" if device == pages.device else "in host memory"
        raise KernelArgumentError(f"{what} is on {chunk.device}; it must be on {device}, {where}")
    if chunk.dim() < 3 or chunk.shape[1] != len(ids):
        raise KernelArgumentError(
            f"{what} has shape {tuple(chunk.shape)}; it must be [layers, {len(ids)}, ...] for {len(ids)} ids"
        )
    check_layers(pages, first_layer, len(chunk), what)
    row_bytes = math.prod(chunk.shape[2:]) * chunk.element_size()
    if row_bytes != units.unit_bytes:
        raise KernelArgumentError(
            f"{what} of shape {tuple(chunk.shape)}, {chunk.dtype}, has {row_bytes} bytes a row; "
            f"{units.unit_bytes} are moved"
        )
    if chunk.numel() and not chunk[0].is_contiguous():
        raise KernelArgumentError(f"{what} has strides {chunk.stride()}; the rows of a layer must be contiguous")
