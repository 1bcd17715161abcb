"""How the KV of a segment lies in chunks.

One chunk for each few layers, never split along the tokens:

    chunk    layers [first, stop) of T tokens: as many as fit ``chunk_bytes``, at least one
    0        64                      a multiple of 64
    record   T token ids, uint32     layer: K [T, H, D], V [T, H, D]    next layer ...

- a layer is one range of bytes, and what comes first is needed first, so that reading may go on while layers compute;
- no chunk is much longer than ``chunk_bytes``, however long the segment is: pools, batches and files stay even;
- a segment is never split along its tokens: it is read whole or counts as missing.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import xxhash

from lmcache.errors import ConfigError, CorruptChunkError
from lmcache.kernels.rotary.tables import RotaryTable
from lmcache.keys import KVFormat, PlaneFormat
from lmcache.storage.base import Buffer

MAGIC, VERSION = b"LMSG", 1
_RECORD = struct.Struct("<4sIIIIQQ")  # magic, version, tokens, first layer, stop layer, stored_at, run
_CHECKSUM = struct.Struct("<Q")
_TOKENS_AT = 64
_ALIGN = 64
_CPU = torch.device("cpu")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class SegmentFormat:
    """What the KV of a model is, all heads in one process; its ropes turn heads in halves, from the first element.

    model: identity of the weights, as in KVFormat. heads: KV heads. tables: the rope of each layer, None where a layer
    has none; layers with the same rope share one table. Their device is that of the KV that is handed out.
    extras: whatever else changes KV. Raises ConfigError for what cannot be.
    """

    model: str
    dtype: torch.dtype
    heads: int
    head_dim: int
    tables: tuple[RotaryTable | None, ...]
    device: torch.device = _CPU
    extras: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype is {self.dtype}; segments keep one of {', '.join(map(str, _DTYPES))}")
        if min(len(self.tables), self.heads, self.head_dim) < 1:
            raise ConfigError(f"{len(self.tables)} layers of {self.heads} heads of {self.head_dim}: none may be 0")
        for table in self.ropes:
            if table.width > self.head_dim:
                raise ConfigError(f"a rope turns {table.width} elements from 0; a head has {self.head_dim}")
            if table.cos_sin.device != self.device:
                raise ConfigError(f"a table is on {table.cos_sin.device}, the KV on {self.device}: use table.to()")

    @property
    def layers(self) -> int:
        return len(self.tables)

    @cached_property
    def ropes(self) -> tuple[RotaryTable, ...]:
        """Each table once."""
        return tuple({id(table): table for table in self.tables if table is not None}.values())

    @property
    def positions(self) -> int | None:
        """How many positions all tables have; None where no layer has a rope."""
        return min((table.positions for table in self.ropes), default=None)

    def kv_format(self) -> KVFormat:
        """As storage knows it: its fingerprint is no engine's, for the layout is none of theirs."""
        plane = PlaneFormat(
            group=0,
            layers=tuple(f"layer.{index}" for index in range(self.layers)),
            heads=self.heads,
            block_tokens=1,
            content=2 * self.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),
            kind="segment",
        )
        return KVFormat(
            model=self.model,
            chunk_tokens=1,
            planes=(plane,),
            layout=f"segment/{VERSION}",
            extras=(*sorted(self.extras), ("lmcache.ropes", self._rope_digest())),
        )

    def _rope_digest(self) -> str:
        """Of what turns keys in which layer. Position 1 tells frequencies apart, however long a table is."""
        h = hashlib.blake2b(digest_size=16)
        for table in self.tables:
            if table is not None:
                h.update(table.cos_sin[min(1, table.positions - 1)].cpu().numpy().astype("<f4").tobytes())
                # Zeros: heads turn from their first element on, in halves.
                h.update(struct.pack("<dqq", table.attention_factor, 0, 0))
            h.update(b"/")
        return h.hexdigest()


class LayerGroup(NamedTuple):
    """Layers ``[first, stop)`` of one segment: a chunk."""

    first: int
    stop: int


class Record(NamedTuple):
    stored_at: int
    run: int  # of the model: a digest of what it made


class SegmentLayout:
    """How a segment of so many tokens lies in chunks."""

    def __init__(self, format: SegmentFormat, tokens: int, chunk_bytes: int) -> None:
        self.tokens = tokens
        self.layer_bytes = 2 * tokens * format.heads * format.head_dim * format.dtype.itemsize
        self.data_at = -(-(_TOKENS_AT + 4 * tokens) // _ALIGN) * _ALIGN
        self._shape = (2, tokens, format.heads, format.head_dim)
        self._dtype = format.dtype
        self.each = min(format.layers, max(1, chunk_bytes // self.layer_bytes))
        self.groups = [LayerGroup(at, min(at + self.each, format.layers)) for at in range(0, format.layers, self.each)]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each chunk."""
        return [self.chunk_bytes(group) for group in self.groups]

    def chunk_bytes(self, group: LayerGroup) -> int:
        return self.data_at + (group.stop - group.first) * self.layer_bytes

    def layer(self, chunk: Buffer, within: int) -> torch.Tensor:
        """Keys and values ``[2, T, H, D]`` of layer number ``within`` of a chunk: a view."""
        at = self.data_at + within * self.layer_bytes
        return torch.frombuffer(chunk.view[at : at + self.layer_bytes], dtype=self._dtype).view(self._shape)


def run_digest(layer: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Tells runs of the model apart: what its last layer made depends on all that the tokens stood behind."""
    h = xxhash.xxh3_64()
    for tensor in layer:
        h.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return h.intdigest()


def write_record(buffer: Buffer, group: LayerGroup, tokens: bytes, record: Record, data_at: int) -> None:
    fields = _RECORD.pack(MAGIC, VERSION, len(tokens) // 4, *group, *record)
    head = fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))
    buffer.view[:data_at] = (head.ljust(_TOKENS_AT, b"\0") + tokens).ljust(data_at, b"\0")


def read_record(buffer: Buffer, group: LayerGroup, tokens: bytes) -> Record:
    """What a chunk says of itself; CorruptChunkError unless it is that of these layers and of these very tokens."""
    view = buffer.view
    magic, version, count, first, stop, stored_at, run = _RECORD.unpack_from(view)
    (checksum,) = _CHECKSUM.unpack_from(view, _RECORD.size)
    if (magic, version) != (MAGIC, VERSION) or xxhash.xxh3_64_intdigest(view[: _RECORD.size]) != checksum:
        raise CorruptChunkError("not a segment's chunk, or its record is damaged")
    if (count, first, stop) != (len(tokens) // 4, *group):
        raise CorruptChunkError(f"a chunk of {count} tokens in layers {first} to {stop - 1}")
    if view[_TOKENS_AT : _TOKENS_AT + len(tokens)] != tokens:
        raise CorruptChunkError("a chunk of other tokens")
    return Record(stored_at, run)
