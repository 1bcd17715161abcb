"""Codecs of a size that varies, klt and cachegen: transform/ makes symbols, entropy/ packs them.

Parts of a chunk, in this order:

    lengths    uint16: words of each stream of what follows
    codes      one stream a (side, layer, head, run of tokens); channels take turns, each with its own table
    exponents  one stream a (side, layer)
    anchors, and their exponents: one stream a (side, layer), "cachegen" only
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from lmcache.errors import CorruptChunkError, KernelArgumentError
from lmcache.kernels.codecs.base import Codec, CodecConfig
from lmcache.kernels.codecs.profile import CERTAIN_TABLE, EXPONENT_TABLE, PROFILE_HINT, Profile
from lmcache.kernels.entropy.coder import MAX_SYMBOLS, max_words, rans_decode, rans_encode
from lmcache.kernels.entropy.tables import FrequencyTables
from lmcache.kernels.layers import PagedLayers
from lmcache.kernels.sides import Packed, PlaneCodec, Side
from lmcache.kernels.transform.ops import ANCHOR_GROUP, Symbols, pack_symbols, unpack_symbols

# A stream costs 40 bits: 1,024 symbols of 2.5 bits pay 1.6 % for being decoded beside others.
_STREAM_SYMBOLS = 1024


class ProfileConfig(CodecConfig):
    profile: str = Field("", description="a file that was measured for this model: lmcache profile")


class KltCodec(Codec):
    """`klt`. Its id holds the hash of the profile, so chunks stay readable when the file is moved."""

    name = "klt"
    Config = ProfileConfig

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config)
        assert isinstance(config, ProfileConfig)
        if not config.profile:
            raise KernelArgumentError(f"codec {self.name} needs profile, {PROFILE_HINT}")
        self._profile = Profile.load(Path(config.profile).expanduser())
        if self._profile.kind != self.name:
            raise KernelArgumentError(
                f"{config.profile} is a profile of kind {self._profile.kind!r}, not {self.name!r}"
            )

    @property
    def id(self) -> str:
        return f"{self.name}(profile={self._profile.digest},sink_tokens={self.sink_tokens})"

    def bind(self, sides: Sequence[Side], layers: Sequence[int], first_head: int, device: torch.device) -> PlaneCodec:
        return CodedPlane(self._profile, sides, layers, first_head, device)


class CacheGenCodec(KltCodec):
    name = "cachegen"


class CodedPlane(PlaneCodec):
    """A plane of keys and values of one head size, by the profile of the model that they are of."""

    fixed = False

    def __init__(
        self, profile: Profile, sides: Sequence[Side], layers: Sequence[int], first_head: int, device: torch.device
    ) -> None:
        num_layers, num_heads, width = profile.key.mean.shape
        shapes = [(side.role, side.heads, side.width) for side in sides]
        heads = sides[0].heads
        if shapes != [("key", heads, width), ("value", heads, width)]:
            raise KernelArgumentError(
                f"the profile is of keys and values of head size {width}, the pages hold {shapes}"
            )
        if max(layers) >= num_layers or first_head + heads > num_heads:
            raise KernelArgumentError(
                f"the profile is of {num_layers} layers of {num_heads} KV heads; the pages hold layers up to "
                f"{max(layers)} and heads up to {first_head + heads - 1}: it was made for another model"
            )
        self._profile = profile.part(layers, slice(first_head, first_head + heads), device)
        self._transforms = (self._profile.key, self._profile.value)
        self._coder = FrequencyTables(profile.freqs, device)
        self._shape = (2, len(layers), heads)
        self._width = width
        self._delta = self._profile.key.is_delta
        self._tables: dict[int, list[torch.Tensor]] = {}

    def max_bytes(self, tokens: int) -> list[int]:
        """Raises KernelArgumentError for so many tokens that a stream could have more symbols than its length tells."""
        shapes = self._streams(tokens)
        longest = max(symbols for _, symbols in shapes)
        if longest > MAX_SYMBOLS:
            raise KernelArgumentError(
                f"{tokens} tokens make streams of {longest} symbols, of which a stream can have {MAX_SYMBOLS}: lower "
                "chunk_tokens"
            )
        words = [2 * count * max_words(symbols) for count, symbols in shapes]
        return [2 * sum(count for count, _ in shapes), *words]

    def pack(self, pages: Sequence[PagedLayers], slots: torch.Tensor) -> Packed:
        symbols, sound = self._coded(pages, slots)
        encoded = [
            rans_encode(part, self._coder, tables)
            for part, tables in zip(self._as_streams(symbols), self._tables_for(len(slots)), strict=True)
        ]
        lengths = torch.cat([each.lengths.view(torch.int16) for each in encoded]).view(torch.uint8)
        words = [each.words.view(torch.uint8) for each in encoded]
        used = [torch.tensor(len(lengths)), *(2 * each.used for each in encoded)]
        # A stream that its tables cannot code has no length.
        complete = torch.stack([(each.lengths.view(torch.int16) != 0).all() for each in encoded]).all()
        return Packed([lengths, *words], used, sound & complete)

    def counts(self, pages: Sequence[PagedLayers], slots: torch.Tensor) -> torch.Tensor:
        """How often each table codes each symbol of these tokens, int64 `[K, 256]`: for measurements."""
        symbols, _ = self._coded(pages, slots)
        total = torch.zeros(len(self._profile.freqs) * 256, dtype=torch.int64, device=slots.device)
        for part, tables in zip(self._as_streams(symbols), self._tables_for(len(slots)), strict=True):
            repeated = tables.repeat(1, -(-part.shape[1] // tables.shape[1]))[:, : part.shape[1]]
            total += torch.bincount((repeated.long() * 256 + part.long()).flatten(), minlength=len(total))
        return total.view(-1, 256)

    def _coded(self, pages: Sequence[PagedLayers], slots: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(what `_symbols` made, filled; whether it tells all of the tokens)"""
        symbols = self._symbols(len(slots), slots.device)
        sound = [
            pack_symbols(side, slots, transform, Symbols(*(part[i] for part in symbols)))
            for i, (side, transform) in enumerate(zip(pages, self._transforms, strict=True))
        ]
        return symbols, sound[0] & sound[1]

    def unpack(
        self, pages: Sequence[PagedLayers], slots: torch.Tensor, parts: Sequence[torch.Tensor]
    ) -> torch.Tensor | None:
        symbols = self._symbols(len(slots), slots.device)
        streams = self._as_streams(symbols)
        counts = [len(part) for part in streams]
        if len(parts) != 1 + len(streams) or len(parts[0]) != 2 * sum(counts) or any(len(p) % 2 for p in parts):
            raise CorruptChunkError(
                f"a coded chunk of {len(slots)} tokens with parts of {[len(p) for p in parts]} bytes"
            )
        lengths = torch.split(parts[0].view(torch.uint16), counts)
        intact = [
            rans_decode(words.view(torch.uint16), length, self._coder, tables, part).all()
            for part, length, words, tables in zip(
                streams, lengths, parts[1:], self._tables_for(len(slots)), strict=True
            )
        ]
        whole = torch.stack(intact).all()
        on_cpu = whole.device.type == "cpu"
        if on_cpu and not bool(whole):
            raise CorruptChunkError("the streams of a coded chunk do not end where they should")
        for i, (side, transform) in enumerate(zip(pages, self._transforms, strict=True)):
            unpack_symbols(side, slots, transform, Symbols(*(part[i] for part in symbols)))
        return None if on_cpu else whole

    def _runs(self, tokens: int) -> int:
        """Into how many runs the tokens of a head are cut: equal ones, of whole groups of anchors."""
        runs = 1
        while (
            tokens % (2 * runs) == 0
            and tokens // (2 * runs) * self._width >= _STREAM_SYMBOLS
            and (not self._delta or tokens // (2 * runs) % ANCHOR_GROUP == 0)
        ):
            runs *= 2
        return runs

    def _streams(self, tokens: int) -> list[tuple[int, int]]:
        """(streams, symbols of each) of the codes, of the exponents, and of the anchors."""
        sides, layers, heads = self._shape
        runs = self._runs(tokens)
        shapes = [(sides * layers * heads * runs, tokens // runs * self._width), (sides * layers, heads * tokens)]
        if self._delta:
            groups = -(-tokens // ANCHOR_GROUP)
            shapes += [(sides * layers, heads * groups * self._width), (sides * layers, heads * groups)]
        return shapes

    def _symbols(self, tokens: int, device: torch.device) -> list[torch.Tensor]:
        """codes, exponents, anchors and their exponents of both sides: `[2, l, H, ...]`."""
        sides, layers, heads = self._shape
        both = Symbols.empty(sides * layers, heads, tokens, self._width, delta=self._delta, device=device)
        return [getattr(both, field.name).unflatten(0, (sides, layers)) for field in dataclasses.fields(both)]

    def _as_streams(self, symbols: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views `[streams, symbols]` of what `_symbols` made."""
        shapes = self._streams(symbols[0].shape[3])
        return [part.view(shape) for part, shape in zip(symbols, shapes, strict=False)]

    def _tables_for(self, tokens: int) -> list[torch.Tensor]:
        """Which table codes each symbol of each stream; period by period."""
        if tokens not in self._tables:
            tables, device = self._profile.tables, self._profile.tables.device
            runs, layers = self._runs(tokens), 2 * self._shape[1]
            if self._delta:
                # The first token of a group is its anchor, and differs from it by nothing.
                certain = torch.full_like(tables, CERTAIN_TABLE)
                tables = torch.cat([certain, *[tables] * (ANCHOR_GROUP - 1)], -1)
            codes = tables.flatten(0, 2).repeat_interleave(runs, 0).contiguous()
            exponents = torch.full((layers, 1), EXPONENT_TABLE, dtype=torch.int32, device=device)
            made = [codes, exponents]
            if self._delta:
                groups = -(-tokens // ANCHOR_GROUP)
                anchors = self._profile.anchor_tables[:, :, :, None].expand(-1, -1, -1, groups, -1)
                made += [anchors.reshape(layers, -1).contiguous(), exponents]
            self._tables[tokens] = made
        return self._tables[tokens]
