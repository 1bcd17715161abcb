"""Reads and writes single tokens of an engine's pages.

On a GPU a token is a row of its page. vLLM's CPU attention keeps the tokens of a page in an order of its own: those
pages are unpacked into plain memory, and packed again to be written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmcache.engine.layout import PagedCache, Plane
from lmcache.kernels import PagedLayers, gather_pages, gather_tokens, scatter_pages
from lmcache.kernels.copy.cpu_blocks import ISAS, pack_cpu_blocks, unpack_cpu_blocks


@dataclass(frozen=True)
class TokenView:
    """Tokens one by one: pages and slots in them. rows: their memory `[L, T, H, C]` where it is not the engine's."""

    pages: PagedLayers
    slots: torch.Tensor
    rows: torch.Tensor


class TokenPages:
    """The tokens in the pages of one cache; for opaque pages their order inside must be known (``can_read``)."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache

    def can_read(self, plane: Plane) -> bool:
        """Whether single tokens of this plane are known."""
        return bool(plane.sides) and (not self.cache.opaque or is_plain(plane) or self.cache.cpu_isa in ISAS)

    def rows(self, plane: Plane, ids: torch.Tensor) -> torch.Tensor:
        """The tokens of blocks ``ids``, a copy `[L, T, H, C]`; 0 for a negative id."""
        if self.cache.opaque:
            return self.read(plane, ids).rows
        pages, slots = plane.pages, plane.slots(ids)
        shape = (pages.num_layers, len(slots), pages.heads, pages.content)
        out = torch.zeros(shape, dtype=pages.dtype, device=slots.device)
        gather_tokens(pages, slots, out)
        return out

    def view(self, plane: Plane, ids: torch.Tensor) -> TokenView:
        """The tokens of blocks ``ids``; where the engine's blocks are opaque, in plain memory yet to be filled."""
        if not self.cache.opaque:
            return TokenView(plane.pages, plane.slots(ids), plane.pages.layers[0][:0])
        tokens = len(ids) * plane.block_tokens
        pages = plane.pages
        rows = torch.zeros(pages.num_layers, tokens, pages.heads, pages.content, dtype=pages.dtype)
        slots = torch.where(ids.repeat_interleave(plane.block_tokens) < 0, -1, torch.arange(tokens))
        return TokenView(PagedLayers([layer[None].transpose(1, 2) for layer in rows]), slots, rows)

    def read(self, plane: Plane, ids: torch.Tensor) -> TokenView:
        """The view, filled."""
        view = self.view(plane, ids)
        if self.cache.opaque:
            blocks = torch.zeros(plane.pages.num_layers, len(ids), plane.pages.page_bytes, dtype=torch.uint8)
            gather_pages(plane.pages, ids, blocks)
            if is_plain(plane):
                view.rows.copy_(blocks.view(plane.pages.dtype).view(view.rows.shape))
            else:
                unpack_cpu_blocks(self._split(plane, blocks), plane.sides[0].width, self._isa, view.rows)
        return view

    def write_back(self, plane: Plane, view: TokenView, ids: torch.Tensor) -> None:
        """A view's tokens to the pages of blocks ``ids``, where they are not those already."""
        if not self.cache.opaque:
            return
        blocks = torch.empty(plane.pages.num_layers, len(ids), plane.pages.page_bytes, dtype=torch.uint8)
        if is_plain(plane):
            blocks.view(plane.pages.dtype).view(view.rows.shape).copy_(view.rows)
        else:
            pack_cpu_blocks(view.rows, plane.sides[0].width, self._isa, self._split(plane, blocks))
        scatter_pages(plane.pages, ids, blocks)

    def _split(self, plane: Plane, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks as the attention sees them: vLLM may have split each into smaller ones."""
        return blocks.view(len(blocks), blocks.shape[1] * (plane.block_tokens // plane.kernel_tokens), -1)

    @property
    def _isa(self) -> str:
        return self.cache.cpu_isa or ""


def is_plain(plane: Plane) -> bool:
    """Whether a head's content is one side: pages of it are in no order of an attention's own."""
    return len(plane.sides) == 1
