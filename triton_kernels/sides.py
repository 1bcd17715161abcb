"""What a codec packs: the sides of a plane's pages, and the parts that one chunk of them becomes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from lmcache.kernels.layers import PagedLayers


@dataclasses.dataclass(frozen=True)
class Side:
    """Elements start .. start + width of each head's content. role: "key" or "value" (or a latent of both)."""

    role: str
    start: int
    width: int
    heads: int

    def of(self, pages: PagedLayers) -> PagedLayers:
        """This side of every layer."""
        return PagedLayers([layer[..., self.start : self.start + self.width] for layer in pages.layers])


@dataclasses.dataclass(frozen=True)
class Packed:
    """parts: uint8, of which the first `used[i]` bytes (int64 scalars, on whatever device) count; sound: bool scalar.

    What is not sound cannot be had back, and must not be stored.
    """

    parts: Sequence[torch.Tensor]
    used: Sequence[torch.Tensor]
    sound: torch.Tensor


class PlaneCodec(ABC):
    """Packs one plane. Thread-safe; nothing synchronises.

    fixed: whether every part always takes `max_bytes`.
    """

    fixed: bool

    @abstractmethod
    def max_bytes(self, tokens: int) -> list[int]:
        """The most that each part of a chunk of so many tokens can take."""

    @abstractmethod
    def pack(self, pages: Sequence[PagedLayers], slots: torch.Tensor) -> Packed:
        """The tokens at `slots` (int64 `[T]`; negative: none) of `pages`, the plane's sides, as parts."""

    @abstractmethod
    def unpack(
        self, pages: Sequence[PagedLayers], slots: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        """The reverse, for parts cut to what counts. Raises CorruptChunkError where damage can be seen at once.

        Where it is seen on the device only, returns a bool scalar there: whether what was written is what was packed.
        """
