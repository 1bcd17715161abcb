"""A scheme: how one side of a layer (its keys, or its values) is quantised, and where its packed bytes lie.

Nothing is quantised here: packing.py does that.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from lmcache.errors import KernelArgumentError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8_MAX = 448.0
# A scale and a zero are widened by this much before they are rounded to fp16, so that they still cover the range.
SLACK = 2.0**-10


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one side is quantised. bits: 2, 3, 4 or 8. group: tokens that share a channel's scale (a multiple of 8)."""

    bits: int
    axis: str = "token"
    fp8: bool = False
    rotate: bool = False
    group: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8) or (self.fp8 and self.bits != 8):
            raise KernelArgumentError(f"bits is {self.bits}; it must be 2, 3, 4 or 8, and 8 for fp8")
        if self.axis not in ("token", "channel"):
            raise KernelArgumentError(f"axis is {self.axis!r}; it must be 'token' or 'channel'")
        if self.axis == "channel" and (self.fp8 or self.rotate):
            raise KernelArgumentError("fp8 and rotate need axis='token'")
        if self.group < 8 or self.group & (self.group - 1):
            raise KernelArgumentError(f"group is {self.group}; it must be a power of two of at least 8 tokens")

    @property
    def levels(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1


@dataclasses.dataclass(frozen=True)
class SideLayout:
    """Bytes of one packed side of one layer."""

    scheme: Scheme
    tokens: int
    heads: int
    width: int

    @property
    def rows(self) -> int:
        """T8 / 8: words of eight tokens."""
        return -(-self.tokens // 8)

    @property
    def scale_rows(self) -> int:
        """Scales a head: tokens, or groups times channels."""
        scheme = self.scheme
        if scheme.axis == "token":
            return self.rows * 8
        return -(-self.tokens // scheme.group) * self.width

    @property
    def scales_start(self) -> int:
        codes = self.heads * self.rows * self.width * self.scheme.bits
        return -(-codes // 16) * 16

    @property
    def num_scales(self) -> int:
        return self.heads * self.scale_rows * (1 if self.scheme.fp8 else 2)

    @property
    def nbytes(self) -> int:
        return self.scales_start + -(-2 * self.num_scales // 16) * 16

    def scales(self, packed: torch.Tensor) -> torch.Tensor:
        """The fp16 scales (and zeros) in `packed [l, nbytes]`: a view `[l, num_scales]`."""
        return packed[:, self.scales_start : self.scales_start + 2 * self.num_scales].view(torch.float16)


def scales_are_finite(packed: torch.Tensor, layout: SideLayout) -> torch.Tensor:
    """A bool scalar on the device of `packed`: whether everything that was packed can be had back."""
    return torch.isfinite(layout.scales(packed)).all()


@functools.lru_cache(maxsize=64)
def rotation(width: int, seed: int, device: torch.device) -> torch.Tensor:
    """An orthonormal `[width, width]` fp32: random signs, then Hadamard in blocks of the largest power of two."""
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    block = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < block:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    eye = torch.eye(width // block, dtype=torch.float64)
    matrix = torch.kron(eye, hadamard / math.sqrt(block))
    return (signs[:, None] * matrix).float().to(device)


@functools.lru_cache(maxsize=64)
def rotation_signs(width: int, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """`rotation` as a matrix of -1, 0 and 1, exact in any dtype, and the factor that belongs to it."""
    factor = (width & -width) ** -0.5
    return (rotation(width, seed, device) / factor).round().to(dtype), factor
