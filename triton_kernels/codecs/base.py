"""Codecs: how the KV of a run of tokens becomes bytes, by name.

    raw       the bytes of the pages
    fp8       e4m3, a scale a token and head
    int8      8-bit codes, a scale and a zero a token and head
    int4      KIVI: keys by channel in groups of tokens, values by token
    int2      the same with 2 bits
    rotated   2 to 4 bits a token and head after a randomised Hadamard rotation
    cachegen  anchors and differences from them, with the steps of a profile, entropy coded
    klt       transform coding with the matrices and steps of a profile, entropy coded

A codec's `id` names everything that its bytes depend on. `bind` gives what packs the pages of one plane.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.codecs.coded import CodedPlane
from lmcache.kernels.codecs.profile import Profile
from lmcache.kernels.layers import PagedLayers
from lmcache.kernels.quantise.grid import Quantiser, SideLayout, scales_are_finite
from lmcache.kernels.quantise.packing import pack_pages, unpack_pages
from lmcache.kernels.sides import Packed, PlaneCodec, Side
from lmcache.registry import Registry


class Codec(ABC):
    """sink_tokens: the first tokens of a text, to which all others attend, are kept as they are."""

    name: ClassVar[str]
    sink_tokens: int

    @property
    @abstractmethod
    def id(self) -> str:
        """Name and parameters: equal ids read each other's bytes."""

    @abstractmethod
    def bind(self, sides: Sequence[Side], layers: Sequence[int], first_head: int, device: torch.device) -> PlaneCodec:
        """What packs one plane: `sides` of its layers, which are `layers` of the model, heads first_head and on.

        Raises KernelArgumentError where this codec cannot pack it.
        """


@dataclasses.dataclass(frozen=True)
class QuantisedCodec(Codec):
    """Codecs of a fixed size: a quantiser for keys, and one for values."""

    name: ClassVar[str] = "quantised"
    sink_tokens: int = 4

    @property
    def id(self) -> str:
        fields = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return f"{self.name}({','.join(f'{name}={value}' for name, value in fields)})"

    @abstractmethod
    def quantisers(self) -> tuple[Quantiser, Quantiser]:
        """(of keys, of values)"""

    def bind(self, sides: Sequence[Side], layers: Sequence[int], first_head: int, device: torch.device) -> PlaneCodec:
        key, value = self.quantisers()
        return QuantisedPlane([key if side.role == "key" else value for side in sides], sides, len(layers))


class QuantisedPlane(PlaneCodec):
    """One part: `[l, bytes]`, a layer's sides one after another."""

    fixed = True

    def __init__(self, quantisers: Sequence[Quantiser], sides: Sequence[Side], num_layers: int) -> None:
        self._quantisers, self._sides, self._num_layers = quantisers, sides, num_layers

    def layouts(self, tokens: int) -> list[SideLayout]:
        pairs = zip(self._quantisers, self._sides, strict=True)
        return [SideLayout(quantiser, tokens, side.heads, side.width) for quantiser, side in pairs]

    def max_bytes(self, tokens: int) -> list[int]:
        return [self._num_layers * sum(layout.nbytes for layout in self.layouts(tokens))]

    def pack(self, pages: Sequence[PagedLayers], slots: torch.Tensor) -> Packed:
        (nbytes,) = self.max_bytes(len(slots))
        out = torch.zeros(nbytes, dtype=torch.uint8, device=slots.device)
        sound = torch.ones((), dtype=torch.bool, device=slots.device)
        for side_pages, layout, part in self._parts(pages, len(slots), out):
            pack_pages(side_pages, slots, layout.quantiser, part)
            sound = sound & scales_are_finite(part, layout)
        return Packed([out], [torch.tensor(nbytes)], sound)

    def unpack(self, pages: Sequence[PagedLayers], slots: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        for side_pages, layout, part in self._parts(pages, len(slots), parts[0]):
            unpack_pages(side_pages, slots, layout.quantiser, part)

    def _parts(
        self, pages: Sequence[PagedLayers], tokens: int, flat: torch.Tensor
    ) -> list[tuple[PagedLayers, SideLayout, torch.Tensor]]:
        by_layer, offset, parts = flat.view(self._num_layers, -1), 0, []
        for side_pages, layout in zip(pages, self.layouts(tokens), strict=True):
            parts.append((side_pages, layout, by_layer[:, offset : offset + layout.nbytes]))
            offset += layout.nbytes
        return parts


@dataclasses.dataclass(frozen=True)
class Fp8Codec(QuantisedCodec):
    name: ClassVar[str] = "fp8"
    sink_tokens: int = 0

    def quantisers(self) -> tuple[Quantiser, Quantiser]:
        return Quantiser(8, fp8=True), Quantiser(8, fp8=True)


@dataclasses.dataclass(frozen=True)
class Int8Codec(QuantisedCodec):
    name: ClassVar[str] = "int8"
    sink_tokens: int = 0

    def quantisers(self) -> tuple[Quantiser, Quantiser]:
        return Quantiser(8), Quantiser(8)


@dataclasses.dataclass(frozen=True)
class Int4Codec(QuantisedCodec):
    """group: tokens that share the scale of a key's channel."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    group: int = 64

    def quantisers(self) -> tuple[Quantiser, Quantiser]:
        return Quantiser(self.bits, "channel", group=self.group), Quantiser(self.bits)


@dataclasses.dataclass(frozen=True)
class Int2Codec(Int4Codec):
    name: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2
    group: int = 32


@dataclasses.dataclass(frozen=True)
class RotatedCodec(QuantisedCodec):
    """key_bits, value_bits: 2, 3, 4 or 8. seed: of the rotation's signs."""

    name: ClassVar[str] = "rotated"
    key_bits: int = 4
    value_bits: int = 4
    seed: int = 0

    def quantisers(self) -> tuple[Quantiser, Quantiser]:
        key, value = (Quantiser(bits, rotate=True, seed=self.seed) for bits in (self.key_bits, self.value_bits))
        return key, value


@dataclasses.dataclass(frozen=True)
class KltCodec(Codec):
    """profile: a file that experiments.kv_profile made for this model."""

    name: ClassVar[str] = "klt"
    profile: str = ""
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        if not self.profile:
            raise KernelArgumentError(
                f"codec {self.name} needs profile, a file made for the model: python -m experiments.kv_profile"
            )
        loaded = Profile.load(Path(self.profile).expanduser())
        if loaded.kind != self.name:
            raise KernelArgumentError(f"{self.profile} is a profile of kind {loaded.kind!r}, not {self.name!r}")
        object.__setattr__(self, "_loaded", loaded)

    @property
    def id(self) -> str:
        loaded: Profile = self.__dict__["_loaded"]
        return f"{self.name}(profile={loaded.digest},sink_tokens={self.sink_tokens})"

    def bind(self, sides: Sequence[Side], layers: Sequence[int], first_head: int, device: torch.device) -> PlaneCodec:
        return CodedPlane(self.__dict__["_loaded"], sides, layers, first_head, device)


@dataclasses.dataclass(frozen=True)
class CacheGenCodec(KltCodec):
    name: ClassVar[str] = "cachegen"


CODECS: Registry[type[Codec]] = Registry(
    "codec",
    {
        "fp8": "lmcache.kernels.codecs.base:Fp8Codec",
        "int8": "lmcache.kernels.codecs.base:Int8Codec",
        "int4": "lmcache.kernels.codecs.base:Int4Codec",
        "int2": "lmcache.kernels.codecs.base:Int2Codec",
        "rotated": "lmcache.kernels.codecs.base:RotatedCodec",
        "cachegen": "lmcache.kernels.codecs.base:CacheGenCodec",
        "klt": "lmcache.kernels.codecs.base:KltCodec",
    },
    "lmcache.codecs",
)
RAW = "raw"


def build_codec(given: str | Mapping[str, Any]) -> Codec | None:
    """`int4`, or `{type: int4, group: 32}` -> a codec; None for raw. KernelArgumentError names what is known."""
    options = {"type": given} if isinstance(given, str) else dict(given)
    name = options.pop("type", None)
    if name == RAW and not options:
        return None
    if name not in CODECS.names():
        raise KernelArgumentError(f"unknown codec {name!r}; known: {', '.join([RAW, *CODECS.names()])}")
    cls = CODECS.get(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in fields:
            raise KernelArgumentError(f"codec {name} has no option {key!r}; known: {', '.join(fields)}")
        if fields[key].type != type(value).__name__:
            raise KernelArgumentError(
                f"option {key} of codec {name} is {value!r}; it must be of type {fields[key].type}"
            )
    return cls(**options)
