"""What a codec does to the KV of some texts: bits an element, errors, and how far predictions move."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import torch

from lmcache.errors import ConfigError
from lmcache.kernels import PagedLayers, gather_tokens, scatter_tokens
from lmcache.kernels.codecs.base import Codec
from lmcache.kernels.codecs.coded import CodedPlane
from lmcache.kernels.codecs.kv_model import KV, KVModel, Sample
from lmcache.kernels.entropy.tables import entropy_bits
from lmcache.kernels.sides import PlaneCodec, Side

ELEMENT_BITS = 16  # what KV takes in the engines that users run: bfloat16


@dataclasses.dataclass(frozen=True)
class Found:
    """One codec on all documents. error: relative RMS of keys and of values. half: of the 95 % interval of kl.

    overhead: of an entropy coder's bytes, lengths and states included, over the empirical entropy of its symbols.
    """

    codec: str
    bits: float
    kl: float
    half: float
    top1: float
    key_error: float
    value_error: float
    overhead: float | None
    seconds: float


def measure(name: str, codec: Codec | None, model: KVModel, samples: Sequence[Sample], chunk_tokens: int) -> Found:
    started = time.monotonic()
    divergences, same, taken, elements = [], [], Taken(), 0
    squares = torch.zeros(2, 2, dtype=torch.float64)  # of errors and of values, of keys and of values
    for sample in samples:
        kv = there_and_back(codec, sample.kv, chunk_tokens, taken)
        for layer, other in zip(sample.kv, kv, strict=True):
            for side in (0, 1):
                elements += layer[side].numel()
                squares[0, side] += (layer[side] - other[side]).double().square().sum()
                squares[1, side] += layer[side].double().square().sum()
        divergence, top1 = model.divergence(sample, kv)
        divergences.append(divergence)
        same.append(top1)
    kl = torch.cat(divergences)
    errors = (squares[0] / squares[1]).sqrt().tolist()
    return Found(
        name,
        8 * taken.nbytes / elements if codec else float(ELEMENT_BITS),
        float(kl.mean()),
        1.96 * float(kl.std()) / math.sqrt(len(kl)),
        float(torch.cat(same).double().mean()),
        errors[0],
        errors[1],
        taken.overhead,
        time.monotonic() - started,
    )


@dataclasses.dataclass
class Taken:
    """What packed chunks take. coded: bytes of entropy coders; counts: how often their tables code each symbol."""

    nbytes: int = 0
    coded: int = 0
    counts: torch.Tensor | None = None

    @property
    def overhead(self) -> float | None:
        return None if self.counts is None else 8 * self.coded / float(entropy_bits(self.counts.double()).sum()) - 1


def there_and_back(codec: Codec | None, kv: KV, chunk_tokens: int, taken: Taken) -> KV:
    """KV after packing and unpacking."""
    heads, tokens, width = kv[0][0].shape
    layers = [torch.cat(sides, -1)[None].contiguous() for sides in kv]  # [1, H, T, 2D]
    pages = PagedLayers(layers)
    back = PagedLayers([torch.full_like(layer, math.nan) for layer in layers])
    sides = [Side("key", 0, width, heads), Side("value", width, width, heads)]
    plane = codec.bind(sides, range(len(kv)), 0, pages.device) if codec else None
    for start in range(0, tokens, chunk_tokens):
        slots = torch.arange(start, min(start + chunk_tokens, tokens))
        one_chunk(codec, plane, sides, pages, back, slots, taken)
    return [(layer[0, ..., :width], layer[0, ..., width:]) for layer in back.layers]


def one_chunk(
    codec: Codec | None,
    plane: PlaneCodec | None,
    sides: Sequence[Side],
    pages: PagedLayers,
    back: PagedLayers,
    slots: torch.Tensor,
    taken: Taken,
) -> None:
    exact = slots if codec is None or plane is None else slots[: codec.sink_tokens if slots[0] == 0 else 0]
    kept = torch.empty(pages.num_layers, len(exact), pages.token_bytes, dtype=torch.uint8)
    if codec is not None and plane is not None:
        slots = torch.cat([torch.full_like(exact, -1), slots[len(exact) :]])  # what is kept is not packed
        packed = plane.pack([side.of(pages) for side in sides], slots)
        if not bool(packed.sound):
            raise ConfigError(f"codec {codec.id} cannot pack this KV")
        parts = [part[: int(used)] for part, used in zip(packed.parts, packed.used, strict=True)]
        nbytes = sum(len(part) for part in parts)
        taken.nbytes += nbytes
        if isinstance(plane, CodedPlane):
            counts = plane.counts([side.of(pages) for side in sides], slots)
            taken.counts = counts if taken.counts is None else taken.counts + counts
            taken.coded += nbytes
        plane.unpack([side.of(back) for side in sides], slots, parts)
    if len(exact):
        gather_tokens(pages, exact, kept)
        scatter_tokens(back, exact, kept)
    # Kept tokens are counted as the engines that users run would keep them, in bfloat16.
    taken.nbytes += kept.numel() * ELEMENT_BITS // (8 * pages.dtype.itemsize)
