"""Pages <-> packed chunks. A packed chunk describes itself:

    0      4        6      8       12        16       24           32           248       256
    magic  version  sinks  tokens  sections  payload  (reserved)   codec id     checksum
                                             bytes                 (utf-8)      of the header
    256: bytes of each section, uint64; then the sections, each at a multiple of 64

For each plane: the raw rows of its first ``sinks`` tokens `[L, sinks, H, C]`, then the parts of its codec.
"""

from __future__ import annotations

import itertools
import operator
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash

from lmcache.engine.layout import PagedCache, Plane
from lmcache.engine.mover import BlockTables
from lmcache.engine.token_pages import TokenPages, is_plain
from lmcache.errors import ConfigError, CorruptChunkError, KernelArgumentError
from lmcache.kernels import gather_tokens, scatter_tokens
from lmcache.kernels.codecs.base import Codec
from lmcache.kernels.quantise.scheme import FLOATS
from lmcache.kernels.sides import Packed
from lmcache.storage.base import Buffer

MAGIC, VERSION = b"LMPK", 1
_FIELDS = struct.Struct("<4sHHIIQ8x216s")
_CHECKSUM = struct.Struct("<Q")
_FIXED = _FIELDS.size + _CHECKSUM.size
_ALIGN = 64
MAX_SINK_TOKENS = 0xFFFF  # of the header's field


@dataclass(frozen=True)
class Packing:
    """A chunk that is being packed: what ``PackedMover.pack`` has queued."""

    tokens: int
    sinks: int
    planes: list[tuple[torch.Tensor, Packed]]


@dataclass(frozen=True)
class PackedChunk:
    """A chunk that is packed: its header, and its sections on the device."""

    header: bytes
    sections: list[torch.Tensor]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(_rounded(len(section)) for section in self.sections)


class PackedMover:
    """Moves chunks between pages and pool buffers through a codec; used by the thread that runs the model.

    Raises ConfigError when the codec cannot pack this cache.
    """

    def __init__(self, cache: PagedCache, codec: Codec) -> None:
        self.cache = cache
        self.codec = codec
        self._pages = TokenPages(cache)
        if len(codec.id.encode()) > 216:
            raise ConfigError(f"the codec's parameters are too long for a chunk's header: {codec.id}")
        if not 0 <= codec.sink_tokens <= MAX_SINK_TOKENS:
            raise ConfigError(
                f"codec {codec.name}: sink_tokens is {codec.sink_tokens}; 0 to {MAX_SINK_TOKENS} are kept"
            )
        self._planes = []
        for plane in cache.planes:
            if not plane.sides:
                raise ConfigError(f"codec {codec.name}: how layer {plane.names[0]} keeps keys and values is not known")
            if plane.pages.dtype not in FLOATS:
                raise ConfigError(
                    f"codec {codec.name}: layer {plane.names[0]} keeps KV as {plane.pages.dtype}, which is packed "
                    "already; use raw, or have the engine keep bfloat16, float16 or float32"
                )
            if cache.opaque and not is_plain(plane) and cache.cpu_isa is None:
                raise ConfigError(f"codec {codec.name}: the order of this processor's KV blocks is not known; use raw")
            try:
                bound = codec.bind(plane.sides, plane.layer_numbers, plane.first_head, cache.device)
            except KernelArgumentError as error:
                raise ConfigError(f"codec {codec.name}: {error}") from error
            self._planes.append(bound)

    def rehearse(self, tokens: int) -> None:
        """Pack and unpack chunks without KV, so that what cannot be done is known before KV is.

        Raises ConfigError where chunks of ``tokens``, or of fewer, cannot be packed on this device.
        """
        for plane, bound in zip(self.cache.planes, self._planes, strict=True):
            try:
                for fewer in range(self.cache.unit, tokens, self.cache.unit):
                    bound.max_bytes(fewer)
                ids = torch.full((tokens // plane.block_tokens,), -1, dtype=torch.int64, device=self.cache.device)
                view = self._pages.view(plane, ids)
                sides = [side.of(view.pages) for side in plane.sides]
                packed = bound.pack(sides, view.slots)
                parts = [part[: int(n)] for part, n in zip(packed.parts, packed.used, strict=True)]
                bound.unpack(sides, view.slots, parts)
            # A compiler, a driver or an allocator may refuse in its own words.
            except Exception as error:
                raise ConfigError(
                    f"codec {self.codec.name} cannot pack chunks of {tokens} tokens of layer {plane.names[0]} on "
                    f"{self.cache.device}: {error}"
                ) from error

    def sizes(self, start: int, stop: int) -> int | range:
        """Bytes of a chunk of token positions ``[start, stop)``, or the range that they are in."""
        tokens, sinks = stop - start, self._sinks(start, stop)
        total = self._header_bytes()
        for plane, bound in zip(self.cache.planes, self._planes, strict=True):
            total += _rounded(self._sink_bytes(plane, sinks)) + sum(map(_rounded, bound.max_bytes(tokens)))
        return total if all(bound.fixed for bound in self._planes) else range(self._header_bytes(), total + 1)

    def pack(self, tables: BlockTables, start: int, stop: int) -> Packing:
        """Queue the packing of token positions ``[start, stop)`` (whole blocks)."""
        sinks, planes = self._sinks(start, stop), []
        for plane, bound in zip(self.cache.planes, self._planes, strict=True):
            size = plane.block_tokens
            view = self._pages.read(plane, tables[plane.group][start // size : stop // size])
            kept = torch.zeros(self._sink_shape(plane, sinks), dtype=view.pages.dtype, device=view.slots.device)
            gather_tokens(view.pages, view.slots[:sinks], kept)
            packed = bound.pack([side.of(view.pages) for side in plane.sides], _without(view.slots, sinks))
            planes.append((kept.view(-1).view(torch.uint8), packed))
        return Packing(stop - start, sinks, planes)

    def finish(self, packings: Sequence[Packing]) -> list[PackedChunk | None]:
        """Wait for them, once for all; None for KV that cannot be packed (not finite, too large for a scale)."""
        facts = [f for p in packings for _, packed in p.planes for f in (packed.sound.long(), *packed.used)]
        device = self.cache.device
        numbers = iter(torch.stack([f.to(device, torch.int64) for f in facts]).tolist() if facts else [])
        return [self._finished(packing, numbers) for packing in packings]

    def write(self, chunk: PackedChunk, into: Buffer) -> None:
        """Copy it to host memory; on a GPU queued on the current stream."""
        into.view[: len(chunk.header)] = chunk.header
        host, offset = torch.frombuffer(into.view, dtype=torch.uint8), len(chunk.header)
        for section in chunk.sections:
            host[offset : offset + len(section)].copy_(section, non_blocking=True)
            padded = _rounded(len(section))
            host[offset + len(section) : offset + padded].zero_()
            offset += padded

    def scatter(
        self, tables: BlockTables, start: int, stop: int, chunk: Buffer, *, write: tuple[int, int]
    ) -> list[torch.Tensor]:
        """``chunk``, which holds token positions ``[start, stop)`` -> pages, but only the positions in ``write``.

        Raises CorruptChunkError for a chunk that is not one of this codec and of these positions. Returns bool scalars
        on the device: what was written is the chunk's content where all are true.
        """
        sinks, sections = self._sections(chunk, start, stop)
        first, last = max(start, write[0]), min(stop, write[1])
        found = []
        for plane, bound in zip(self.cache.planes, self._planes, strict=True):
            kept, *parts = itertools.islice(sections, 1 + len(bound.max_bytes(stop - start)))
            size = plane.block_tokens
            ids = tables[plane.group][first // size : last // size]
            if len(ids) != (last - first) // size:
                raise KernelArgumentError(f"a table of {len(tables[plane.group])} blocks ends before token {last}")
            table = torch.nn.functional.pad(ids, ((first - start) // size, (stop - last) // size), value=-1)
            view = self._pages.view(plane, table)
            whole = bound.unpack([side.of(view.pages) for side in plane.sides], _without(view.slots, sinks), parts)
            if whole is not None:
                found.append(whole)
            if sinks:
                rows = kept.view(plane.pages.dtype).view(self._sink_shape(plane, sinks))
                scatter_tokens(view.pages, view.slots[:sinks], rows)
            self._pages.write_back(plane, view, table)
        return found

    def _finished(self, packing: Packing, numbers: Iterator[int]) -> PackedChunk | None:
        sections, sound = [], True
        for kept, packed in packing.planes:
            sound &= bool(next(numbers))
            sections.append(kept)
            sections += [part[: next(numbers)] for part in packed.parts]
        return PackedChunk(self._header(packing, sections), sections) if sound else None

    def _header(self, packing: Packing, sections: Sequence[torch.Tensor]) -> bytes:
        total = self._header_bytes() + sum(_rounded(len(section)) for section in sections)
        fields = _FIELDS.pack(
            MAGIC, VERSION, packing.sinks, packing.tokens, len(sections), total, self.codec.id.encode()
        )
        sizes = struct.pack(f"<{len(sections)}Q", *map(len, sections))
        checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields + sizes))
        return (fields + checksum + sizes).ljust(self._header_bytes(), b"\0")

    def _sections(self, chunk: Buffer, start: int, stop: int) -> tuple[int, Iterator[torch.Tensor]]:
        """(sinks, the sections on the device)"""
        view, size = chunk.view, self._header_bytes()
        count = self._num_sections()
        if view.nbytes < size:
            raise CorruptChunkError(f"a packed chunk of {view.nbytes} bytes, its header alone has {size}")
        magic, version, sinks, tokens, sections, total, codec = _FIELDS.unpack_from(view)
        (checksum,) = _CHECKSUM.unpack_from(view, _FIELDS.size)
        sizes = struct.unpack_from(f"<{count}Q", view, _FIXED)
        if (magic, version) != (MAGIC, VERSION) or sections != count:
            raise CorruptChunkError("not a packed chunk of this cache")
        if xxhash.xxh3_64_intdigest(bytes(view[: _FIELDS.size]) + bytes(view[_FIXED : _FIXED + 8 * count])) != checksum:
            raise CorruptChunkError("the checksum of a packed chunk's header is wrong")
        if codec.rstrip(b"\0") != self.codec.id.encode():
            raise CorruptChunkError(f"a chunk of codec {codec.rstrip(bytes(1))!r}, expected {self.codec.id}")
        if (tokens, sinks, total) != (stop - start, self._sinks(start, stop), view.nbytes):
            raise CorruptChunkError(f"a packed chunk of {tokens} tokens in {total} bytes, {sinks} of them kept raw")
        if size + sum(map(_rounded, sizes)) != total:
            raise CorruptChunkError("the sections of a packed chunk do not add up to its bytes")
        if not all(map(operator.contains, self._section_sizes(tokens, sinks), sizes)):
            raise CorruptChunkError(f"a packed chunk with sections of {sizes} bytes")
        flat = torch.frombuffer(view, dtype=torch.uint8)
        if self.cache.device.type != "cpu":
            flat = flat.to(self.cache.device, non_blocking=True)
        starts = itertools.accumulate(map(_rounded, sizes), initial=size)
        parts = [flat[at : at + length] for at, length in zip(starts, sizes, strict=False)]
        return sinks, iter(parts)

    def _section_sizes(self, tokens: int, sinks: int) -> Iterator[range]:
        """Which sizes each section may have."""
        for plane, bound in zip(self.cache.planes, self._planes, strict=True):
            kept = self._sink_bytes(plane, sinks)
            yield range(kept, kept + 1)
            for most in bound.max_bytes(tokens):
                yield range(most if bound.fixed else 0, most + 1)

    def _sinks(self, start: int, stop: int) -> int:
        return min(self.codec.sink_tokens, stop) if start == 0 else 0

    def _sink_shape(self, plane: Plane, sinks: int) -> tuple[int, int, int, int]:
        return plane.pages.num_layers, sinks, plane.pages.heads, plane.pages.content

    def _sink_bytes(self, plane: Plane, sinks: int) -> int:
        return plane.pages.num_layers * sinks * plane.pages.token_bytes

    def _num_sections(self) -> int:
        return sum(1 + len(bound.max_bytes(8)) for bound in self._planes)

    def _header_bytes(self) -> int:
        return _rounded(_FIXED + 8 * self._num_sections())


def _without(slots: torch.Tensor, sinks: int) -> torch.Tensor:
    """What a codec sees: the sinks' outliers, kept as they are, would only coarsen the steps of other tokens."""
    return torch.nn.functional.pad(slots[sinks:], (sinks, 0), value=-1) if sinks else slots


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
