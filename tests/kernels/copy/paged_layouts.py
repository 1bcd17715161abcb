"""Paged caches in every layout that vLLM has, inside red zones, and the copies as plain loops over numpy arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from lmcache.kernels import PagedLayers

ORDERS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC", "LHBNC", "BHLNC")
# Pages of these are one run of bytes.
DENSE_ORDERS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
RED_ZONE = 4096

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """L layers of [B, H, N, C]; the gaps are elements that belong to nobody after each block and each content."""

    L: int = 2
    B: int = 24
    H: int = 2
    N: int = 4
    C: int = 16
    block_gap: int = 0
    content_gap: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the elements of a cache lie in one buffer of bytes: `order` outermost first, as vLLM names it."""

    order: str
    shape: Shape
    dtype: torch.dtype
    start: int = RED_ZONE

    @property
    def strides(self) -> dict[str, int]:
        """Elements from one index to the next; C is the innermost of every order."""
        strides, step = {}, 1
        for dim in reversed(self.order):
            if dim == "B":
                step += self.shape.block_gap
            strides[dim] = step
            step *= getattr(self.shape, dim)
            if dim == "C":
                step += self.shape.content_gap
        return strides

    @property
    def nbytes(self) -> int:
        """The whole buffer, red zones included."""
        extent = 1 + sum((getattr(self.shape, dim) - 1) * step for dim, step in self.strides.items())
        return self.start + extent * self.dtype.itemsize + RED_ZONE

    def views(self, buffer: torch.Tensor, *, as_integers: bool = False) -> list[torch.Tensor]:
        """[B, H, N, C] of each layer in `buffer` (uint8)."""
        size, s, k = self.dtype.itemsize, self.shape, self.strides
        dtype = _INTEGERS[size] if as_integers else self.dtype
        flat = buffer[self.start : self.start + (buffer.numel() - self.start) // size * size].view(dtype)
        steps = (k["B"], k["H"], k["N"], 1)
        return [flat[layer * k["L"] :].as_strided((s.B, s.H, s.N, s.C), steps) for layer in range(s.L)]

    def page_start(self, layer: int, block: int) -> int:
        """Byte of the buffer where a page begins (dense layouts)."""
        return self.start + (layer * self.strides["L"] + block * self.strides["B"]) * self.dtype.itemsize


def random_bytes(n: int, seed: int = 0) -> torch.Tensor:
    """Every bit pattern, NaNs and infinities of every dtype included."""
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Chunk:
    """A chunk [l, n, row bytes] inside red zones, optionally with `pad` unused rows after each layer."""

    buffer: torch.Tensor
    start: int
    layers: int
    n: int
    row: int
    pad: int = 0

    @classmethod
    def make(
        cls, layers: int, n: int, row: int, *, poison: bool, pad: int = 0, start: int = RED_ZONE, device: str = "cpu"
    ) -> Chunk:
        nbytes = start + layers * (n + pad) * row + RED_ZONE
        buffer = torch.full((nbytes,), 0xFF, dtype=torch.uint8) if poison else random_bytes(nbytes, seed=1)
        return cls(buffer.to(device), start, layers, n, row, pad)

    @property
    def view(self) -> torch.Tensor:
        step = (self.n + self.pad) * self.row
        return self.buffer[self.start :].as_strided((self.layers, self.n, self.row), (step, self.row, 1), self.start)

    def rows(self, buffer: Bytes) -> Bytes:
        """`view`, of a copy of the buffer."""
        body = buffer[self.start : self.start + self.layers * (self.n + self.pad) * self.row]
        return body.reshape(self.layers, self.n + self.pad, self.row)[:, : self.n]


def expected(
    layout: Layout, cache: torch.Tensor, chunk: Chunk, ids: list[int], what: str, first_layer: int = 0
) -> tuple[Bytes, Bytes]:
    """Buffers of the cache and of the chunk after `what`, e.g. "scatter_tokens", one unit at a time."""
    cache, chunk_buffer = cache.cpu().clone(), chunk.buffer.cpu().clone().numpy()
    rows = chunk.rows(chunk_buffer)
    layers = [view.numpy() for view in layout.views(cache, as_integers=True)]
    raw = cache.numpy()
    for layer in range(chunk.layers):
        for i, unit in enumerate(ids):
            if unit < 0:
                continue
            if what.endswith("pages"):
                start = layout.page_start(first_layer + layer, unit)
                there = raw[start : start + chunk.row]
                here = rows[layer, i]
            else:
                block, token = divmod(unit, layout.shape.N)
                there = layers[first_layer + layer][block, :, token]  # [H, C]
                here = rows[layer, i].view(there.dtype).reshape(there.shape)
            if what.startswith("scatter"):
                there[...] = here
            else:
                here[...] = there
    return raw, chunk_buffer


def paged(layout: Layout, buffer: torch.Tensor) -> PagedLayers:
    return PagedLayers(layout.views(buffer))
