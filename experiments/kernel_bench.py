"""How fast the paged copies are, against memcpy and against plain torch indexing, measured in the same run.

python -m experiments.kernel_bench [--device cuda] [--repeats 41]

Each operation is first checked on the very tensors it is timed on; no figure is printed for one that is wrong.
Exits 1 if an operation is wrong, or one with a floor runs below 60 % of memcpy. Rounds are interleaved and medians
taken, because the machines this runs on are noisy; every round moves other pages, so that no cache flatters it.
On a CPU the copies run in one thread, so memcpy is measured with one, which the floor refers to, and with all of
torch's threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from lmcache.kernels import PagedLayers, gather_pages, gather_tokens, scatter_pages, scatter_tokens

FLOOR = 0.60
PAUSE_S = 0.005  # torch's idle workers spin for a while after each operation and would slow the next one down
LAYERS, TOKENS, HEADS, HEAD_SIZE = 32, 256, 8, 128
CACHE_TOKENS = 4096  # 256 MiB of cache at the shape above: more than a CPU keeps close
COLUMNS = "{:<15} {:<33} {:>7} {:>6} {:>12} {:>12} {:>12} {:>9}  {}"


@dataclasses.dataclass
class Case:
    """One line of the table. `ids`, `chunk` and `cache` are what `op` is called with; `cache` is what `plane` views."""

    name: str
    shape: str
    plane: PagedLayers
    ids: Iterator[torch.Tensor]
    chunk: torch.Tensor
    op: Callable[[PagedLayers, torch.Tensor, torch.Tensor], None]
    naive: Callable[[torch.Tensor], None]
    memory: torch.Tensor  # the whole cache, contiguous
    floor: bool

    def memcpys(self) -> list[Callable[[], object]]:
        """Copies of as many contiguous bytes, between the chunk and other parts of the cache each time."""
        parts = itertools.cycle(torch.split(self.memory.view(-1), self.chunk.numel()))
        chunk = torch.ones_like(self.chunk).view(-1)

        def ends() -> tuple[torch.Tensor, torch.Tensor]:
            return (chunk, next(parts)) if self.op in (gather_pages, gather_tokens) else (next(parts), chunk)

        def by_torch() -> None:
            target, source = ends()
            target.copy_(source)

        def by_numpy() -> None:
            target, source = ends()
            np.copyto(target.numpy(), source.numpy())

        return [by_numpy, by_torch] if self.memory.device.type == "cpu" else [by_torch]

    def run(self) -> None:
        self.op(self.plane, next(self.ids), self.chunk)

    def run_naive(self) -> None:
        self.naive(next(self.ids))

    def is_right(self) -> bool:
        """The operation and plain indexing leave the same bytes, from the same start."""
        ids = next(self.ids)
        _fill(self.chunk, 1)
        if self.op in (gather_pages, gather_tokens):
            self.naive(ids)
            wanted = self.chunk.clone()
            _fill(self.chunk, 2)
            self.op(self.plane, ids, self.chunk)
            return torch.equal(self.chunk, wanted)
        before = [layer.clone() for layer in self.plane.layers]
        self.naive(ids)
        wanted_layers = [layer.clone() for layer in self.plane.layers]
        for layer, old in zip(self.plane.layers, before, strict=True):
            layer.copy_(old)
        self.op(self.plane, ids, self.chunk)
        return all(map(torch.equal, self.plane.layers, wanted_layers))


def _fill(tensor: torch.Tensor, seed: int) -> None:
    tensor.copy_(torch.randint(0, 2**15, tensor.shape, generator=torch.Generator().manual_seed(seed)))


def _cases(device: torch.device) -> Iterator[Case]:
    for block, order in ((16, "LBHNC"), (16, "LBNHC"), (128, "LBHNC")):
        blocks, n = CACHE_TOKENS // block, TOKENS // block
        shape = (
            (LAYERS, blocks, HEADS, block, HEAD_SIZE) if order == "LBHNC" else (LAYERS, blocks, block, HEADS, HEAD_SIZE)
        )
        # Bit patterns of bf16: no pattern is special to a copy, and int16 compares NaNs as equal.
        cache = torch.empty(shape, dtype=torch.int16, device=device)
        _fill(cache[0], 0)
        cache[1:] = cache[0]
        cache += torch.arange(LAYERS, dtype=torch.int16, device=device).view(-1, 1, 1, 1, 1)
        layers = list(cache if order == "LBHNC" else cache.transpose(2, 3))
        plane = PagedLayers(layers)
        pools = [torch.randperm(blocks, generator=torch.Generator().manual_seed(i))[:n].to(device) for i in range(16)]
        offsets = torch.arange(block, device=device)
        text = f"{LAYERS} x {TOKENS} x {HEADS * HEAD_SIZE} bf16, {order}"

        pages_chunk = torch.empty((LAYERS, n, plane.page_bytes // 2), dtype=torch.int16, device=device)
        memory = cache.view(LAYERS, blocks, -1)
        yield from _pair(f"{text}/{block}", "pages", plane, pools, pages_chunk, memory, True)

        if order == "LBNHC":
            tokens_chunk = pages_chunk.view(LAYERS, TOKENS, -1)
            memory = cache.view(LAYERS, CACHE_TOKENS, -1)
            slots = [(ids[:, None] * block + offsets).flatten() for ids in pools]
            yield from _pair(f"{text}/{block}", "tokens", plane, slots, tokens_chunk, memory, True)
            single = [
                torch.randperm(CACHE_TOKENS, generator=torch.Generator().manual_seed(i))[:TOKENS] for i in range(16)
            ]
            single = [ids.to(device) for ids in single]
            yield from _pair(f"{text}/1", "tokens", plane, single, tokens_chunk, memory, False)


def _pair(
    shape: str,
    unit: str,
    plane: PagedLayers,
    ids: list[torch.Tensor],
    chunk: torch.Tensor,
    memory: torch.Tensor,
    floor: bool,
) -> Iterator[Case]:
    """Gather and scatter of one shape. `memory`: the cache as [layers, units, elements of a unit]."""

    def naive_gather(i: torch.Tensor) -> None:
        for layer in range(LAYERS):
            chunk[layer] = memory[layer][i]

    def naive_scatter(i: torch.Tensor) -> None:
        for layer in range(LAYERS):
            memory[layer][i] = chunk[layer]

    gather, scatter = (gather_pages, scatter_pages) if unit == "pages" else (gather_tokens, scatter_tokens)
    yield Case(f"gather_{unit}", shape, plane, itertools.cycle(ids), chunk, gather, naive_gather, memory, floor)
    yield Case(f"scatter_{unit}", shape, plane, itertools.cycle(ids), chunk, scatter, naive_scatter, memory, floor)


def _measure(functions: list[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each function in each round; the first rounds warm up and are dropped."""
    seconds: list[list[float]] = [[] for _ in functions]
    for round_ in range(repeats + 3):
        for function, out in zip(functions, seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= 3:
                out.append(time.perf_counter() - start)
    return seconds


def _report(case: Case, repeats: int, device: torch.device) -> bool:
    """Print a line; whether the case is right and above its floor."""
    if not case.is_right():
        print(f"{case.name:<15} {case.shape:<34} WRONG RESULT, so no figure")
        return False
    timed = _measure([case.run, *case.memcpys(), case.run_naive], repeats, device)
    op, *copy, naive = (statistics.median(t) for t in timed)
    moved = 2 * case.chunk.numel() * case.chunk.element_size()
    low, _, high = statistics.quantiles(timed[0], n=4)
    ok = not case.floor or copy[0] / op >= FLOOR
    rates = [f"{moved / seconds / 1e9:.1f} {seconds / op:.0%}" for seconds in copy]
    print(
        COLUMNS.format(
            case.name,
            case.shape,
            f"{moved / 2**20:.0f} MiB",
            f"{moved / op / 1e9:.1f}",
            f"{moved / high / 1e9:.1f}..{moved / low / 1e9:.1f}",
            rates[0],
            rates[1] if len(rates) > 1 else "",
            f"{naive / op:.2f} x",
            ("" if case.floor else "no floor") if ok else f"BELOW {FLOOR:.0%}",
        ),
        flush=True,
    )
    return ok


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bandwidth of the paged copies")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=41)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} torch threads"
    print(
        f"{device.type}: {where}, torch {torch.__version__}, {platform.machine()}, {options.repeats} rounds, medians."
    )
    print(
        "MiB: read + written. memcpy: GB/s of one copy of as many bytes, contiguous, and what share of it is reached;"
    )
    print("on a CPU with one thread, then with torch's. naive: cache[layer][ids], layer by layer.")
    print("The shape ends in the layout and the number of successive tokens; the blocks are random.")
    header = ("operation", "shape", "bytes", "GB/s", "quartiles", "memcpy", "threaded", "v. naive", "")
    print(COLUMNS.format(*header))
    return 0 if all([_report(case, options.repeats, device) for case in _cases(device)]) else 1


if __name__ == "__main__":
    sys.exit(main())
