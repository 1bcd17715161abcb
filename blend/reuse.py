"""The interface of reused KV that the blender takes, and an implementation over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lmcache.errors import BlendError


@dataclass(frozen=True)
class Segment:
    """Tokens start .. stop - 1 of a prompt."""

    start: int
    stop: int


class ReusedKV(Protocol):
    """KV of a prompt of T tokens, at the prompt's positions.

    exact    1 1 1 1 . . . . . . . .     a cached prefix
    covered  1 1 1 1 1 1 1 1 1 1 . .     that, and segments; the rest is computed
    """

    @property
    def covered(self) -> torch.Tensor:
        """bool [T]: this token has reused KV."""

    @property
    def exact(self) -> torch.Tensor:
        """bool [T]: and it is exactly what a full prefill gives; it is never recomputed."""

    @property
    def segments(self) -> Sequence[Segment]:
        """The segments whose KV is reused, in ascending order; a cached prefix is none."""

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (already rotated to the prompt's positions) and values of one layer, each `[T, H_kv, D]`.

        In the model's dtype and on its device, D contiguous; rows that are not covered hold anything finite. Waits
        until that layer is there. Called from a thread other than the one that computes. The caller may write into
        them.
        """


class GivenKV:
    """ReusedKV over tensors in memory, which are left as they are.

    `layers`: of each layer, keys and values `[T, H_kv, D]` as ReusedKV has them. `segments`: what is covered, with
    `prefix` exact tokens before them.
    """

    def __init__(
        self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], segments: Sequence[Segment], prefix: int = 0
    ) -> None:
        if not layers:
            raise BlendError("layers is empty; reused KV needs the keys and values of each layer")
        tokens, device = len(layers[0][0]), layers[0][0].device
        self.segments = sorted(segments, key=lambda segment: segment.start)
        bounds = [prefix, *(bound for segment in self.segments for bound in (segment.start, segment.stop)), tokens]
        if bounds != sorted(bounds) or prefix < 0:
            raise BlendError(
                f"a prefix of {prefix} tokens and segments {self.segments} of {tokens} tokens overlap, or leave them"
            )
        self._layers = layers
        self.exact = torch.arange(tokens, device=device) < prefix
        self.covered = self.exact.clone()
        for segment in self.segments:
            self.covered[segment.start : segment.stop] = True

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._layers[index]
        return keys.clone(), values.clone()
