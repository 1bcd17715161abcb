"""Where an engine keeps KV: planes of pages, and how a chunk of them is laid out in bytes.

A *plane* is a set of layers that share a block table and a page shape ``[H, N, C]``. A plain model has one plane; a
hybrid model (sliding window and full attention) has one per cache group, and planes of different groups may alias the
same memory: a block id belongs to one group at a time, so only the layers of the owning group are ever touched.

A chunk is, plane after plane, layer-major:

    token layout    [L, T, H, C]              a token is addressable inside a page (GPU backends)
    opaque layout   [L, T / N, page bytes]    only whole pages mean anything (vLLM's CPU attention)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lmcache.errors import UnsupportedLayoutError
from lmcache.kernels import PagedLayers
from lmcache.kernels.sides import Side
from lmcache.keys import PlaneFormat

DEFAULT_CHUNK_TOKENS = 64


def chunk_tokens(wanted: int | None, unit: int) -> int:
    """Tokens of a chunk: ``wanted`` rounded up to whole blocks of ``unit`` tokens. The default is small, so that little
    is left to recompute where prompts part; a chunk of a large model still has megabytes."""
    return -(-(wanted or DEFAULT_CHUNK_TOKENS) // unit) * unit


@dataclass(frozen=True)
class Plane:
    """Layers of one cache group with equal page shape.

    pages: one page a block of the engine's block table. group: index of that table.
    window: sliding window in tokens, 0 for full attention. kind: the attention's name, part of the format.
    sides: where keys and values lie in C; () where that is not known, and codecs cannot be used.
    layer_numbers: of the layers in the model. first_head: of the KV heads, in the model. kernel_tokens: tokens of a
    block as the attention sees it, where that is less than a block of the block table.
    """

    group: int
    names: tuple[str, ...]
    pages: PagedLayers
    kind: str = "full_attention"
    window: int = 0
    sides: tuple[Side, ...] = ()
    first_head: int = 0
    kernel_tokens: int = 0
    layer_numbers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        numbers = [re.findall(r"\d+", name) for name in self.names]
        object.__setattr__(self, "layer_numbers", tuple(int(found[0]) if found else 0 for found in numbers))
        object.__setattr__(self, "kernel_tokens", self.kernel_tokens or self.pages.block_tokens)

    def slots(self, ids: torch.Tensor) -> torch.Tensor:
        """The slots of all tokens of blocks ``ids`` int64 `[n]`, on their device; negative for a negative block."""
        offsets = torch.arange(self.block_tokens, device=ids.device)
        return torch.where(ids[:, None] < 0, -1, ids[:, None] * self.block_tokens + offsets).flatten()

    @property
    def block_tokens(self) -> int:
        return self.pages.block_tokens

    def format(self) -> PlaneFormat:
        return PlaneFormat(
            group=self.group,
            layers=self.names,
            heads=self.pages.heads,
            block_tokens=self.pages.block_tokens,
            content=self.pages.content,
            dtype=str(self.pages.dtype).removeprefix("torch."),
            kind=self.kind,
            window=self.window,
        )


class PagedCache:
    """All of an engine's KV pages on one device.

    opaque: only whole pages mean anything. cpu_isa: how they are ordered inside, where that is known.
    """

    def __init__(self, planes: Sequence[Plane], *, opaque: bool, cpu_isa: str | None = None) -> None:
        if not planes:
            raise UnsupportedLayoutError("the engine has no KV cache to move: no plane given")
        self.planes = tuple(planes)
        self.opaque = opaque
        self.cpu_isa = cpu_isa
        self.unit = math.lcm(*(plane.block_tokens for plane in planes))
        self.device = planes[0].pages.device
        for plane in planes:
            if plane.pages.device != self.device:
                raise UnsupportedLayoutError(f"planes on one device expected, got {self.device}, {plane.pages.device}")
            if opaque and not plane.pages.pages_are_dense:
                raise UnsupportedLayoutError(
                    f"an opaque page must be one run of bytes; layer {plane.names[0]} has strides "
                    f"{plane.pages.layers[0].stride()}"
                )

    @classmethod
    def from_layers(cls, layers: Sequence[torch.Tensor], *, opaque: bool = False) -> PagedCache:
        """One plane of full-attention layers, each ``[B, H, N, 2 D]``: keys, then values."""
        names = tuple(f"layer.{i}" for i in range(len(layers)))
        pages = PagedLayers(layers)
        half = pages.content // 2
        sides = (Side("key", 0, half, pages.heads), Side("value", half, half, pages.heads))
        return cls([Plane(0, names, pages, sides=() if pages.content % 2 else sides)], opaque=opaque)

    def chunk_bytes(self, tokens: int) -> int:
        """Bytes of a chunk of ``tokens`` (whole blocks)."""
        return sum(self.plane_bytes(plane, tokens) for plane in self.planes)

    def plane_bytes(self, plane: Plane, tokens: int) -> int:
        return plane.pages.num_layers * (tokens // plane.block_tokens) * plane.pages.page_bytes
