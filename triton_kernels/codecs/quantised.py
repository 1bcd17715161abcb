"""Codecs of a fixed size: fp8, int8, int4, int2 and rotated quantise each element on its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from lmcache.kernels.codecs.base import Codec, CodecConfig
from lmcache.kernels.layers import PagedLayers
from lmcache.kernels.quantise.packing import pack_pages, unpack_pages
from lmcache.kernels.quantise.scheme import Scheme, SideLayout, scales_are_finite
from lmcache.kernels.sides import Packed, PlaneCodec, Side


class QuantisedCodec(Codec):
    """A way to quantise keys, and one to quantise values."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config)
        self._key, self._value = self.schemes(config)

    @abstractmethod
    def schemes(self, config: CodecConfig) -> tuple[Scheme, Scheme]:
        """(of keys, of values). Raises KernelArgumentError for options that none can have."""

    def bind(self, sides: Sequence[Side], layers: Sequence[int], first_head: int, device: torch.device) -> PlaneCodec:
        return QuantisedPlane([self._key if s.role == "key" else self._value for s in sides], sides, len(layers))


class EightBitConfig(CodecConfig):
    """Eight bits hold the outliers of the first tokens too, so those are packed like all others."""

    sink_tokens: int = 0


class Fp8Codec(QuantisedCodec):
    name = "fp8"
    Config = EightBitConfig

    def schemes(self, config: CodecConfig) -> tuple[Scheme, Scheme]:
        return Scheme(8, fp8=True), Scheme(8, fp8=True)


class Int8Codec(QuantisedCodec):
    name = "int8"
    Config = EightBitConfig

    def schemes(self, config: CodecConfig) -> tuple[Scheme, Scheme]:
        return Scheme(8), Scheme(8)


class Int4Config(CodecConfig):
    group: int = Field(64, description="tokens that share the scale of a key's channel")


class Int4Codec(QuantisedCodec):
    name = "int4"
    Config = Int4Config
    bits: ClassVar[int] = 4

    def schemes(self, config: CodecConfig) -> tuple[Scheme, Scheme]:
        assert isinstance(config, Int4Config)
        return Scheme(self.bits, "channel", group=config.group), Scheme(self.bits)


class Int2Config(Int4Config):
    group: int = 32


class Int2Codec(Int4Codec):
    name = "int2"
    Config = Int2Config
    bits = 2


class RotatedConfig(CodecConfig):
    key_bits: int = Field(4, description="bits of a key's element: 2, 3, 4 or 8")
    value_bits: int = Field(4, description="bits of a value's element: 2, 3, 4 or 8")
    seed: int = Field(0, description="of the rotation's signs")


class RotatedCodec(QuantisedCodec):
    name = "rotated"
    Config = RotatedConfig

    def schemes(self, config: CodecConfig) -> tuple[Scheme, Scheme]:
        assert isinstance(config, RotatedConfig)
        key, value = (Scheme(n, rotate=True, seed=config.seed) for n in (config.key_bits, config.value_bits))
        return key, value


class QuantisedPlane(PlaneCodec):
    """One part: `[l, bytes]`, a layer's sides one after another."""

    fixed = True

    def __init__(self, schemes: Sequence[Scheme], sides: Sequence[Side], num_layers: int) -> None:
        self._schemes, self._sides, self._num_layers = schemes, sides, num_layers

    def layouts(self, tokens: int) -> list[SideLayout]:
        pairs = zip(self._schemes, self._sides, strict=True)
        return [SideLayout(scheme, tokens, side.heads, side.width) for scheme, side in pairs]

    def max_bytes(self, tokens: int) -> list[int]:
        return [self._num_layers * sum(layout.nbytes for layout in self.layouts(tokens))]

    def pack(self, pages: Sequence[PagedLayers], slots: torch.Tensor) -> Packed:
        (nbytes,) = self.max_bytes(len(slots))
        out = torch.zeros(nbytes, dtype=torch.uint8, device=slots.device)
        sound = torch.ones((), dtype=torch.bool, device=slots.device)
        for side_pages, layout, part in self._parts(pages, len(slots), out):
            pack_pages(side_pages, slots, layout.scheme, part)
            sound = sound & scales_are_finite(part, layout)
        return Packed([out], [torch.tensor(nbytes)], sound)

    def unpack(self, pages: Sequence[PagedLayers], slots: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        for side_pages, layout, part in self._parts(pages, len(slots), parts[0]):
            unpack_pages(side_pages, slots, layout.scheme, part)

    def _parts(
        self, pages: Sequence[PagedLayers], tokens: int, flat: torch.Tensor
    ) -> list[tuple[PagedLayers, SideLayout, torch.Tensor]]:
        by_layer, offset, parts = flat.view(self._num_layers, -1), 0, []
        for side_pages, layout in zip(pages, self.layouts(tokens), strict=True):
            parts.append((side_pages, layout, by_layer[:, offset : offset + layout.nbytes]))
            offset += layout.nbytes
        return parts
