"""What a line of kernel_bench is, and what its cases are made of.

The same case is timed by kernel_bench, run by tests/experiments/bench/test_kernels.py, and at Size "tiny" interpreted
and compiled ahead of time by estimate.py. Imports torch only: this runs on a bare GPU machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is moved: `tokens` of a cache of `cache_tokens`, all layers of one plane (the keys, or the values)."""

    layers: int
    tokens: int
    cache_tokens: int
    heads: int = 8
    head_size: int = 128

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    def __str__(self) -> str:
        return f"{self.layers} x {self.tokens} x {self.width} bf16"


SIZES = {
    "tiny": Size(2, 128, 256),
    "cpu": Size(32, 256, 4096),  # 256 MiB of cache: more than a CPU keeps close
    "cuda": Size(32, 4096, 16384),  # 512 MiB moved: 170 us at 3 TB/s, long enough to be timed; 1 GiB of cache
}


@dataclasses.dataclass
class Case:
    """One line of the table.

    nbytes      that must move in memory, read + written, whatever the implementation
    run         the operation, on the tensors that are timed; each call on other parts of memory
    check       whether the operation and its torch definition agree, on those tensors; called before anything is timed
    peer        another implementation of the same
    floors      by type of device, the least share of the rate of a plain copy that is acceptable
    far_writes  whether the written side is the one that no cache holds (scatter)
    roofline    what to compare with, instead of a copy of as many bytes
    memory      what the kernel reaches through tables of addresses (for the sanitizer)
    flops       on tensor cores
    work        what nbytes is proportional to at other sizes; flops is to its square
    estimated   whether estimate.py shows it too; one case of several that launch the same code is enough
    """

    name: str
    size: str
    nbytes: int
    run: Callable[[], object]
    check: Callable[[], bool]
    peer: Callable[[], object] | None = None
    peer_name: str = "torch"
    floors: dict[str, float] = dataclasses.field(default_factory=dict)
    far_writes: bool = False
    roofline: Callable[[], object] | None = None
    memory: Sequence[torch.Tensor] = ()
    flops: int = 0
    work: Callable[[Size], int] = lambda size: size.layers * size.tokens
    estimated: bool = True

    @property
    def variant(self) -> str:
        """What the size ends in after a comma; it tells cases of one name apart."""
        return self.size.partition(", ")[2]


@dataclasses.dataclass(frozen=True)
class Setup:
    device: torch.device
    size: Size

    @property
    def lighter(self) -> Setup:
        """For what a CPU calculates rather than copies: fewer layers there."""
        if self.device.type != "cpu":
            return self
        return dataclasses.replace(self, size=dataclasses.replace(self.size, layers=2))

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.device, dtype)

    def permutations(self, limit: int, count: int) -> list[torch.Tensor]:
        """`count` different ids below limit, in 16 random selections, so that no cache flatters a copy."""
        some = [torch.randperm(limit, generator=torch.Generator().manual_seed(seed))[:count] for seed in range(16)]
        return [ids.to(self.device) for ids in some]

    def cache(self, block: int, order: str = "LBNHC") -> torch.Tensor:
        """Bit patterns of bf16 as int16 (which compares NaNs as equal), `[L, B, N, H, C]` or `[L, B, H, N, C]`."""
        s = self.size
        inner = (block, s.heads) if order == "LBNHC" else (s.heads, block)
        cache = torch.empty(
            (s.layers, s.cache_tokens // block, *inner, s.head_size), dtype=torch.int16, device=self.device
        )
        fill(cache[0], 0)
        cache[1:] = cache[0]
        cache += torch.arange(s.layers, dtype=torch.int16, device=self.device).view(-1, 1, 1, 1, 1)
        return cache


def fill(tensor: torch.Tensor, seed: int) -> None:
    tensor.copy_(torch.randint(0, 2**15, tensor.shape, generator=torch.Generator().manual_seed(seed)))


def agree(
    operation: Callable[[], object],
    definition: Callable[[], object],
    outputs: Sequence[torch.Tensor],
    same: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal,
) -> bool:
    """Whether both leave the same in `outputs`, starting from the same."""
    before = [tensor.clone() for tensor in outputs]
    definition()
    wanted = [tensor.clone() for tensor in outputs]
    for tensor, old in zip(outputs, before, strict=True):
        tensor.copy_(old)
    operation()
    return all(map(same, outputs, wanted))


def within(relative: float, absolute: float) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    return lambda got, wanted: torch.allclose(got.float(), wanted.float(), rtol=relative, atol=absolute)


def on_gpu(device: torch.device, function: Callable[[], object]) -> Callable[[], object] | None:
    """A peer where it is another code: on a CPU most operations are their torch definitions."""
    return function if device.type == "cuda" else None
