"""From which size on a staged copy between pages and host memory is faster than a direct one, measured."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import torch

from lmcache.kernels.copy.host import HostTransfer, on_device
from lmcache.kernels.layers import PagedLayers

logger = logging.getLogger(__name__)

# (bytes, microseconds directly, microseconds staged)
Times = list[tuple[int, float, float]]

SIZES = tuple(2**i for i in range(16, 25))
_WARM_UPS, _REPEATS = 2, 8
_DIRECT, _STAGED = 1 << 62, -1


def calibrate(transfer: HostTransfer) -> None:
    """Measure both ways and set ``transfer.direct_bytes``. For the start of a process: takes some 20 ms and waits.

    On a CPU, and where kernels cannot reach host memory, it does nothing.
    """
    if transfer.device.type != "cuda" or torch.version.hip is not None:
        return
    with on_device(transfer.device):  # where events are recorded and memory is pinned
        measured = compare(transfer)
    transfer.direct_bytes = {way: crossover(times) for way, times in measured.items()}
    logger.info(
        "host transfers of at most %s bytes are direct on %s; measured (bytes, direct us, staged us): %s",
        transfer.direct_bytes,
        transfer.device,
        {way: [(size, round(a), round(b)) for size, a, b in times] for way, times in measured.items()},
    )


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
