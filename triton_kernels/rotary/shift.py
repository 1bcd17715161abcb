"""`shift_rotary` of the same tokens for layer after layer: on a CPU, what the layers share is calculated once.

That is the cosines and sines of the moves, and which tokens move. Keys are then turned block by block, in buffers that
stay in the processor's cache: several times as fast as the definition in torch. On a GPU each layer is one launch of
`shift_rotary`.
"""

from __future__ import annotations

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.launch import runs_kernel
from lmcache.kernels.rotary.ops import DTYPES, halves, shift_rotary
from lmcache.kernels.rotary.tables import RotaryTable

# Elements of a block: twice that in fp32, and the block's angles, fit a core's second-level cache.
_BLOCK_ELEMENTS = 96 << 10


class RotaryShift:
    """Keys `[T, H, D]` from `old_positions` to `new_positions`, int64 `[T]`, as `shift_rotary` moves them. Thread-safe.

    A token with a negative position, or with equal ones, keeps its bits. Raises KernelArgumentError where shift_rotary
    does.
    """

    def __init__(
        self,
        old_positions: torch.Tensor,
        new_positions: torch.Tensor,
        table: RotaryTable,
        *,
        interleaved: bool = False,
        rotary_start: int = 0,
    ) -> None:
        self._old, self._new, self._table = old_positions, new_positions, table
        self._interleaved, self._start = interleaved, rotary_start
        for name, positions in (("old_positions", old_positions), ("new_positions", new_positions)):
            if positions.dtype != torch.int64 or positions.dim() != 1 or positions.shape != old_positions.shape:
                raise KernelArgumentError(f"{name} is {positions.dtype} {tuple(positions.shape)}; it must be int64 [T]")
            host = positions.device.type == "cpu"  # to look on a GPU would stall its stream
            if host and positions.numel() and (last := int(positions.max())) >= table.positions:
                raise KernelArgumentError(f"{name} holds {last}; the table has {table.positions} positions")
        self._on_host = not runs_kernel(old_positions.device)
        if not self._on_host:
            return
        moved = (old_positions >= 0) & (new_positions >= 0) & (old_positions != new_positions)
        self._runs = _runs(moved)
        old = table.cos_sin[old_positions.clamp(min=0)]  # [T, 2, R / 2]
        new = table.cos_sin[new_positions.clamp(min=0)]
        self._cos = (new[:, 0] * old[:, 0] + new[:, 1] * old[:, 1])[:, None]  # [T, 1, R / 2]
        self._sin = (new[:, 1] * old[:, 0] - new[:, 0] * old[:, 1])[:, None]

    def apply(self, keys: torch.Tensor) -> None:
        """Move `keys` in place: bf16, fp16 or fp32 `[T, H, D]`, D contiguous."""
        width = self._table.width
        if keys.dtype not in DTYPES:
            raise KernelArgumentError(f"keys are {keys.dtype}; they must be one of {', '.join(map(str, DTYPES))}")
        if keys.dim() != 3 or len(keys) != len(self._old) or self._start + width > keys.shape[2]:
            raise KernelArgumentError(
                f"keys have shape {tuple(keys.shape)}; they must be [{len(self._old)}, H, D] with D of at least "
                f"{self._start + width}"
            )
        if not self._on_host:
            shift_rotary(
                keys, self._old, self._new, self._table, interleaved=self._interleaved, rotary_start=self._start
            )
            return
        part = keys[..., self._start : self._start + width]  # [T, H, R]
        rows = max(1, _BLOCK_ELEMENTS // (keys.shape[1] * width))
        x, y = torch.empty(2, min(rows, len(keys)), keys.shape[1], width)
        for start, stop in self._runs:
            for first in range(start, stop, rows):
                last = min(first + rows, stop)
                n = last - first
                _turn(part[first:last], self._cos[first:last], self._sin[first:last], self._interleaved, x[:n], y[:n])


def _turn(
    keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, x: torch.Tensor, y: torch.Tensor
) -> None:
    """In place. keys: `[t, H, R]`; cos, sin: fp32 `[t, 1, R / 2]`; x, y: fp32 `[t, H, R]`, overwritten."""
    (low, high), (new_low, new_high) = halves(x, interleaved), halves(y, interleaved)
    x.copy_(keys)
    torch.mul(low, cos, out=new_low).addcmul_(high, sin, value=-1)
    torch.mul(low, sin, out=new_high).addcmul_(high, cos)
    keys.copy_(y)


def _runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Where a bool `[T]` is true, as intervals."""
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
