"""Pages <-> chunks: one launch a plane for all layers, one copy a chunk between device and host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lmcache.engine.layout import PagedCache, Plane
from lmcache.kernels import gather_pages, gather_tokens, scatter_pages, scatter_tokens
from lmcache.storage.base import Buffer

# One table a cache group: the block ids of a request, int64 on the device; negative: no block there.
BlockTables = Sequence[torch.Tensor]


class PageMover:
    """Moves chunks between an engine's pages and pool buffers.

    On a CPU the kernels' torch path reads and writes the pool buffer itself. On a GPU a chunk is gathered into a
    device buffer and copied to pinned memory in one DMA on the current stream; ``synchronize`` waits for it.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._on_host = cache.device.type == "cpu"

    def tables(self, block_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Block ids of every group as tensors on the device."""
        return [torch.tensor(ids, dtype=torch.int64, device=self.cache.device) for ids in block_ids]

    def gather(self, tables: BlockTables, start: int, stop: int, into: Buffer) -> None:
        """Pages of token positions ``[start, stop)`` (whole blocks) -> ``into``."""
        host = torch.frombuffer(into.view, dtype=torch.uint8)
        flat = host if self._on_host else torch.empty(into.nbytes, dtype=torch.uint8, device=self.cache.device)
        for plane, part in self._parts(flat, stop - start):
            ids = tables[plane.group][start // plane.block_tokens : stop // plane.block_tokens]
            if self.cache.opaque:
                gather_pages(plane.pages, ids, part)
            else:
                gather_tokens(plane.pages, self._slots(plane, ids), part)
        if flat is not host:
            host.copy_(flat, non_blocking=True)

    def scatter(self, tables: BlockTables, start: int, stop: int, chunk: Buffer, *, write: tuple[int, int]) -> None:
        """``chunk``, which holds token positions ``[start, stop)`` -> pages, but only the positions in ``write``.

        All positions are multiples of the block; a table need not reach further than ``write`` does.
        """
        host = torch.frombuffer(chunk.view, dtype=torch.uint8)
        flat = host if self._on_host else host.to(self.cache.device, non_blocking=True)
        first, last = max(start, write[0]), min(stop, write[1])
        for plane, part in self._parts(flat, stop - start):
            size = plane.block_tokens
            ids = tables[plane.group][first // size : last // size]
            if self.cache.opaque:
                scatter_pages(plane.pages, ids, part[:, (first - start) // size : (last - start) // size])
            else:
                slots = torch.full((stop - start,), -1, dtype=torch.int64, device=self.cache.device)
                slots[first - start : last - start] = self._slots(plane, ids)
                scatter_tokens(plane.pages, slots, part)

    def synchronize(self) -> None:
        """Wait until every copy that was started has ended."""
        if not self._on_host:
            torch.cuda.current_stream(self.cache.device).synchronize()

    def _parts(self, flat: torch.Tensor, tokens: int) -> Iterator[tuple[Plane, torch.Tensor]]:
        offset = 0
        for plane in self.cache.planes:
            pages, blocks = plane.pages, tokens // plane.block_tokens
            nbytes = self.cache.plane_bytes(plane, tokens)
            part = flat[offset : offset + nbytes]
            offset += nbytes
            if self.cache.opaque:
                yield plane, part.view(pages.num_layers, blocks, pages.page_bytes)
            else:
                yield plane, part.view(pages.dtype).view(pages.num_layers, tokens, pages.heads, pages.content)

    @staticmethod
    def _slots(plane: Plane, ids: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(plane.block_tokens, device=ids.device)
        return torch.where(ids[:, None] < 0, -1, ids[:, None] * plane.block_tokens + offsets).flatten()
