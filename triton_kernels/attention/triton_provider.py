"""sparse_prefill through its Triton kernel: how it is cut for a problem and a machine, and its launch."""

from __future__ import annotations

import dataclasses
import functools

import torch

from lmcache.kernels.attention import host_provider as sparse_prefill_host
from lmcache.kernels.attention.sparse_prefill import AttentionProblem, PackedKV, PagedKV
from lmcache.kernels.attention.split_kv import merge_splits
from lmcache.kernels.attention.tiles import attend_tiles
from lmcache.kernels.launch import runs_kernel

LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is cut for a problem."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def attend(problem: AttentionProblem) -> None:
    """The provider "triton". On a CPU without the interpreter it is the provider "torch"."""
    if not runs_kernel(problem.q.device):
        sparse_prefill_host.attend(problem)
        return
    config = choose_config(problem, _architecture(problem.q.device))
    heads, groups = _head_tiles(problem, config)
    tiles = len(problem.q) // (config.block_m // heads) + problem.batch
    splits = problem.num_splits or _choose_splits(problem, config, tiles * groups)
    if splits == 1:
        _launch(problem, config, heads, tiles, 1, problem.out, problem.lse)
        return
    shape = (splits, *problem.out.shape)
    parts = torch.empty(shape, dtype=torch.float32, device=problem.q.device)
    part_lses = torch.empty(shape[:-1], dtype=torch.float32, device=problem.q.device)
    _launch(problem, config, heads, tiles, splits, parts, part_lses)
    merge_splits(parts, part_lses, problem.out, problem.lse)


def choose_config(problem: AttentionProblem, architecture: str) -> Config:
    """By the rows of a request and key head, the size of a head, and the machine; budgets tell what spills."""
    rows = -(-len(problem.q) // max(problem.batch, 1)) * (problem.q.shape[1] // problem.kv_heads)
    large = max(problem.q.shape[2], problem.kv.values.shape[-1]) > 128
    # The loads of a paged KV follow that of the block table one stage later.
    stages = 3 if architecture in ("sm_90", "sm_100") or isinstance(problem.kv, PagedKV) else 2
    if architecture == "amd":
        stages = 2  # 64 KiB of LDS
    if problem.q.dtype == torch.float32:  # no tensor cores: exact products
        return Config(16, 16, 8, 2) if large else Config(16, 32, 4, 1)
    if rows <= 16:
        return Config(16, 32, 8, stages) if large else Config(16, 64, 4, stages)
    if architecture == "amd":
        return Config(64, 32 if large else 64, 4, stages)
    if architecture == "sm_80" or (large and (architecture == "sm_100" or rows <= 64)):
        return Config(64, 32, 8 if large else 4, stages)
    if large:
        return Config(128, 32, 8, stages)
    return Config(64, 64, 4, stages) if rows <= 64 else Config(128, 64, 8, stages)


@functools.cache
def _architecture(device: torch.device) -> str:
    """The one of "amd", "sm_80", "sm_90" and "sm_100" that a machine resembles; "sm_90" under the interpreter.

    NVIDIA's 8.x and 12.x are "sm_80": no asynchronous matrix instructions, and down to 99 KiB of shared memory.
    """
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


def _head_tiles(problem: AttentionProblem, config: Config) -> tuple[int, int]:
    """(query heads in one tile, tiles of heads): all that share a key head, or an equal part of them that fits."""
    group = problem.q.shape[1] // problem.kv_heads
    heads = next(n for n in range(min(group, config.block_m), 0, -1) if group % n == 0)
    return heads, problem.q.shape[1] // heads


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on AMD); 1 under the interpreter, so that nothing is split."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _choose_splits(problem: AttentionProblem, config: Config, programs: int) -> int:
    """Enough to give each processor two programs, of at least 8 blocks of keys each."""
    wanted = 2 * _processors(problem.q.device) // max(programs, 1)
    useful = problem.max_kv // (8 * config.block_n)
    return max(1, min(wanted, useful, 64))


def _launch(
    problem: AttentionProblem,
    config: Config,
    heads: int,
    tiles: int,
    splits: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    q, kv = problem.q, problem.kv
    size, v_size = q.shape[2], kv.values.shape[-1]
    if isinstance(kv, PackedKV):
        bounds, table, page = kv.cu_kv, kv.cu_kv, 0
        k_strides, v_strides = ((0, t.stride(1), t.stride(0)) for t in (kv.keys, kv.values))
    else:
        bounds, table, page = kv.kv_lens, kv.block_table, kv.keys.shape[2]
        k_strides, v_strides = ((t.stride(0), t.stride(1), t.stride(2)) for t in (kv.keys, kv.values))
    block_d, tail = _dot_sizes(size)
    cap = problem.soft_cap
    window = problem.window if problem.window and problem.window < 2**31 else 0  # there are no further positions
    groups = q.shape[1] // heads
    attend_tiles.launch(
        (tiles * groups, splits),
        q.device,
        q,
        kv.keys,
        kv.values,
        out,
        out if lse is None else lse,
        problem.q_positions,
        problem.cu_q,
        bounds,
        table,
        problem.batch,
        groups,
        *q.stride()[:2],
        *k_strides,
        *v_strides,
        table.stride(0),
        *(0, *out.stride())[-4:-1],
        *((0, 0, 0) if lse is None else (0, *lse.stride())[-3:]),
        0.0 if cap is None else 2 * LOG2E * problem.scale / cap,
        LOG2E * (problem.scale if cap is None else cap),
        HEADS=heads,
        KV_GROUP=groups // problem.kv_heads,
        SPLIT=splits > 1,
        HAS_LSE=lse is not None,
        ALIKE=k_strides == v_strides,
        PAGE=page,
        WINDOW=window,
        CAPPED=cap is not None,
        D=size,
        V=v_size,
        BLOCK_D=block_d,
        TAIL=tail,
        BLOCK_V=max(16, _power_of_two(v_size)),
        BLOCK_B=_power_of_two(problem.batch),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _power_of_two(n: int) -> int:
    """The lowest that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _dot_sizes(size: int) -> tuple[int, int]:
    """(first, rest) components of q and k to multiply: rounded up as a whole, or in two powers of two where cheaper."""
    whole = max(16, _power_of_two(size))
    first = whole // 2
    rest = max(16, _power_of_two(size - first))
    return (whole, 0) if size == whole or first + rest >= whole or first < 16 else (first, rest)
