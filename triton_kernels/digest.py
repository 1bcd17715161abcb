"""What tensors hold: a digest of all their bytes, and a check of a few of their words that costs next to nothing.

    content_digest   128 bits of a tensor's bytes: equal bytes, equal digests, on every device
    WordProbe        remembers some words of many tensors and sees whether they are still there; one small launch

With w[i] the i-th 4-byte word (little-endian, the last one padded with zeros), and mix the finaliser of SplitMix64
(Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), half s of a digest is

    sum over i of mix(w[i] xor (i + 1) * G[s])        modulo 2^64

Position and value of a word go through a bijection of 64 bits before they are added, so words that trade places show;
addition is commutative, so programs may add in any order. It is no defence against somebody who makes weights to
collide, which is no threat here: whoever writes an engine's weights decides its answers anyway.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.launch import device_function, lazy_jit, runs_kernel

if TYPE_CHECKING:
    import triton.language as tl

_GOLDEN = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
_TILE, _TILES = 512, 16  # words a program mixes at once, and how often


def content_digest(tensor: torch.Tensor) -> torch.Tensor:
    """int64 `[2]` on the device of `tensor`: 128 bits of its bytes, in the order of its elements.

    Any shape, dtype and strides. One launch, plus a copy where elements do not lie in order or bytes are no multiple of
    four. Nothing is synchronised.
    """
    if not runs_kernel(tensor.device):
        return content_digest_torch(tensor)
    words = _words(tensor)
    out = torch.zeros(2, dtype=torch.int64, device=words.device)
    grid = (-(-len(words) // (_TILE * _TILES)),)
    _add_mixed.launch(grid, words.device, words, out, len(words), TILE=_TILE, TILES=_TILES, num_warps=4)
    return out


def content_digest_torch(tensor: torch.Tensor) -> torch.Tensor:
    """The definition of content_digest in torch."""
    words = _words(tensor)
    halves = torch.zeros(2, dtype=torch.int64, device=words.device)
    step = 1 << 20  # bounds what is allocated
    for start in range(0, len(words), step):
        part = words[start : start + step].long() & 0xFFFFFFFF
        index = torch.arange(start + 1, start + 1 + len(part), device=words.device)
        for half, golden in enumerate(_GOLDEN):
            halves[half] += _mix_torch(part ^ (index * _signed(golden))).sum()
    return halves


def flat_words(tensor: torch.Tensor) -> torch.Tensor | None:
    """The memory of a tensor as int32 `[n]`, in the order of addresses, without what is left over at its end.

    None where its elements leave gaps, share memory or are not aligned to four bytes.
    """
    dense = tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)
    if not dense or tensor.data_ptr() % 4:
        return None
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8)
    return flat[: len(flat) // 4 * 4].view(torch.int32)


class WordProbe:
    """Some words of tensors of one device, and whether they still hold them.

    words: of each tensor and look. sets: how many sets of words are remembered; one `look` compares one of them, so
    that looks together see `sets` times as much. What has less than four bytes, or gaps, is not looked at.
    on_host: whether words are compared on the CPU.
    The tensors' memory is kept alive for as long as the probe is.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, words: int = 2, sets: int = 32) -> None:
        random = np.random.default_rng(len(tensors))
        self._kept = [flat for flat in map(flat_words, tensors) if flat is not None and len(flat)]
        self._device = self._kept[0].device if self._kept else torch.device("cpu")
        if any(flat.device != self._device for flat in self._kept):
            raise KernelArgumentError("the tensors of a probe must be on one device")
        places, wanted = [np.empty((sets, 0), np.int64)], [torch.empty(sets, 0, dtype=torch.int32, device=self._device)]
        for flat in self._kept:
            at = random.integers(0, len(flat), (sets, words))
            places.append(flat.data_ptr() + 4 * at)
            wanted.append(flat[torch.from_numpy(at).to(self._device)])
        self._next = 0
        self._addresses, self._wanted = torch.from_numpy(np.concatenate(places, 1)), torch.cat(wanted, 1)
        self.on_host = not runs_kernel(self._device)
        self._changed = False
        self._done: Any = None
        if not self.on_host:
            self._addresses = self._addresses.to(self._device)
            self._flag = torch.zeros(1, dtype=torch.int32, device=self._device)
            pin = self._device.type == "cuda"
            self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=pin)
            self._done = torch.cuda.Event() if pin else None  # type: ignore[no-untyped-call]
        elif self._kept:
            # Memory from the lowest address to the highest as one array, of which only words of the tensors are read.
            table = self._addresses.numpy()
            self._lowest = int(table.min())
            span = int(table.max()) - self._lowest + 4
            memory = (ctypes.c_char * span).from_address(self._lowest)
            self._memory: np.ndarray = np.frombuffer(memoryview(memory).cast("B"), np.int32)
            self._offsets = (table - self._lowest) // 4
            self._expected = self._wanted.numpy()

    def look(self) -> None:
        """Compare the next set of words: at once on a CPU; elsewhere queued on the current stream, for `changed`."""
        if not self._addresses.shape[1]:
            return
        at = self._next
        self._next = (at + 1) % len(self._addresses)
        if self.on_host:
            self._changed |= not np.array_equal(self._memory[self._offsets[at]], self._expected[at])
            return
        count = self._addresses.shape[1]
        grid = (-(-count // _TILE),)
        row, wanted = self._addresses[at], self._wanted[at]
        _compare_words.launch(grid, self._device, row, wanted, self._flag, count, TILE=_TILE, num_warps=4)
        self._seen.copy_(self._flag, non_blocking=True)
        if self._done is not None:
            self._done.record()

    @property
    def changed(self) -> bool:
        """Whether any look so far has found other words. Waits for the last look, where that runs on a device."""
        if self._done is not None:
            self._done.synchronize()
        return self.seen_changed

    @property
    def seen_changed(self) -> bool:
        """The same, of looks that have ended."""
        if not self.on_host and (self._done is None or self._done.query()):
            self._changed |= bool(self._seen[0])
        return self._changed


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in the order of its elements, as int32 `[n]`."""
    flat = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    short = -len(flat) % 4
    if short or flat.data_ptr() % 4:
        flat = torch.cat([flat, flat.new_zeros(short)])
    return flat.view(torch.int32)


def _mix_torch(z: torch.Tensor) -> torch.Tensor:
    # int64 wraps as uint64 does; a shift to the right must be told not to copy the sign.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


@device_function
def _mixed(z: tl.tensor) -> tl.tensor:  # uint64 [TILE]
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@lazy_jit(do_not_specialize=["count"])
def _add_mixed(
    words: tl.tensor,  # int32 [count]
    out: tl.tensor,  # int64 [2]
    count: tl.tensor,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Program i adds what words i * TILE * TILES .. contribute."""
    first = tl.program_id(0).to(tl.int64) * TILE * TILES
    low = tl.zeros([TILE], tl.uint64)
    high = tl.zeros([TILE], tl.uint64)
    for tile in range(TILES):
        at = first + tile * TILE + tl.arange(0, TILE)  # [TILE]
        live = at < count
        word = tl.load(words + at, mask=live, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        index = (at + 1).to(tl.uint64)
        low += tl.where(live, _mixed(word ^ (index * 0x9E3779B97F4A7C15)), 0)
        high += tl.where(live, _mixed(word ^ (index * 0xD1B54A32D192ED03)), 0)
    tl.atomic_add(out, tl.sum(low, 0).to(tl.int64, bitcast=True))
    tl.atomic_add(out + 1, tl.sum(high, 0).to(tl.int64, bitcast=True))


@lazy_jit(do_not_specialize=["count"])
def _compare_words(
    addresses: tl.tensor,  # int64 [count]
    wanted: tl.tensor,  # int32 [count]
    flag: tl.tensor,  # int32 [1]
    count: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Program i sets the flag when one of the words i * TILE .. is not what was wanted."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)  # [TILE]
    live = at < count
    places = tl.load(addresses + at, mask=live, other=0).to(tl.pointer_type(tl.int32))
    found = tl.load(places, mask=live, other=0)
    other = (found != tl.load(wanted + at, mask=live, other=0)) & live
    if tl.max(other.to(tl.int32), 0) > 0:
        tl.atomic_max(flag, 1)
