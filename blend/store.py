"""KV of segments in storage, and back at whatever positions a prompt has them.

Kept as the engine made it: keys turned at the positions stored_at, stored_at + 1, ... that the tokens had then, which
is kept with them. Whoever asks gets keys turned by the difference on (lmcache.kernels.rotary), values as they are.

The key is of the tokens alone (and of what placeholders among them stand for), not of where they stood or behind what,
in a namespace of its own: see ``SegmentStore``. What is read is used only if it is what was asked for: the tokens in
the record are compared, and all chunks must come from one and the same run of the model.
Only raw KV is kept: codecs pack an engine's pages, and their chunks mean nothing without them.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch

from lmcache import metrics
from lmcache.blend.layout import Record, SegmentFormat, SegmentLayout, read_record, run_digest, write_record
from lmcache.blend.reuse import Segment
from lmcache.blend.segments import Match, Tokens, as_tokens, explicit_spans
from lmcache.engine.engine import TokenIds
from lmcache.errors import ClosedError, ConfigError, CorruptChunkError, KernelArgumentError, LeaseExpiredError
from lmcache.kernels.codecs import RAW
from lmcache.kernels.rotary_shift import RotaryShift
from lmcache.keys import ChunkKey, PlaceholderSpan, chunk_digest, namespace
from lmcache.storage.eviction import Place
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.pool import PoolBuffer

logger = logging.getLogger(__name__)

KIND_TAG = "lmcache.kind"
_PARENT = struct.Struct("<16sQQ")  # stands where a chunk's digest has its parent: 32 bytes


class PrefixKV(Protocol):
    """The exact KV of a prompt's first tokens: a prefix that was cached, or has been computed."""

    @property
    def tokens(self) -> int: ...

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each ``[tokens, H, D]`` or longer, in the format's dtype and on its device."""
        ...


class _Wanted(NamedTuple):
    """Rows ``[row, row + stop - start)`` of a stored segment for tokens ``[start, stop)`` of the prompt."""

    start: int
    stop: int
    row: int
    tokens: bytes  # of the stored segment
    keys: list[ChunkKey]


class _Part(NamedTuple):
    """The same when its chunks are held."""

    wanted: _Wanted
    lease: Lease
    stored_at: int


class SegmentStore:
    """Segments' KV in and out of a StorageManager. Thread-safe.

    chunk_bytes: about how long a chunk is; part of the keys, as it says what a chunk holds.
    codec: of the configuration. Only raw is supported; ConfigError for any other.

    Keys: ``namespace(fingerprint of format.kv_format(), tags + lmcache.kind=segment)`` and the digest of the tokens and
    the layers; neither the fingerprint, nor the tags, nor what is digested is ever that of an exact prefix chunk.
    """

    def __init__(
        self,
        manager: StorageManager,
        format: SegmentFormat,
        *,
        chunk_bytes: int = 4 << 20,
        codec: str | Mapping[str, Any] = RAW,
    ) -> None:
        if codec not in (RAW, {"type": RAW}):
            raise ConfigError(f"codec is {codec!r}: segments are kept raw; set codec to raw where segments are reused")
        if chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
        self.format = format
        self._manager = manager
        self._chunk_bytes = chunk_bytes
        self._fingerprint = format.kv_format().fingerprint()

    def keys(
        self, tokens: TokenIds, *, tags: Mapping[str, str] | None = None, placeholders: Sequence[PlaceholderSpan] = ()
    ) -> list[ChunkKey]:
        """The keys of a segment's chunks. placeholders: counted from its first token."""
        return self._keys(_packed(as_tokens(tokens)), 0, tags, placeholders)

    def holds(
        self, tokens: TokenIds, *, tags: Mapping[str, str] | None = None, placeholders: Sequence[PlaceholderSpan] = ()
    ) -> bool:
        """Whether tiers say that they have all of a segment."""
        keys = self.keys(tokens, tags=tags, placeholders=placeholders)
        return self._manager.contains(keys) == len(keys)

    def put(
        self,
        tokens: TokenIds,
        stored_at: int,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        tags: Mapping[str, str] | None = None,
        placeholders: Sequence[PlaceholderSpan] = (),
    ) -> bool:
        """Store a segment's KV, unless it is held; False when memory has no room for it (a future miss, counted).

        tokens: of the segment alone. stored_at: the position that the first of them had when its keys were turned.
        layers: keys (turned) and values of every layer, each ``[T, H, D]``. placeholders: counted from its first token.
        Raises KernelArgumentError for tensors of another shape or dtype, and for positions that the ropes' tables lack.
        """
        array = as_tokens(tokens)
        self._check_put(len(array), stored_at, layers)
        packed = _packed(array)
        keys = self._keys(packed, 0, tags, placeholders)
        present = self._manager.contains(keys)
        if present == len(keys):
            return True
        if present:
            # What is left of a segment, of another run of the model perhaps: it would stay, and match nothing.
            self._manager.remove(keys)
        buffers = self._filled(packed, stored_at, layers)
        if buffers is None:
            metrics.STORE_REFUSED_TOKENS.inc(len(array))
            return False
        for index, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            self._manager.put(key, buffer, Place(keys[index - 1] if index else None, 0, len(array)))
        metrics.SEGMENT_TOKENS.labels("stored").inc(len(array))
        return True

    def retrieve(
        self,
        tokens: TokenIds,
        segments: Sequence[Segment],
        *,
        prefix: PrefixKV | None = None,
        timeout_s: float | None = None,
        tags: Mapping[str, str] | None = None,
        placeholders: Sequence[PlaceholderSpan] = (),
    ) -> StoredKV:
        """What storage has of a prompt's segments, in memory; the caller closes it.

        segments: of the prompt, sorted and disjoint; a ``Match`` stands for part of a longer stored passage.
        prefix: the exact KV of the first tokens, which goes before that of segments.
        timeout_s: when it returns at the latest (``read_timeout_s`` of the configuration).
        placeholders: of the prompt. A ``Match`` that one lies in is a miss, for a passage is known by its tokens alone.
        A segment that is missing, incomplete, late or not what it should be is not covered: a miss, counted in
        ``lmcache_segment_tokens``, with one warning for a prompt unless nothing was wrong but that it was not there.
        Raises ValueError for segments that overlap or lie outside the prompt, KernelArgumentError for a prompt with
        more positions than the ropes' tables have.
        """
        array = as_tokens(tokens)
        self._check_prompt(len(array), segments, prefix)
        wanted = self._wanted(_packed(array), segments, prefix.tokens if prefix else 0, tags, placeholders)
        limit_s = self._manager.read_timeout_s if timeout_s is None else max(timeout_s, 1e-3)
        ends_at = time.monotonic() + limit_s
        parts: list[_Part] = []
        lost: dict[str, int] = {}
        with ExitStack() as held:
            leases = [held.enter_context(self._acquire(each, limit_s)) for each in wanted]
            for each, lease in zip(wanted, leases, strict=True):
                outcome = self._arrived(each, lease, ends_at)
                if isinstance(outcome, int):
                    parts.append(_Part(each, lease, outcome))
                else:
                    lease.close()
                    lost[outcome] = lost.get(outcome, 0) + each.stop - each.start
            kv = StoredKV(self.format, len(array), parts, prefix, self._chunk_bytes)
            held.pop_all()
        metrics.SEGMENT_TOKENS.labels("reused").inc(sum(part.stop - part.start for part in kv.segments))
        for outcome, count in lost.items():
            metrics.SEGMENT_TOKENS.labels(outcome).inc(count)
        if lost.keys() - {"missing"}:
            logger.warning("segments that could not be read are computed; tokens: %s", lost)
        return kv

    def remove(self, tokens: TokenIds, *, tags: Mapping[str, str] | None = None) -> bool:
        """Forget a segment, in every tier; whether there was anything of it."""
        return self._manager.remove(self.keys(tokens, tags=tags)) > 0

    def _acquire(self, wanted: _Wanted, timeout_s: float) -> Lease:
        layout = self._layout(wanted.tokens)
        sizes = [layout.chunk_bytes(group) for group in layout.groups]
        return self._manager.acquire(wanted.keys, sizes, timeout_s=timeout_s)

    def _arrived(self, wanted: _Wanted, lease: Lease, ends_at: float) -> int | str:
        """Wait for a segment: where it was stored, or what became of it."""
        if not lease.wait_ready(len(wanted.keys), max(0.0, ends_at - time.monotonic())):
            late = time.monotonic() >= ends_at
            return "late" if late else "incomplete" if lease.ready else "missing"
        buffers = lease.share()
        try:
            groups = self._layout(wanted.tokens).groups
            records = {read_record(*each, wanted.tokens) for each in zip(buffers, groups, strict=True)}
            if len(records) > 1:
                raise CorruptChunkError("its chunks are of different runs of the model")
        except CorruptChunkError as error:
            logger.warning("removed segment %s: %s", wanted.keys[0], error)
            metrics.CORRUPT_CHUNKS.labels("memory").inc()
            self._manager.remove(wanted.keys)
            return "corrupt"
        finally:
            for buffer in buffers:
                buffer.release()
        ((stored_at, _),) = records
        return stored_at if self._has_positions(stored_at + len(wanted.tokens) // 4) else "unmovable"

    def _filled(
        self, tokens: bytes, stored_at: int, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[PoolBuffer] | None:
        layout = self._layout(tokens)
        record = Record(stored_at, run_digest(layers[-1]))
        buffers: list[PoolBuffer] = []
        try:
            for group in layout.groups:
                buffer = self._manager.allocate(layout.chunk_bytes(group))
                if buffer is None:
                    break
                buffers.append(buffer)
                write_record(buffer, group, tokens, record, layout.data_at)
                for within, (keys, values) in enumerate(layers[group.first : group.stop]):
                    into = layout.layer(buffer, within)
                    into[0].copy_(keys)
                    into[1].copy_(values)
            else:
                return buffers
        except BaseException:
            _release(buffers)
            raise
        _release(buffers)
        return None

    def _wanted(
        self,
        prompt: bytes,
        segments: Sequence[Segment],
        first: int,
        tags: Mapping[str, str] | None,
        placeholders: Sequence[PlaceholderSpan],
    ) -> list[_Wanted]:
        """What is looked for: segments without what lies in the prefix, which ends at token ``first``."""
        wanted = []
        for segment in segments:
            start, stop, row = max(segment.start, first), segment.stop, max(0, first - segment.start)
            if start >= stop:
                continue
            own = prompt[4 * segment.start : 4 * stop]
            if not isinstance(segment, Match):
                keys = self._keys(own, segment.start, tags, placeholders)
                wanted.append(_Wanted(start, stop, row, own, keys))
                continue
            if segment.passage[4 * segment.offset :][: len(own)] != own or segment.offset < 0:
                raise ValueError(f"tokens {segment.start} to {stop} are not those of the passage that they match")
            if any(span.start < stop and span.stop > segment.start for span in placeholders):
                metrics.SEGMENT_TOKENS.labels("missing").inc(stop - start)
                continue
            keys = self._keys(segment.passage, 0, tags, ())
            wanted.append(_Wanted(start, stop, segment.offset + row, segment.passage, keys))
        return wanted

    def _keys(
        self, tokens: bytes, start: int, tags: Mapping[str, str] | None, placeholders: Sequence[PlaceholderSpan]
    ) -> list[ChunkKey]:
        if not tokens:
            raise ValueError("a segment without tokens")
        if tags and KIND_TAG in tags:
            raise ValueError(f"the tag {KIND_TAG} is taken: segments have it, exact prefixes have not")
        space = namespace(self._fingerprint, {**(tags or {}), KIND_TAG: "segment"})
        parents = [_PARENT.pack(b"lmcache-segment", *group) for group in self._layout(tokens).groups]
        return [ChunkKey(space, chunk_digest(space, parent, tokens, start, placeholders)) for parent in parents]

    def _layout(self, tokens: bytes) -> SegmentLayout:
        return SegmentLayout(self.format, len(tokens) // 4, self._chunk_bytes)

    def _has_positions(self, stop: int) -> bool:
        return self.format.positions is None or stop <= self.format.positions

    def _check_put(self, count: int, stored_at: int, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        format, shape = self.format, (count, self.format.heads, self.format.head_dim)
        if stored_at < 0 or not self._has_positions(stored_at + count):
            raise KernelArgumentError(
                f"{count} tokens stored at {stored_at}: the ropes' tables have {format.positions} positions, from 0"
            )
        if len(layers) != format.layers:
            raise KernelArgumentError(f"{len(layers)} layers, the format has {format.layers}")
        for index, pair in enumerate(layers):
            for name, tensor in zip(("keys", "values"), pair, strict=True):
                if tuple(tensor.shape) != shape or tensor.dtype != format.dtype:
                    raise KernelArgumentError(
                        f"{name} of layer {index} are {tensor.dtype} {tuple(tensor.shape)}; they must be "
                        f"{format.dtype} {shape}"
                    )

    def _check_prompt(self, count: int, segments: Sequence[Segment], prefix: PrefixKV | None) -> None:
        if prefix is not None and not 0 <= prefix.tokens <= count:
            raise ValueError(f"a prefix of {prefix.tokens} tokens, the prompt has {count}")
        if not self._has_positions(count):
            raise KernelArgumentError(f"{count} tokens; the ropes' tables have {self.format.positions} positions")
        explicit_spans([(segment.start, segment.stop) for segment in segments], count)


class StoredKV:
    """The ``ReusedKV`` of one prompt, straight from the pool's buffers. Thread-safe.

    It holds these until ``close``; a lease that is not asked for anything runs out after ``lease_timeout_s``.
    """

    def __init__(
        self,
        format: SegmentFormat,
        tokens: int,
        parts: Sequence[_Part],
        prefix: PrefixKV | None,
        chunk_bytes: int,
    ) -> None:
        self._format, self._tokens, self._parts, self._prefix = format, tokens, parts, prefix
        self._layouts = [SegmentLayout(format, len(part.wanted.tokens) // 4, chunk_bytes) for part in parts]
        self._closed = False
        first = prefix.tokens if prefix else 0
        self.segments: Sequence[Segment] = [Segment(part.wanted.start, part.wanted.stop) for part in parts]
        covered, old = torch.zeros(tokens, dtype=torch.bool), torch.full((tokens,), -1)
        covered[:first] = True
        for wanted, _, stored_at in parts:
            covered[wanted.start : wanted.stop] = True
            at = stored_at + wanted.row
            old[wanted.start : wanted.stop] = torch.arange(at, at + wanted.stop - wanted.start)
        self._gaps = _intervals(~covered)
        self.covered = covered.to(format.device)
        self.exact = torch.arange(tokens, device=format.device) < first
        old, new = old.to(format.device), torch.arange(tokens, device=format.device)
        self._shifts = {
            id(table): RotaryShift(old, new, table, interleaved=format.interleaved, rotary_start=format.rotary_start)
            for table in format.ropes
        }

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each ``[T, H, D]``, fresh: what is not covered is 0.

        Raises LeaseExpiredError when the segments are no longer held, ClosedError after ``close``.
        """
        if self._closed:
            raise ClosedError("this KV of segments is closed")
        if not 0 <= index < self._format.layers:
            raise IndexError(f"layer {index}; there are {self._format.layers}")
        shape = (self._tokens, self._format.heads, self._format.head_dim)
        keys = torch.empty(shape, dtype=self._format.dtype, device=self._format.device)
        values = torch.empty_like(keys)
        for gap in self._gaps:
            keys[gap] = 0
            values[gap] = 0
        for part, layout in zip(self._parts, self._layouts, strict=True):
            self._copy(part, layout, index, keys, values)
        table = self._format.tables[index]
        if table is not None:
            self._shifts[id(table)].apply(keys)
        if self._prefix is not None and (count := self._prefix.tokens):
            exact_keys, exact_values = self._prefix.layer(index)
            keys[:count] = exact_keys[:count]
            values[:count] = exact_values[:count]
        return keys, values

    def _copy(self, part: _Part, layout: SegmentLayout, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        wanted, lease = part.wanted, part.lease
        lease.renew()
        # Handles of our own: the lease may be closed on another thread while its bytes are being copied.
        buffers = lease.share()
        try:
            if len(buffers) < len(layout.groups):
                raise LeaseExpiredError("the segments are no longer held: retrieve them again")
            chunk = layout.layer(buffers[index // layout.each], index % layout.each)
            rows = chunk[:, wanted.row : wanted.row + wanted.stop - wanted.start]
            keys[wanted.start : wanted.stop] = rows[0]
            values[wanted.start : wanted.stop] = rows[1]
        finally:
            _release(buffers)

    def close(self) -> None:
        """Let go of the segments. Idempotent."""
        self._closed = True
        for part in self._parts:
            part.lease.close()

    def __enter__(self) -> StoredKV:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _packed(tokens: Tokens) -> bytes:
    return tokens.astype("<u4").tobytes()


def _release(buffers: Sequence[PoolBuffer]) -> None:
    for buffer in buffers:
        buffer.release()


def _intervals(mask: torch.Tensor) -> list[slice]:
    edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff().nonzero().flatten().tolist()
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
