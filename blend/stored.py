"""The KV of one prompt's segments, from the pool's buffers to layers at the prompt's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from lmcache.blend.chunks import Record, SegmentFormat, SegmentLayout, read_record
from lmcache.blend.reuse import Segment
from lmcache.errors import ClosedError, CorruptChunkError, LeaseExpiredError
from lmcache.kernels.rotary.shift import RotaryShift
from lmcache.keys import ChunkKey
from lmcache.storage.lease import Lease
from lmcache.storage.memory.pool import PoolBuffer


class PrefixKV(Protocol):
    """The exact KV of a prompt's first tokens: a prefix that was cached, or has been computed."""

    @property
    def tokens(self) -> int: ...

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each ``[tokens, H, D]`` or longer, in the format's dtype and on its device."""
        ...


class Wanted(NamedTuple):
    """Rows ``[row, row + stop - start)`` of a stored segment for tokens ``[start, stop)`` of the prompt."""

    start: int
    stop: int
    row: int
    tokens: bytes  # of the stored segment
    keys: list[ChunkKey]
    layout: SegmentLayout


class Part(NamedTuple):
    """The same when its chunks are held, or on their way. places: theirs in the lease."""

    wanted: Wanted
    record: Record
    lease: Lease
    places: Sequence[int]


class StoredKV:
    """The ``ReusedKV`` of one prompt. Thread-safe.

    It holds the segments' buffers until ``close``; a lease that is asked for nothing runs out after
    ``lease_timeout_s``.
    """

    def __init__(self, format: SegmentFormat, tokens: int, parts: Sequence[Part], prefix: PrefixKV | None) -> None:
        self._format, self._tokens, self._parts, self._prefix = format, tokens, parts, prefix
        self.closed = False
        first = prefix.tokens if prefix else 0
        self.segments: Sequence[Segment] = [Segment(part.wanted.start, part.wanted.stop) for part in parts]
        covered, old = torch.zeros(tokens, dtype=torch.bool), torch.full((tokens,), -1)
        covered[:first] = True
        for part in parts:
            start, stop, row = part.wanted[:3]
            covered[start:stop] = True
            at = part.record.stored_at + row
            old[start:stop] = torch.arange(at, at + stop - start)
        self._gaps = _intervals(~covered)
        self.covered = covered.to(format.device)
        self.exact = torch.arange(tokens, device=format.device) < first
        old, new = old.to(format.device), torch.arange(tokens, device=format.device)
        self._shifts = {id(table): RotaryShift(old, new, table) for table in format.ropes}

    def behind(self, prefix: PrefixKV | None) -> StoredKV:
        """The same segments behind another prefix, which goes before those that it overlaps. Only one is closed."""
        return StoredKV(self._format, self._tokens, self._parts, prefix)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each ``[T, H, D]``, fresh: what is not covered is 0.

        Raises LeaseExpiredError when the segments are no longer held, ClosedError after ``close``; and where they were
        still on their way (``pipelined``), LeaseExpiredError or CorruptChunkError when this layer did not come.
        """
        if self.closed:
            raise ClosedError("this KV of segments is closed")
        if not 0 <= index < self._format.layers:
            raise IndexError(f"layer {index}; there are {self._format.layers}")
        shape = (self._tokens, self._format.heads, self._format.head_dim)
        keys = torch.empty(shape, dtype=self._format.dtype, device=self._format.device)
        values = torch.empty_like(keys)
        for gap in self._gaps:
            keys[gap] = 0
            values[gap] = 0
        self._copy(index, keys, values)
        table = self._format.tables[index]
        if table is not None:
            self._shifts[id(table)].apply(keys)
        if self._prefix is not None and (count := self._prefix.tokens):
            exact_keys, exact_values = self._prefix.layer(index)
            keys[:count] = exact_keys[:count]
            values[:count] = exact_values[:count]
        return keys, values

    @property
    def pending_bytes(self) -> int:
        """What has not come into memory yet of the segments' chunks (``pipelined``)."""
        return sum(
            size
            for part in self._parts
            for place, size in zip(part.places, part.wanted.layout.sizes, strict=True)
            if place >= part.lease.ready
        )

    def close(self) -> None:
        """Let go of the segments. Idempotent."""
        self.closed = True
        for part in self._parts:
            part.lease.close()

    def __enter__(self) -> StoredKV:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        held: dict[int, list[PoolBuffer]] = {}
        try:
            for part in self._parts:
                wanted, lease = part.wanted, part.lease
                number, within = divmod(index, wanted.layout.each)
                place = part.places[number]
                if len(held.get(id(lease), ())) <= place:
                    lease.wait_ready(place + 1)
                    lease.renew()
                    release(held.pop(id(lease), []))
                    # Handles of our own: the lease may be closed on another thread while its bytes are being copied.
                    held[id(lease)] = lease.share()
                    if len(held[id(lease)]) <= place:
                        raise LeaseExpiredError(f"layer {index} of the segments is not held: retrieve them again")
                chunk = held[id(lease)][place]
                if read_record(chunk, wanted.layout.groups[number], wanted.tokens) != part.record:
                    raise CorruptChunkError(f"layer {index} of a segment is of another run of the model")
                rows = wanted.layout.layer(chunk, within)[:, wanted.row : wanted.row + wanted.stop - wanted.start]
                keys[wanted.start : wanted.stop] = rows[0]
                values[wanted.start : wanted.stop] = rows[1]
        finally:
            for buffers in held.values():
                release(buffers)


def release(buffers: Sequence[PoolBuffer]) -> None:
    for buffer in buffers:
        buffer.release()


def _intervals(mask: torch.Tensor) -> list[slice]:
    """Where a bool ``[T]`` is true."""
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff().nonzero().flatten().tolist()
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
