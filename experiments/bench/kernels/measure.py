"""How fast the kernels are, against plain copies and against their peers, measured in the same run.

python -m experiments.kernel_bench [--device cuda] [--only gather] [--seconds 1] [--no-estimate]

Each operation is first compared with its torch definition on the very tensors it is timed on; one that is wrong gets
FAILED and no figure. Exits 1 if one is wrong, or one with a floor stays below it in two measurements. Rounds are
interleaved and medians taken, because the machines this runs on are noisy; every round moves other parts of memory, so
that no cache flatters it. On a CPU the copies run in one thread, so memcpy is measured with one, which the floors are
shares of, and with all of torch's threads. On a GPU events are recorded around each operation, behind a kernel that
waits until it is queued. Without a GPU a table of estimates for GPUs follows (estimate.py).

Needs torch, triton and numpy only.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from experiments.bench.kernels.case import SIZES, Case
from experiments.bench.kernels.cases import all_cases

PAUSE_S = 0.005  # torch's idle workers spin for a while after each operation and would slow the next one down
WAIT_CYCLES = 2_000_000  # about 1 ms on a GPU: longer than the host needs to queue an operation
WARM_UP = 2
COLUMNS = "{:<15} {:<38} {:>10} {:>6} {:>13} {:>12} {:>12} {:>17}  {}"


@dataclasses.dataclass
class Measured:
    seconds: list[float]  # of each round
    copies: list[list[float]]  # the same for the copies that it is compared with
    peer: list[float]

    @property
    def shares(self) -> list[float]:
        """Of the rate of each copy. Medians of the rounds' ratios: what slows a machine down slows both."""
        return [statistics.median(c / s for c, s in zip(copy, self.seconds, strict=False)) for copy in self.copies]


class Copies:
    """The roofline: copies of contiguous bytes between a fixed buffer and changing parts of a large one."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._far = torch.ones(nbytes, dtype=torch.uint8, device=device)

    def of(self, case: Case) -> list[Callable[[], object]]:
        """Of as many bytes as the case moves; on a CPU by one thread, then by all."""
        half = min(case.nbytes // 2, self._far.numel() // 2)
        near = torch.ones(half, dtype=torch.uint8, device=self._far.device)
        parts = itertools.cycle(part for part in torch.split(self._far, half) if len(part) == half)

        def ends() -> tuple[torch.Tensor, torch.Tensor]:
            return (next(parts), near) if case.far_writes else (near, next(parts))

        def by_torch() -> None:
            target, source = ends()
            target.copy_(source)

        def by_numpy() -> None:
            target, source = ends()
            np.copyto(target.numpy(), source.numpy())

        return [by_numpy, by_torch] if self._far.device.type == "cpu" else [by_torch]


def _time(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(WAIT_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure(case: Case, copies: Copies, device: torch.device, repeats: int, budget_s: float) -> Measured:
    """Up to `repeats` rounds; a function that has used up its part of the time sits out, after 3 rounds (a peer 1)."""
    roofs = [case.roofline] if case.roofline else copies.of(case)
    functions = [case.run, *roofs, *([case.peer] if case.peer else [])]
    seconds: list[list[float]] = [[] for _ in functions]
    spent = [0.0] * len(functions)
    for round_ in range(-WARM_UP, repeats):
        for i, function in enumerate(functions):
            enough = (3 if i <= len(roofs) else 1) if round_ >= 0 else 0
            if spent[i] > budget_s / len(functions) and len(seconds[i]) >= enough:
                continue
            spent[i] += (took := _time(function, device)) + PAUSE_S
            if round_ >= 0:
                seconds[i].append(took)
    return Measured(seconds[0], seconds[1 : 1 + len(roofs)], seconds[1 + len(roofs)] if case.peer else [])


def _rate(nbytes: int, seconds: float) -> str:
    """GB/s, three digits."""
    rate = nbytes / seconds / 1e9
    return f"{rate:.{max(0, min(3, 2 - math.floor(math.log10(rate))))}f}"


def report(case: Case, copies: Copies, device: torch.device, repeats: int, budget_s: float) -> bool:
    """Print a line; whether the case is right and above its floor."""
    if not case.check():
        print(f"{case.name:<15} {case.size:<38} FAILED: differs from its torch definition, so no figure", flush=True)
        return False
    floor = case.floors.get(device.type)
    measured = measure(case, copies, device, repeats, budget_s)
    if floor is not None and measured.shares[0] < floor:
        measured = measure(case, copies, device, 2 * repeats, 3 * budget_s)
    seconds = statistics.median(measured.seconds)
    fast, _, slow = statistics.quantiles(measured.seconds, n=4, method="inclusive")
    rates = [
        f"{_rate(case.nbytes, statistics.median(copy))} {share:.{0 if share >= 0.1 else 1}%}"
        for copy, share in zip(measured.copies, measured.shares, strict=True)
    ]
    peer = f"{statistics.median(measured.peer) / seconds:.2f} x {case.peer_name}" if measured.peer else ""
    missed = floor is not None and measured.shares[0] < floor
    verdict = f"BELOW {floor:.0%}" if missed else "no floor" if floor is None else f"floor {floor:.0%}"
    spread = f"{_rate(case.nbytes, slow)}..{_rate(case.nbytes, fast)}"
    row = (case.name, case.size, f"{case.nbytes / 2**20:.1f} MiB", _rate(case.nbytes, seconds), spread)
    print(COLUMNS.format(*row, rates[0], rates[1] if len(rates) > 1 else "", peer, verdict), flush=True)
    return not missed


def _introduce(device: torch.device, repeats: int) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} torch threads"
    print(f"{device.type}: {where}, torch {torch.__version__}, {platform.machine()}, up to {repeats} rounds, medians.")
    print("bytes: that must move, read + written. copy: GB/s of one plain copy of as many bytes, and the share of it")
    print(
        "that is reached; on a CPU with one thread, then with torch's. peer: how many times as fast as it; on a CPU it"
    )
    print("has torch's threads too, which wait for each other as soon as anyone else wants a core.")
    print(COLUMNS.format("operation", "size", "bytes", "GB/s", "quartiles", "copy", "threaded", "v. peer", ""))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed of the kernels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--size", choices=SIZES, help="default: that of the device")
    parser.add_argument("--repeats", type=int, default=41, help="rounds at most")
    parser.add_argument("--seconds", type=float, default=0.4, help="a case, about")
    parser.add_argument("--no-estimate", action="store_true", help="no table of estimates for GPUs")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    size = SIZES[options.size or device.type]
    _introduce(device, options.repeats)
    copies = Copies(device, 2 * size.layers * size.cache_tokens * size.width)
    cases = (case for case in all_cases(device, size) if options.only in case.name)
    good = [report(case, copies, device, options.repeats, options.seconds) for case in cases]
    if not good:
        print(f"no operation is called {options.only!r}")
        return 1
    if device.type == "cpu" and not options.no_estimate:
        from experiments.bench.kernels import estimate

        good.append(estimate.show(options.only))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
