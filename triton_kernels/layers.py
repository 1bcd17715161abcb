"""The layers of a paged KV cache as the kernels see them: where each movable unit of bytes lies."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from lmcache.errors import KernelArgumentError

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclasses.dataclass(frozen=True)
class Units:
    """Where the units of a layer lie, in bytes. Unit i is unit i % per_block of block i // per_block."""

    blocks: int  # 1 where all units of a layer are evenly spaced
    per_block: int
    strips: int
    strip_bytes: int
    block_stride: int
    unit_stride: int
    strip_stride: int

    @property
    def count(self) -> int:
        return self.blocks * self.per_block

    @property
    def unit_bytes(self) -> int:
        return self.strips * self.strip_bytes


class PagedLayers:
    """The layers of one plane, inspected once so that every copy afterwards is cheap. Immutable and thread-safe.

    `layers` are views `[B, H, N, C]` with the same shape, strides, dtype and device, C contiguous, at any addresses.
    Raises KernelArgumentError for anything else. The views are kept, so their memory stays alive.
    """

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        _check_layers(layers)
        self.layers = tuple(layers)
        first = self.layers[0]
        self.num_layers = len(self.layers)
        self.num_blocks, self.heads, self.block_tokens, self.content = first.shape
        self.dtype = first.dtype
        self.device = first.device
        self.token_bytes = self.heads * self.content * self.dtype.itemsize
        self.page_bytes = self.block_tokens * self.token_bytes
        self.pointers = torch.tensor([t.data_ptr() for t in self.layers], dtype=torch.int64, device=self.device)
        self._page_units = _page_units(first)
        self.pages_are_dense = self._page_units is not None
        self.token_units = _token_units(first)
        self._groups = _storage_groups(self.layers)
        self.address_gcd = math.gcd(*(t.data_ptr() for t in self.layers))
        self._plane_cache: dict[tuple[Units, int], list[tuple[int, int, torch.Tensor]]] = {}

    @property
    def page_units(self) -> Units:
        """Raises KernelArgumentError where a page is not one run of bytes."""
        if self._page_units is None:
            layer = self.layers[0]
            raise KernelArgumentError(
                f"pages of shape {tuple(layer.shape)}, strides {layer.stride()} are not one run of bytes each, so they "
                "cannot be moved whole; use gather_tokens and scatter_tokens"
            )
        return self._page_units

    def word_bytes(self, units: Units) -> int:
        """The widest integer (8, 4, 2 or 1 bytes) that all strips of all layers can be cut into."""
        spans = (units.strip_bytes, units.block_stride, units.unit_stride, units.strip_stride)
        return math.gcd(8, *spans, *(byte_offset(t) for t in self.layers), *(group.step for group in self._groups))

    def planes(self, units: Units, word: int) -> list[tuple[int, int, torch.Tensor]]:
        """(first layer, every how many, words `[l, blocks, strips, per_block, words]`) of each storage group."""
        planes = self._plane_cache.get((units, word))
        if planes is None:
            shape = (units.blocks, units.strips, units.per_block, units.strip_bytes // word)
            steps = (units.block_stride // word, units.strip_stride // word, units.unit_stride // word, 1)
            planes = []
            for group in self._groups:
                sizes, strides = (group.number, *shape), (group.step // word, *steps)
                planes.append((group.first, group.every, reinterpret(self.layers[group.first], word, sizes, strides)))
            self._plane_cache[units, word] = planes
        return planes


def _strides(layer: torch.Tensor) -> tuple[int, int, int]:
    """Bytes from block to block, head to head, token to token."""
    size = layer.element_size()
    return layer.stride(0) * size, layer.stride(1) * size, layer.stride(2) * size


def _page_units(layer: torch.Tensor) -> Units | None:
    """None where the bytes of a page are not one run, in either order of heads and tokens."""
    blocks, heads, tokens, content = layer.shape
    _, head, token, _ = layer.stride()
    by_head = (tokens == 1 or token == content) and (heads == 1 or head == tokens * content)
    by_token = (heads == 1 or head == content) and (tokens == 1 or token == heads * content)
    page = layer[0].numel() * layer.element_size()
    return Units(1, blocks, 1, page, 0, _strides(layer)[0], 0) if by_head or by_token else None


def _token_units(layer: torch.Tensor) -> Units:
    blocks, heads, tokens, content = layer.shape
    block, head, token = _strides(layer)
    strip = content * layer.element_size()
    if heads == 1 or head == strip:
        heads, strip, head = 1, heads * strip, 0
    if tokens == 1:
        return Units(1, blocks, heads, strip, 0, block, head)
    if blocks == 1 or block == tokens * token:
        return Units(1, blocks * tokens, heads, strip, 0, token, head)
    return Units(blocks, tokens, heads, strip, block, token, head)


def byte_offset(tensor: torch.Tensor) -> int:
    """Bytes from the start of its storage."""
    return int(tensor.storage_offset()) * tensor.element_size()


def reinterpret(tensor: torch.Tensor, word: int, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """A view of the same memory, from the same address, as integers of `word` bytes."""
    words = torch.empty(0, dtype=_WORDS[word], device=tensor.device)
    return words.set_(tensor.untyped_storage(), byte_offset(tensor) // word, tuple(shape), tuple(strides))


@dataclasses.dataclass(frozen=True)
class _Group:
    """Layers first, first + every, ..: evenly spaced in one storage, `step` bytes apart."""

    first: int
    every: int
    number: int
    step: int


def _storage_groups(layers: Sequence[torch.Tensor]) -> list[_Group]:
    """All layers together if that can be, else every second one (keys, values), else each alone."""
    for every in (1, 2):
        groups = [_evenly_spaced(layers[first::every], first, every) for first in range(min(every, len(layers)))]
        found = [group for group in groups if group is not None]
        if len(found) == len(groups):
            return found
    return [_Group(i, 1, 1, 0) for i in range(len(layers))]


def _evenly_spaced(layers: Sequence[torch.Tensor], first: int, every: int) -> _Group | None:
    steps = {b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(layers)}
    storages = {t.untyped_storage().data_ptr() for t in layers}
    step = min(steps, default=0)
    if len(storages) > 1 or len(steps) > 1 or (steps and step <= 0):
        return None
    return _Group(first, every, len(layers), step)


def _check_layers(layers: Sequence[torch.Tensor]) -> None:
    if not layers:
        raise KernelArgumentError("layers is empty; give at least one tensor [B, H, N, C]")
    first = layers[0]
    if first.dim() != 4 or first.numel() == 0:
        raise KernelArgumentError(
            f"layers[0] has shape {tuple(first.shape)}; each must be [B, H, N, C], none of them 0"
        )
    if first.stride(3) != 1 and first.shape[3] > 1:
        raise KernelArgumentError(f"layers[0] has strides {first.stride()}; the last must be 1 (contiguous content)")
    for i, layer in enumerate(layers):
        for name in ("shape", "dtype", "device"):
            given, wanted = getattr(layer, name), getattr(first, name)
            if given != wanted:
                raise KernelArgumentError(
                    f"layers[{i}] has {name} {given}; all layers must have that of the first, {wanted}"
                )
        if layer.stride() != first.stride():
            raise KernelArgumentError(
                f"layers[{i}] has strides {layer.stride()}; all layers must have those of the first, {first.stride()}"
            )
