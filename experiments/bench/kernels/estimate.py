"""What can be said about the kernels on GPUs that are not here: an estimate, not a measurement.

python -m experiments.bench.kernels.estimate [--only gather]

Each case of cases.py is run at Size "tiny" twice, in two processes because triton's interpreter and its compiler
exclude each other: once under the interpreter with triton_kernels/testing/sanitizer.py, which counts the sectors of 32
bytes that the programs touch, and once only recorded, compiled for each GPU by triton_kernels/testing/aot.py, which
reads registers and shared memory back. From that follow

    traffic     sectors * 32 / bytes that must move: 1.00 is perfect coalescing; what is above hits L1, L2 or DRAM
    occupancy   resident warps of an SM's 64, and which resource ends first
    floor       the time at Size "cuda" below which no GPU can be: bytes that must move at the datasheet's bandwidth, or
                operations at the datasheet's tensor throughput, whichever takes longer

Nothing is assumed about latencies, clocks, caches or launches, so nothing is said about them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.bench.kernels.case import SIZES, Case
from experiments.bench.kernels.cases import all_cases
from lmcache.kernels.launch import LazyKernel

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
COLUMNS = "{:<15} {:<30} {:<5} {:>5} {:>7} {:>22} {:>8} {:>10}  {}"


@dataclasses.dataclass(frozen=True)
class GPU:
    """Datasheet: bytes/s of memory, dense bf16 FLOP/s. Per SM: bytes of shared memory (CUDA programming guide)."""

    name: str
    target: str
    bandwidth: float
    flops: float
    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


GPUS = (
    GPU("A100", "sm_80", 2.039e12, 312e12, 164 * 1024),  # 80 GB, SXM
    GPU("H100", "sm_90", 3.35e12, 989e12, 228 * 1024),  # SXM
    GPU("B200", "sm_100", 8.0e12, 2250e12, 228 * 1024),
)
_SHARED_OF_SYSTEM = 1024  # bytes a block, compute capability 8.0 and later
_REGISTERS_A_WARP = 256  # registers are given to warps in multiples of this


def occupancy(gpu: GPU, registers: int, shared: int, num_warps: int) -> tuple[float, str]:
    """Share of the SM's warps that can be resident, and what keeps others out."""
    of_warp = -(-registers * 32 // _REGISTERS_A_WARP) * _REGISTERS_A_WARP
    limits = {
        "warps": gpu.warps // num_warps,
        "registers": gpu.registers // of_warp // num_warps,
        "shared": gpu.shared // (shared + _SHARED_OF_SYSTEM),
        "blocks": gpu.blocks,
    }
    scarce = min(limits, key=lambda name: limits[name])
    return limits[scarce] * num_warps / gpu.warps, scarce


def floor_s(gpu: GPU, nbytes: float, flops: float) -> tuple[float, str]:
    memory, tensor = nbytes / gpu.bandwidth, flops / gpu.flops
    return (tensor, "tensor cores") if tensor > memory else (memory, "bandwidth")


def _cases(only: str) -> Iterator[Case]:
    return (case for case in all_cases(CPU, SIZES["tiny"]) if case.estimated and only in case.name)


def count_traffic(only: str) -> list[int | str]:
    """Sectors of each case, or what the sanitizer found. Needs TRITON_INTERPRET=1, so in a process of its own."""
    from lmcache.kernels.testing import sanitizer

    counted: list[int | str] = []
    for case in _cases(only):
        try:
            with sanitizer.sanitized(*case.memory, overflow=False) as watched:
                case.run()
            counted.append(watched.loads.sectors + watched.stores.sectors)
        except sanitizer.Violation as violation:
            counted.append(str(violation))
    return counted


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """Within, operations launch their kernels for CPU tensors too, and the launches are kept instead of done."""
    from lmcache.kernels.testing import aot

    launches: list[Any] = []

    def launch(
        self: LazyKernel, grid: tuple[int, ...], _device: torch.device, *args: object, **options: object
    ) -> None:
        if 0 not in grid:
            launches.append(aot.Recorder(self.jitted, grid, args, options))

    with contextlib.ExitStack() as undo:
        for name, module in list(sys.modules.items()):
            if name.startswith("lmcache.kernels.") and hasattr(module, "runs_kernel"):
                undo.enter_context(unittest.mock.patch.object(module, "runs_kernel", return_value=True))
        undo.enter_context(unittest.mock.patch.object(LazyKernel, "launch", launch))
        yield launches


def _resources(case: Case) -> list[tuple[float, str, Any]]:
    """Of each GPU: occupancy, what limits it, and the compiled kernel; of several kernels, the one with the lowest."""
    from lmcache.kernels.testing import aot

    with recorded() as launches:
        case.run()
    found = []
    for gpu in GPUS:
        kernels = [aot.compile_for(gpu.target, launch) for launch in launches]
        warps = [launch.options.get("num_warps", 4) for launch in launches]
        shares = [
            (*occupancy(gpu, kernel.registers, kernel.shared, number), kernel)
            for kernel, number in zip(kernels, warps, strict=True)
        ]
        found.append(min(shares, key=lambda share: share[0]))
    return found


def _lines(case: Case, resources: list[tuple[float, str, Any]], sectors: int) -> Iterator[str]:
    growth = case.work(SIZES["cuda"]) / case.work(SIZES["tiny"])
    for gpu, (share, scarce, kernel) in zip(GPUS, resources, strict=True):
        seconds, bound = floor_s(gpu, case.nbytes * growth, case.flops * growth**2)
        yield COLUMNS.format(
            case.name,
            f"{case.nbytes * growth / 2**20:.1f} MiB {case.variant}",
            gpu.name,
            kernel.registers,
            kernel.shared,
            f"{share:.0%} ({scarce})",
            f"{sectors * 32 / case.nbytes:.2f}",
            f"{seconds * 1e6:.1f}",
            bound,
        )


def show(only: str = "") -> bool:
    """Print the table; whether the sanitizer found nothing. Compiles, later from triton's cache."""
    print("\nESTIMATE for GPUs, calculated without one: NOT A MEASUREMENT. regs: a thread; shared: bytes a program;")
    print("occupancy (what limits it); traffic: bytes touched / bytes that must move; floor: us at a datasheet's rate.")
    print(COLUMNS.format("operation", "size", "GPU", "regs", "shared", "occupancy", "traffic", "floor us", "bound by"))
    command = [sys.executable, "-m", "experiments.bench.kernels.estimate", "--traffic", "--only", only]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as interpreting:
        compiled = [(case, _resources(case)) for case in _cases(only)]
        output, _ = interpreting.communicate()
    if interpreting.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; its error is above")
    counted: list[int | str] = json.loads(output.splitlines()[-1])
    for (case, resources), sectors in zip(compiled, counted, strict=True):
        if isinstance(sectors, str):
            print(f"{case.name:<15} {case.variant:<30} FAILED: {sectors}")
        else:
            print("\n".join(_lines(case, resources, sectors)))
    return all(isinstance(sectors, int) for sectors in counted)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Estimates for GPUs, without one")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--traffic", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.traffic:
        print(json.dumps(count_traffic(options.only)))
        return 0
    return 0 if show(options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
