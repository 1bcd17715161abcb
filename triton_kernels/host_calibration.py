"""From which size on a staged copy between pages and host memory is faster than a direct one, measured."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from lmcache.kernels.layers import PagedLayers

if TYPE_CHECKING:
    from lmcache.kernels.host import HostTransfer

# (bytes, microseconds directly, microseconds staged)
Times = list[tuple[int, float, float]]

SIZES = tuple(2**i for i in range(16, 25))
_WARM_UPS, _REPEATS = 2, 8
_DIRECT, _STAGED = 1 << 62, -1


def crossover(times: Times) -> int:
    """From times of rising sizes: up to how many bytes direct is never slower."""
    best = 0
    for size, direct, staged in times:
        if direct > staged:
            break
        best = size
    return best


def compare(transfer: HostTransfer) -> dict[str, Times]:
    """Medians for SIZES, to the host and from it, of tokens scattered over 8 layers of 8 heads of 128 channels.

    `transfer` must be on CUDA, and nobody else may use it meanwhile. Waits for the device.
    """
    num_layers, heads, block_tokens, content = 8, 8, 16, 128
    token = num_layers * heads * content * 2
    blocks = SIZES[-1] // (token * block_tokens)
    cache = torch.zeros(num_layers, blocks, heads, block_tokens, content, dtype=torch.bfloat16, device=transfer.device)
    pages = PagedLayers(list(cache))
    slots = torch.randperm(blocks * block_tokens, generator=torch.Generator().manual_seed(0)).to(transfer.device)
    host = torch.empty(SIZES[-1], dtype=torch.uint8, pin_memory=True)
    before = transfer.direct_bytes
    measured: dict[str, Times] = {}
    try:
        for way, copy in (("to_host", transfer.copy_to_host), ("from_host", transfer.copy_from_host)):
            measured[way] = []
            for size in SIZES:
                arguments = (pages, slots[: size // token], host[:size].view(num_layers, size // token, -1))
                times = []
                for limit in (_DIRECT, _STAGED):
                    transfer.direct_bytes = dict.fromkeys(before, limit)
                    times.append(_median_time(transfer, copy, arguments))
                measured[way].append((size, times[0], times[1]))
    finally:
        transfer.direct_bytes = before
    return measured


def _median_time(transfer: HostTransfer, copy: Any, arguments: tuple[Any, ...]) -> float:
    times: list[float] = []
    for _ in range(_WARM_UPS + _REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        copy(*arguments)
        transfer.join()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[_WARM_UPS:])
