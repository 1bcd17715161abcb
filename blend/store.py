"""Stores the KV of segments, and retrieves it at the positions that a prompt has them at.

Kept as the engine made it: keys turned at the positions stored_at, stored_at + 1, ... that the tokens had then, which
is kept with them. Whoever asks gets keys turned by the difference on (lmcache.kernels.rotary.ops), values as they are.

The key is of the tokens alone, not of where they stood or behind what, in a namespace of its own: see ``SegmentStore``.
What is read is used only if it is what was asked for: the tokens in the record are compared, and all chunks must come
from one and the same run of the model.
Only raw KV is kept: codecs pack an engine's pages, and their chunks mean nothing without them.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from lmcache import metrics
from lmcache.blend.chunks import Record, SegmentFormat, SegmentLayout, read_record, run_digest, write_record
from lmcache.blend.reuse import Segment
from lmcache.blend.segments import Match, Tokens, as_tokens, explicit_spans
from lmcache.blend.stored import Part, PrefixKV, StoredKV, Wanted, release
from lmcache.engine.engine import TokenIds
from lmcache.errors import ConfigError, CorruptChunkError, KernelArgumentError
from lmcache.kernels.codecs.base import RAW
from lmcache.keys import ChunkKey, chunk_digest, namespace
from lmcache.storage.eviction.base import Place
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.memory.pool import PoolBuffer

logger = logging.getLogger(__name__)

KIND_TAG = "lmcache.kind"
_PARENT = struct.Struct("<16sQQ")  # stands where a chunk's digest has its parent: 32 bytes


class SegmentStore:
    """Segments' KV in and out of a StorageManager. Thread-safe.

    chunk_bytes: about how long a chunk is; part of the keys, as it says what a chunk holds.
    codec: of the configuration. Only raw is supported; ConfigError for any other.
    on_read: called for each retrieval with the bytes that came from below memory and the seconds from asking for them
        until the last was there, whether anybody waited for it or not; by any thread, so it must not block.

    Keys: ``namespace(fingerprint of format.kv_format(), tags + lmcache.kind=segment)`` and the digest of the tokens and
    the layers; neither the fingerprint, nor the tags, nor what is digested is ever that of an exact prefix chunk.
    """

    def __init__(
        self,
        manager: StorageManager,
        format: SegmentFormat,
        *,
        chunk_bytes: int = 1 << 20,
        codec: str | Mapping[str, Any] = RAW,
        on_read: Callable[[int, float], None] | None = None,
    ) -> None:
        if codec not in (RAW, {"type": RAW}):
            raise ConfigError(f"codec is {codec!r}: segments are kept raw; set codec to raw where segments are reused")
        if chunk_bytes < 1:
            raise ConfigError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
        self.format = format
        self._manager = manager
        self._chunk_bytes = chunk_bytes
        self._on_read = on_read
        self._fingerprint = format.kv_format().fingerprint()

    def keys(self, tokens: TokenIds, *, tags: Mapping[str, str] | None = None) -> list[ChunkKey]:
        """The keys of a segment's chunks."""
        return self._keys(_packed(as_tokens(tokens)), tags)

    def holds(self, tokens: TokenIds, *, below: bool = True, tags: Mapping[str, str] | None = None) -> bool:
        """Whether tiers say that they have all of a segment. below: ask those below memory too, and wait for them."""
        keys = self.keys(tokens, tags=tags)
        return self._manager.contains(keys, below=below) == len(keys)

    def put(
        self,
        tokens: TokenIds,
        stored_at: int,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        tags: Mapping[str, str] | None = None,
    ) -> bool:
        """Store a segment's KV, unless memory has it; False when there is no room for it (a future miss, counted).

        tokens: of the segment alone. stored_at: the position that the first of them had when its keys were turned.
        layers: keys (turned) and values of every layer, each ``[T, H, D]``.
        Raises KernelArgumentError for tensors of another shape or dtype, and for positions that the ropes' tables lack.
        """
        array = as_tokens(tokens)
        self._check_put(len(array), stored_at, layers)
        packed = _packed(array)
        keys = self._keys(packed, tags)
        present = self._manager.contains(keys, below=False)
        if present == len(keys):
            return True
        if present:
            # Leftovers, perhaps of another run of the model: new chunks beside them would be taken for damaged ones.
            self._manager.remove(keys, wait=False)
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
        pipelined: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> StoredKV:
        """What storage has of a prompt's segments, in memory; the caller closes it.

        segments: of the prompt, sorted and disjoint; a ``Match`` stands for part of a longer stored passage.
        prefix: the exact KV of the first tokens, which goes before that of segments.
        timeout_s: when it returns at the latest (``read_timeout_s`` of the configuration).
        pipelined: return when the first layers are there; ``layer`` waits for the others, which are read in order,
            until the same time. It raises when one does not come: what was computed with these is void
            then, and the caller retrieves again, without ``pipelined``, what can be had.
        A segment that is missing, incomplete, late or not what it should be is not covered: a miss, counted in
        ``lmcache_segment_tokens``, with one warning for a prompt unless nothing was wrong but that it was not there.
        Raises ValueError for segments that overlap or lie outside the prompt, KernelArgumentError for a prompt with
        more positions than the ropes' tables have.
        """
        array = as_tokens(tokens)
        self._check_prompt(len(array), segments, prefix)
        wanted = self._wanted(_packed(array), segments, prefix.tokens if prefix else 0, tags)
        limit_s = self._manager.read_timeout_s if timeout_s is None else max(timeout_s, 1e-3)
        ends_at = time.monotonic() + limit_s
        with ExitStack() as held:
            parts = self._first_layers(wanted, held, ends_at) if pipelined else None
            if parts is None:
                parts = self._all_layers(wanted, held, ends_at)
            kv = StoredKV(self.format, len(array), parts, prefix)
            held.pop_all()
        metrics.SEGMENT_TOKENS.labels("reused").inc(sum(part.stop - part.start for part in kv.segments))
        return kv

    def remove(self, tokens: TokenIds, *, tags: Mapping[str, str] | None = None) -> bool:
        """Forget a segment, in every tier; whether there was anything of it."""
        return self._manager.remove(self.keys(tokens, tags=tags)) > 0

    def _all_layers(self, wanted: Sequence[Wanted], held: ExitStack, ends_at: float) -> list[Part]:
        """Each segment under a lease of its own, so that one that is missing costs no other; what all came of."""
        parts: list[Part] = []
        lost: dict[str, int] = {}
        with _Reads(self._manager, self._on_read, ends_at) as reads:
            leases = [held.enter_context(reads.acquire(each.keys, each.layout.sizes)) for each in wanted]
        for each, lease in zip(wanted, leases, strict=True):
            outcome = self._arrived(each, lease, ends_at)
            if isinstance(outcome, Record):
                parts.append(Part(each, outcome, lease, range(len(each.keys))))
            else:
                lease.close()
                lost[outcome] = lost.get(outcome, 0) + each.stop - each.start
        for outcome, count in lost.items():
            metrics.SEGMENT_TOKENS.labels(outcome).inc(count)
        if lost.keys() - {"missing"}:
            logger.warning("segments that could not be read are computed; tokens: %s", lost)
        return parts

    def _first_layers(self, wanted: Sequence[Wanted], held: ExitStack, ends_at: float) -> list[Part] | None:
        """All segments under one lease, layer by layer, when the first is there; None where something is amiss."""
        there: list[Wanted] = []
        for each in wanted:
            if time.monotonic() >= ends_at:
                return None
            if self._manager.contains(each.keys) == len(each.keys):
                there.append(each)
        if not there:
            return None
        chunks = [(group.first, n, i) for n, each in enumerate(there) for i, group in enumerate(each.layout.groups)]
        places = {chunk[1:]: place for place, chunk in enumerate(sorted(chunks))}
        keys, sizes = zip(*((there[n].keys[i], there[n].layout.sizes[i]) for n, i in places), strict=True)
        with _Reads(self._manager, self._on_read, ends_at) as reads:
            lease = held.enter_context(reads.acquire(keys, sizes))
        parts = []
        if lease.wait_ready(len(there), max(0.0, ends_at - time.monotonic())):
            buffers = lease.share()
            for n, (each, buffer) in enumerate(zip(there, buffers, strict=False)):
                record = self._checked(each, [buffer])
                if isinstance(record, Record):
                    parts.append(Part(each, record, lease, [places[n, i] for i in range(len(each.keys))]))
            release(buffers)
        if len(parts) < len(there):
            lease.close()
            return None
        missing = sum(each.stop - each.start for each in wanted) - sum(each.stop - each.start for each in there)
        metrics.SEGMENT_TOKENS.labels("missing").inc(missing)
        return parts

    def _arrived(self, wanted: Wanted, lease: Lease, ends_at: float) -> Record | str:
        """Wait for a segment: what it says of itself, or what became of it."""
        if not lease.wait_ready(len(wanted.keys), max(0.0, ends_at - time.monotonic())):
            late = time.monotonic() >= ends_at
            return "late" if late else "incomplete" if lease.ready else "missing"
        buffers = lease.share()
        try:
            return self._checked(wanted, buffers)
        finally:
            release(buffers)

    def _checked(self, wanted: Wanted, chunks: Sequence[PoolBuffer]) -> Record | str:
        """What the first chunks of a segment all say of themselves, or what is wrong; damaged ones are removed."""
        try:
            pairs = zip(chunks, wanted.layout.groups, strict=False)
            records = {read_record(chunk, group, wanted.tokens) for chunk, group in pairs}
            if len(records) != 1:
                raise CorruptChunkError("its chunks are of different runs of the model")
        except CorruptChunkError as error:
            logger.warning("removed segment %s: %s", wanted.keys[0], error)
            metrics.CORRUPT_CHUNKS.labels("memory").inc()
            self._manager.remove(wanted.keys, wait=False)
            return "corrupt"
        (record,) = records
        return record if self._has_positions(record.stored_at + wanted.layout.tokens) else "unmovable"

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
            release(buffers)
            raise
        release(buffers)
        return None

    def _wanted(
        self, prompt: bytes, segments: Sequence[Segment], first: int, tags: Mapping[str, str] | None
    ) -> list[Wanted]:
        """What is looked for: segments without what lies in the prefix, which ends at token ``first``."""
        wanted = []
        for segment in segments:
            start, stop, row = max(segment.start, first), segment.stop, max(0, first - segment.start)
            if start >= stop:
                continue
            own = prompt[4 * segment.start : 4 * stop]
            if not isinstance(segment, Match):
                keys = self._keys(own, tags)
                wanted.append(Wanted(start, stop, row, own, keys, self._layout(own)))
                continue
            if segment.passage[4 * segment.offset :][: len(own)] != own or segment.offset < 0:
                raise ValueError(f"tokens {segment.start} to {stop} are not those of the passage that they match")
            keys = self._keys(segment.passage, tags)
            row += segment.offset
            wanted.append(Wanted(start, stop, row, segment.passage, keys, self._layout(segment.passage)))
        return wanted

    def _keys(self, tokens: bytes, tags: Mapping[str, str] | None) -> list[ChunkKey]:
        if not tokens:
            raise ValueError("a segment without tokens")
        if tags and KIND_TAG in tags:
            raise ValueError(f"the tag {KIND_TAG} is taken: segments have it, exact prefixes have not")
        space = namespace(self._fingerprint, {**(tags or {}), KIND_TAG: "segment"})
        parents = [_PARENT.pack(b"lmcache-segment", *group) for group in self._layout(tokens).groups]
        return [ChunkKey(space, chunk_digest(space, parent, tokens, 0, ())) for parent in parents]

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


class _Reads:
    """The leases of one retrieval. When the last is done, reports the bytes read from below memory and the seconds."""

    def __init__(self, manager: StorageManager, report: Callable[[int, float], None] | None, ends_at: float) -> None:
        self._manager, self._report, self._ends_at = manager, report, ends_at
        self._lock = threading.Lock()
        self._open = 1  # leases that are not done, and 1 until all have been asked for
        self._bytes = 0

    def acquire(self, keys: Sequence[ChunkKey], sizes: Sequence[int]) -> Lease:
        with self._lock:
            self._open += 1
        left_s = max(1e-3, self._ends_at - time.monotonic())
        lease = self._manager.acquire(keys, sizes, lambda done: self._close(sum(sizes[: done.ready])), left_s)
        # In memory already; a tier that has brought something by now is as good as memory.
        held = sum(sizes[: lease.ready])
        with self._lock:
            self._bytes -= held
        return lease

    def __enter__(self) -> _Reads:
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._close(0)

    def _close(self, nbytes: int) -> None:
        with self._lock:
            self._open -= 1
            self._bytes += nbytes
            ended = not self._open
        if ended and self._bytes > 0 and self._report is not None:
            self._report(self._bytes, time.monotonic() - self._began)


def _packed(tokens: Tokens) -> bytes:
    return tokens.astype("<u4").tobytes()
