"""Moves raw chunks between an engine's pages, on a GPU or a CPU, and buffers in host memory.

On a GPU one or two kernels a plane gather all layers of a chunk, and its DMA runs beside the kernels of the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lmcache.engine.layout import PagedCache, Plane
from lmcache.kernels.copy.calibration import calibrate
from lmcache.kernels.copy.host import HostTransfer
from lmcache.storage.base import Buffer

# One table a cache group: the block ids of a request, int64 on the device; negative: no block there.
BlockTables = Sequence[torch.Tensor]


class PageMover:
    """Moves chunks between an engine's pages and pool buffers.

    On a CPU the pool buffer itself is read and written. On a GPU copies are queued (``lmcache.kernels.copy.host``), the
    kernels on the current stream; ``synchronize`` waits for all of them.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._transfer = HostTransfer(cache.device)
        calibrate(self._transfer)

    def tables(self, block_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Block ids of every group as tensors on the device."""
        on_host = self.cache.device.type == "cpu"
        # A copy from memory that is not pinned would wait for the stream.
        tables = [torch.tensor(ids, dtype=torch.int64, pin_memory=not on_host) for ids in block_ids]
        return tables if on_host else [table.to(self.cache.device, non_blocking=True) for table in tables]

    def gather(self, tables: BlockTables, start: int, stop: int, into: Buffer) -> None:
        """Pages of token positions ``[start, stop)`` (whole blocks) -> ``into``; zeros where there is no block."""
        for plane, part in self._parts(into, stop - start):
            ids = tables[plane.group][start // plane.block_tokens : stop // plane.block_tokens]
            if self.cache.opaque:
                self._transfer.copy_to_host(plane.pages, ids, part, whole_pages=True)
            else:
                self._transfer.copy_to_host(plane.pages, plane.slots(ids), part)

    def scatter(self, tables: BlockTables, start: int, stop: int, chunk: Buffer, *, write: tuple[int, int]) -> None:
        """``chunk``, which holds token positions ``[start, stop)`` -> pages, but only the positions in ``write``.

        All positions are multiples of the block; a table need not reach further than ``write`` does.
        """
        first, last = max(start, write[0]), min(stop, write[1])
        if first >= last:
            return
        for plane, part in self._parts(chunk, stop - start):
            size = plane.block_tokens
            ids = tables[plane.group][first // size : last // size]
            if self.cache.opaque:
                rows = part[:, (first - start) // size : (last - start) // size]
                self._transfer.copy_from_host(plane.pages, ids, rows, whole_pages=True)
            else:
                self._transfer.copy_from_host(plane.pages, plane.slots(ids), part[:, first - start : last - start])

    def synchronize(self) -> None:
        """Wait until every copy that was started has ended."""
        if self.cache.device.type != "cpu":
            self._transfer.join()
            torch.cuda.current_stream(self.cache.device).synchronize()

    def _parts(self, buffer: Buffer, tokens: int) -> Iterator[tuple[Plane, torch.Tensor]]:
        """Each plane's part of a chunk: ``[l, blocks, page bytes]`` (opaque) or ``[l, tokens, H, C]``."""
        flat = torch.frombuffer(buffer.view, dtype=torch.uint8)
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
