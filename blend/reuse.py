"""What the parts of blending hand to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Segment:
    """Tokens ``[start, stop)`` of a prompt."""

    start: int
    stop: int


class ReusedKV(Protocol):
    """KV of a prompt's tokens that need not be computed, at the prompt's positions."""

    covered: torch.Tensor
    """bool ``[T]``: this token has reused KV."""
    exact: torch.Tensor
    """bool ``[T]``: and it is exactly what a full prefill gives (a cached prefix): never recomputed."""
    segments: Sequence[Segment]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (already rotated to the prompt's positions) and values of one layer, each ``[T, H_kv, D]``, in the
        model's dtype, on its device; rows that are not covered hold anything finite.

        Waits until that layer is there. The caller may write into them.
        """
        ...
