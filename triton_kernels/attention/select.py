"""The tokens with the highest scores, exactly, in ascending order of their indices; the host waits for nothing.

Scores are compared by their images, signed 32-bit integers in the same order, so `count` is met exactly:

    NaN -> the lowest integer      -0 as +0      x < 0 -> bits ^ 0x7fffffff      included -> the highest integer

The score of rank `count` is the threshold; taken are all above it, and of those equal to it the first in order of their
indices. Up to 8,192 tokens one program finds it by bisection, bit by bit, in registers. More are a radix selection
(Alabi et al. 2012, "Fast k-selection algorithms for graphics processors"): four histograms of 8 bits each, then a
compaction. Integer sums are the only atomic operations, so the result is the same in whatever order programs run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.launch import device_function, lazy_jit, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def select_tokens(scores: torch.Tensor, count: int, *, include: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the `count` highest of `scores`, int64 `[count]` in ascending order.

    `scores`: fp32, bf16 or fp16 `[T]`, contiguous, T < 2**31; of equal scores the lower index wins, NaN is the lowest
    of all. `include`: bool `[T]`, tokens that come before all others whatever their score; they count towards `count`,
    and if there are more of them than that the first are returned. Exactly deterministic. Nothing is synchronised.
    Raises KernelArgumentError for anything else.
    """
    _check(scores, count, include)
    out = torch.empty(count, dtype=torch.int64, device=scores.device)
    if count == 0:
        return out
    if not runs_kernel(scores.device):
        return _select_host(scores, count, include)
    (_launch_small if len(scores) <= _ONE_PROGRAM else _launch_large)(scores, include, out)
    return out


def select_tokens_torch(scores: torch.Tensor, count: int, *, include: torch.Tensor | None = None) -> torch.Tensor:
    """The definition of select_tokens in torch: stable sorts, the last of which counts most."""
    order = torch.argsort(scores.float().nan_to_num(-torch.inf, torch.inf, -torch.inf), descending=True, stable=True)
    order = order[torch.argsort(scores[order].isnan().int(), stable=True)]
    if include is not None:
        order = order[torch.argsort(include[order].int(), descending=True, stable=True)]
    return order[:count].sort().values


def _select_host(scores: torch.Tensor, count: int, include: torch.Tensor | None) -> torch.Tensor:
    """On a CPU: partition instead of sort."""
    values: np.ndarray[Any, np.dtype[np.float32]] = scores.float().numpy()
    bits = np.where(values == 0, np.float32(0), values).view(np.int32)
    image = np.where(bits < 0, bits ^ np.int32(_HIGHEST), bits)
    image[np.isnan(values)] = _LOWEST
    if include is not None:
        image[include.numpy()] = _HIGHEST
    threshold = np.partition(image, len(image) - count)[len(image) - count]
    taken = image > threshold
    taken[np.flatnonzero(image == threshold)[: count - int(taken.sum())]] = True
    return torch.from_numpy(np.flatnonzero(taken).astype(np.int64, copy=False))


@device_function
def _images(
    scores: tl.tensor, include: tl.tensor, i: tl.tensor, live: tl.tensor, HAS_INCLUDE: tl.constexpr
) -> tl.tensor:
    """int32 in the order of the scores i; what is not live has the lowest, and must not be counted."""
    x = tl.load(scores + i, mask=live, other=0).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    image = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    image = tl.where(x != x, -0x80000000, image)
    if HAS_INCLUDE:
        image = tl.where(tl.load(include + i, mask=live, other=0) != 0, 0x7FFFFFFF, image)
    return tl.where(live, image, -0x80000000)


@lazy_jit(do_not_specialize=["num_tokens", "count"])
def _select_small(
    scores: tl.tensor,  # [T]
    include: tl.tensor,  # uint8 [T], read if HAS_INCLUDE
    out: tl.tensor,  # int64 [count]
    num_tokens: tl.tensor,
    count: tl.tensor,
    HAS_INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The only program: T <= BLOCK."""
    i = tl.arange(0, BLOCK)
    live = i < num_tokens
    image = _images(scores, include, i, live, HAS_INCLUDE)  # [BLOCK]
    # The highest threshold that `count` images reach, from its highest bit (the sign, so reversed) down.
    reached = tl.sum((live & (image >= 0)).to(tl.int32), 0)
    threshold = tl.where(reached >= count, 0, -0x80000000)
    for k in range(31):
        candidate = threshold | (1 << (30 - k))
        reached = tl.sum((live & (image >= candidate)).to(tl.int32), 0)
        threshold = tl.where(reached >= count, candidate, threshold)
    above = live & (image > threshold)
    equal = live & (image == threshold)
    ties = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= ties))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(out + place, i.to(tl.int64), mask=taken)


@lazy_jit(do_not_specialize=["num_tokens", "count", "number"])
def _count_digits(
    scores: tl.tensor,  # [T]
    include: tl.tensor,  # uint8 [T]
    histograms: tl.tensor,  # int32 [4, 256]: those of earlier passes, and zeros
    picks: tl.tensor,  # int32 [5, 2]: what _pick found, row n after n passes
    num_tokens: tl.tensor,
    count: tl.tensor,
    number: tl.tensor,  # of this pass, 0 .. 3
    FIRST: tl.constexpr,  # whether that is 0
    HAS_INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Counts digit `number` of the images whose higher digits are those of the threshold."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = i < num_tokens
    digits = _images(scores, include, i, live, HAS_INCLUDE) ^ -0x80000000  # in unsigned order
    digits = digits >> (24 - 8 * number)
    if FIRST:
        if tl.program_id(0) == 0:
            tl.store(picks + 1, count)
    else:
        higher = _pick(histograms, picks, number)
        live = live & ((((digits >> 8) ^ higher) & ((1 << (8 * number)) - 1)) == 0)
    found = tl.histogram(digits & 255, 256, mask=live)  # [256]
    # The order of integer additions does not matter.
    tl.atomic_add(histograms + number * 256 + tl.arange(0, 256), found, mask=found > 0, sem="relaxed")


@device_function
def _pick(histograms: tl.tensor, picks: tl.tensor, passes: tl.tensor) -> tl.tensor:
    """The first `passes` digits of the threshold, from the last histogram.

    Every program calculates them. Program 0 keeps them for the next launch, with how many images that begin so to take.
    """
    bins = tl.arange(0, 256)
    counts = tl.load(histograms + (passes - 1) * 256 + bins)
    wanted = tl.load(picks + 2 * passes - 1)
    reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # [256]: images whose digit is at least this
    digit = tl.sum((reached >= wanted).to(tl.int32), 0) - 1
    higher = (tl.load(picks + 2 * passes - 2) << 8) | digit
    if tl.program_id(0) == 0:
        tl.store(picks + 2 * passes, higher)
        tl.store(picks + 2 * passes + 1, wanted - tl.sum(tl.where(bins > digit, counts, 0), 0))
    return higher


@lazy_jit(do_not_specialize=["num_tokens"])
def _count_blocks(
    scores: tl.tensor,
    include: tl.tensor,
    histograms: tl.tensor,
    picks: tl.tensor,
    blocks: tl.tensor,  # int32 [programs, 2]
    num_tokens: tl.tensor,
    HAS_INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Counts a block's images above the threshold, and those equal to it."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = i < num_tokens
    image = _images(scores, include, i, live, HAS_INCLUDE)
    threshold = _pick(histograms, picks, 4) ^ -0x80000000
    tl.store(blocks + 2 * program, tl.sum((live & (image > threshold)).to(tl.int32), 0))
    tl.store(blocks + 2 * program + 1, tl.sum((live & (image == threshold)).to(tl.int32), 0))


@lazy_jit(do_not_specialize=["num_tokens"])
def _write_taken(
    scores: tl.tensor,
    include: tl.tensor,
    picks: tl.tensor,
    blocks: tl.tensor,
    out: tl.tensor,  # int64 [count]
    num_tokens: tl.tensor,
    HAS_INCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """Writes the indices of a block that are taken behind those of the blocks before it."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = i < num_tokens
    image = _images(scores, include, i, live, HAS_INCLUDE)
    threshold, ties = tl.load(picks + 8) ^ -0x80000000, tl.load(picks + 9)

    above_before = tl.zeros([BLOCK_B], tl.int32)
    equal_before = tl.zeros([BLOCK_B], tl.int32)
    for first in range(0, tl.program_id(0), BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        above_before += tl.load(blocks + 2 * b, mask=b < program, other=0)
        equal_before += tl.load(blocks + 2 * b + 1, mask=b < program, other=0)
    equals = tl.sum(equal_before, 0)
    start = tl.sum(above_before, 0) + tl.minimum(equals, ties)

    equal = live & (image == threshold)
    equals += tl.cumsum(equal.to(tl.int32), 0)  # [BLOCK]: this one and those before it
    taken = (live & (image > threshold)) | (equal & (equals <= ties))
    place = start + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(out + place, i, mask=taken)


_ONE_PROGRAM = 8192
# Images a program of the radix selection, and how many of its programs' counts are added at once.
_BLOCK = 4096
_BLOCK_B = 256


def _launch_small(scores: torch.Tensor, include: torch.Tensor | None, out: torch.Tensor) -> None:
    block = max(128, 1 << (len(scores) - 1).bit_length())
    mask = scores if include is None else include.view(torch.uint8)
    _select_small.launch(
        (1,),
        scores.device,
        scores,
        mask,
        out,
        len(scores),
        len(out),
        HAS_INCLUDE=include is not None,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )


def _launch_large(scores: torch.Tensor, include: torch.Tensor | None, out: torch.Tensor) -> None:
    num_tokens, count, device = len(scores), len(out), scores.device
    programs = -(-num_tokens // _BLOCK)
    state = torch.zeros(1024 + 10 + 2 * programs, dtype=torch.int32, device=device)
    histograms, picks, blocks = state[:1024], state[1024:1034], state[1034:]
    given = (scores, scores if include is None else include.view(torch.uint8))
    options = {"HAS_INCLUDE": include is not None, "BLOCK": _BLOCK, "num_warps": min(8, max(1, _BLOCK // 512))}
    for number in range(4):
        arguments = (*given, histograms, picks, num_tokens, count, number)
        _count_digits.launch((programs,), device, *arguments, FIRST=number == 0, **options)
    _count_blocks.launch((programs,), device, *given, histograms, picks, blocks, num_tokens, **options)
    _write_taken.launch((programs,), device, *given, picks, blocks, out, num_tokens, BLOCK_B=_BLOCK_B, **options)


def _check(scores: torch.Tensor, count: int, include: torch.Tensor | None) -> None:
    if scores.dtype not in _DTYPES or scores.dim() != 1 or not scores.is_contiguous() or len(scores) >= 2**31:
        raise KernelArgumentError(
            f"scores is {scores.dtype} of shape {tuple(scores.shape)}, strides {scores.stride()}; it must be a dense "
            f"[T], T < 2**31, one of {', '.join(map(str, _DTYPES))}"
        )
    if not 0 <= count <= len(scores):
        raise KernelArgumentError(f"count is {count}; it must be 0 .. {len(scores)}, the number of scores")
    if include is None:
        return
    if include.dtype != torch.bool or include.shape != scores.shape or not include.is_contiguous():
        raise KernelArgumentError(
            f"include is {include.dtype} of shape {tuple(include.shape)}, strides {include.stride()}; it must be a "
            f"dense bool [{len(scores)}]"
        )
    if include.device != scores.device:
        raise KernelArgumentError(f"include is on {include.device}; it must be on {scores.device}, as the scores are")
