"""CacheEngine: lookup, store and retrieve the KV of token sequences.

lookup    tokens -> chunk keys (token_database.py) -> a lease on the longest cached prefix, in memory and verified
retrieve  the leased chunks -> the engine's pages (mover.py, or packed.py where a codec is configured)
store     pages -> chunks -> memory, and from there every tier that does not hold them yet
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from lmcache import metrics
from lmcache.config import LMCacheConfig
from lmcache.engine.layout import PagedCache, chunk_tokens
from lmcache.engine.mover import BlockTables, PageMover
from lmcache.engine.packed import PackedMover
from lmcache.engine.token_database import PromptKeys, Span, TokenDatabase
from lmcache.errors import (
    ClosedError,
    ConfigError,
    CorruptChunkError,
    LeaseExpiredError,
    WeightsChangedError,
)
from lmcache.forks import Home
from lmcache.kernels.codecs.base import RAW, build_codec
from lmcache.keys import KVFormat, PlaceholderSpan
from lmcache.storage.eviction.base import Place
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.memory.pool import PAGE, PoolBuffer

logger = logging.getLogger(__name__)

# Chunks that are packed before the first is waited for: bounds the memory that packed chunks take on the device.
PACK_CHUNKS = 32

TokenIds = Sequence[int] | npt.NDArray[np.integer] | bytes


def _largest(size: int | range) -> int:
    return size[-1] if isinstance(size, range) else size


def pack_tokens(tokens: TokenIds) -> bytes:
    """Token ids as little-endian uint32, the form that is hashed. Bytes are taken as already packed."""
    if isinstance(tokens, bytes):
        return tokens
    return np.asarray(tokens, dtype=np.int64).astype("<u4").tobytes()


class Lookup:
    """The longest cached prefix of a prompt, held in memory until ``close`` or until the lease times out."""

    def __init__(self, prompt: PromptKeys, lease: Lease, fingerprint: bytes) -> None:
        self._prompt = prompt
        self.lease = lease
        self.fingerprint = fingerprint
        """Of the format that was looked for."""

    @property
    def tokens(self) -> int:
        """Tokens that are held now; final once ``done``."""
        ready = self.lease.ready
        return self.all_spans[ready - 1].stop if ready else 0

    @property
    def done(self) -> bool:
        return self.lease.done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for reads from lower tiers; False when they still run after ``timeout_s``."""
        return self.lease.wait(timeout_s)

    def settle(self) -> None:
        """Be done with what is held now."""
        self.lease.settle()

    def close(self) -> None:
        """Let go of the chunks. Idempotent."""
        self.lease.close()

    def __enter__(self) -> Lookup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def spans(self) -> list[Span]:
        """The chunks that are held now."""
        ready = self.lease.ready
        return self.all_spans[:ready]

    @property
    def all_spans(self) -> list[Span]:
        """Every chunk that was looked for, held or not; where a tail was found, what is held."""
        if self.lease.end is None:
            return self._prompt.chunks
        count = len(self.lease.keys) - 1
        tail = next(tail for tail in self._prompt.tails(count) if tail.key == self.lease.end)
        return [*self._prompt.chunks[:count], tail]


class CacheEngine:
    """A cache of KV for one engine's pages.

    format: what the pages hold; its ``chunk_tokens`` and planes must describe ``cache`` (see ``CacheEngine.open``).
    holds: whether the weights that the format names still are the model's; asked when copies have ended.
    Threads: ``lookup`` may be called from any thread; the rest from the one that runs the model.
    """

    def __init__(
        self,
        config: LMCacheConfig,
        format: KVFormat,
        cache: PagedCache,
        storage: StorageManager | None = None,
        holds: Callable[[], bool] = lambda: True,
    ) -> None:
        self.config = config
        self._holds = holds
        self.format = format
        self.cache = cache
        self.database = TokenDatabase(format, cache.unit)
        codec = build_codec(config.codec)
        if format.codec != (codec.id if codec else RAW):
            raise ConfigError(f"the format names codec {format.codec}, the configuration {config.codec}")
        self._packed = PackedMover(cache, codec) if codec else None
        if self._packed:
            self._packed.rehearse(format.chunk_tokens)
        chunk_bytes = _largest(self._sizes(0, format.chunk_tokens))
        if chunk_bytes > config.memory.capacity:
            raise ConfigError(
                f"memory.capacity is {config.memory.capacity} bytes, less than one chunk of {format.chunk_tokens} "
                f"tokens ({chunk_bytes} bytes): raise memory.capacity or lower chunk_tokens"
            )
        self.memory_tokens = config.memory.capacity // (-(-chunk_bytes // PAGE) * PAGE) * format.chunk_tokens
        """Tokens whose KV memory has room for, at least (packed chunks may be smaller)."""
        self.storage = storage or StorageManager(config, pin=cache.device.type == "cuda")
        if config.tiers and chunk_bytes > self.storage.write_queue_bytes:
            logger.warning(
                "chunks of %d tokens have up to %d bytes, and only %d bytes may wait to be written (write_queue, "
                "at most half of memory.capacity, which is %d): such chunks are not written to lower tiers; set "
                "memory.capacity to %d or more and write_queue to %d or more, or lower chunk_tokens",
                format.chunk_tokens,
                chunk_bytes,
                self.storage.write_queue_bytes,
                config.memory.capacity,
                4 * chunk_bytes,
                2 * chunk_bytes,
            )
        self._mover = PageMover(cache)
        self._home = Home("this CacheEngine")
        self._closed = threading.Event()

    @classmethod
    def open(cls, config: LMCacheConfig, model: str, cache: PagedCache) -> CacheEngine:
        """An engine for pages of ``model``, for scripts that bring their own pages."""
        format = KVFormat(
            model=config.model_id or model,
            chunk_tokens=chunk_tokens(config.chunk_tokens, cache.unit),
            planes=tuple(plane.format() for plane in cache.planes),
            layout="opaque" if cache.opaque else "token",
            codec=codec.id if (codec := build_codec(config.codec)) else RAW,
        )
        return cls(config, format, cache)

    def rename(self, model: str) -> None:
        """The pages hold another model's KV from now on: keys are of its format. What was looked up before cannot be
        retrieved any more."""
        self.format = msgspec.structs.replace(self.format, model=model)
        self.database = TokenDatabase(self.format, self.cache.unit)

    def lookup(
        self,
        tokens: TokenIds,
        *,
        tags: Mapping[str, str] | None = None,
        placeholders: Sequence[PlaceholderSpan] = (),
        on_done: Callable[[Lookup], None] | None = None,
    ) -> Lookup:
        """A lease on the longest cached prefix of ``tokens``, down to the engine's block.

        Hashes the prompt and looks into memory. Lower tiers are asked, and read, on their own threads after this has
        returned; ``on_done`` is called once, from whatever thread ends the last read (from this one when nothing is to
        be read).
        """
        self._check_open()
        database = self.database
        prompt = database.prompt(pack_tokens(tokens), tags, placeholders)

        def finished(lease: Lease) -> None:
            if on_done is not None:
                on_done(Lookup(prompt, lease, database.fingerprint))

        lease = self.storage.acquire(
            [span.key for span in prompt.chunks],
            [self._sizes(span.start, span.stop) for span in prompt.chunks],
            on_done=finished,
            ends=lambda count: [(tail.key, self._sizes(tail.start, tail.stop)) for tail in prompt.tails(count)],
        )
        return Lookup(prompt, lease, database.fingerprint)

    def retrieve(
        self, lookup: Lookup, block_ids: Sequence[Sequence[int]], *, start: int = 0, stop: int | None = None
    ) -> int:
        """Write found KV of token positions ``[start, stop)`` into pages; returns how many tokens were written.

        block_ids: the request's block table of every group, from its first token; negative: no block there.
        start: a multiple of the block; the pages before it are left alone.
        stop: where to end (the last block is written whole), by default where the found prefix does.
        Raises LeaseExpiredError when what was found is no longer held up to ``stop``, or was looked up under another
        name; nothing is written then. Raises WeightsChangedError when the weights turn out to be others: what the pages
        hold then is not to be used.
        Raises CorruptChunkError when a chunk is not what it should be: it is removed, and what the pages hold then is
        not to be used.
        """
        self._check_open()
        if lookup.fingerprint != self.database.fingerprint:
            raise LeaseExpiredError("the model was renamed since it was looked up: look up again")
        # Handles of our own: the lease may run out on another thread while its bytes are being copied.
        buffers = lookup.lease.share()
        try:
            return self._scatter(lookup, buffers, block_ids, start, stop)
        finally:
            self._give_back(buffers)

    def _scatter(
        self,
        lookup: Lookup,
        buffers: Sequence[PoolBuffer],
        block_ids: Sequence[Sequence[int]],
        start: int,
        stop: int | None,
    ) -> int:
        spans = lookup.all_spans[: len(buffers)]
        held = spans[-1].stop if spans else 0
        stop = held if stop is None else -(-stop // self.cache.unit) * self.cache.unit
        if held < stop:
            raise LeaseExpiredError(f"{stop} tokens were asked for, {held} are held: look up again")
        tables = self._mover.tables(block_ids)
        mover = self._packed or self._mover
        whole: list[tuple[Span, torch.Tensor]] = []
        for span, buffer in zip(spans, buffers, strict=False):
            if span.stop > start and span.start < stop:
                try:
                    found = mover.scatter(tables, span.start, span.stop, buffer, write=(start, stop))
                except CorruptChunkError:
                    self._remove(span)
                    raise
                whole += [(span, each) for each in found or ()]
        self._mover.synchronize()
        self._check_weights()
        intact = torch.stack([each for _, each in whole]).tolist() if whole else []
        if not all(intact):
            for span in {span for (span, _), good in zip(whole, intact, strict=True) if not good}:
                self._remove(span)
            raise CorruptChunkError("a chunk was found damaged while it was unpacked")
        metrics.RETRIEVED_TOKENS.inc(max(0, stop - start))
        return max(0, stop - start)

    def tables(self, block_ids: Sequence[Sequence[int]]) -> BlockTables:
        """Block ids of every group as int64 tensors on the device."""
        return self._mover.tables(block_ids)

    def store(
        self,
        tokens: TokenIds,
        block_ids: Sequence[Sequence[int]],
        *,
        start: int = 0,
        tail: bool = True,
        tags: Mapping[str, str] | None = None,
        placeholders: Sequence[PlaceholderSpan] = (),
    ) -> int:
        """Store the chunks of ``tokens`` that end after ``start`` and are not in memory; returns tokens copied.

        start: what a lookup has found need not be copied again: give where that ends. Lower tiers are not asked here,
        for the model would wait for them; a copy is cheap, and a tier does not write what it holds.
        tail: also store the whole blocks behind the last full chunk.
        What finds no room in memory is not stored: a future miss, counted. Raises WeightsChangedError, and stores
        nothing, when the weights turn out to be others than those that the format names.
        """
        self._check_open()
        prompt = self.database.prompt(pack_tokens(tokens), tags, placeholders)
        spans = prompt.chunks + (prompt.tails(len(prompt.chunks))[:1] if tail else [])
        parents = dict(zip([span.key for span in spans], [None, *(span.key for span in spans)], strict=False))
        spans = [span for span in spans if span.stop > start]
        spans = spans[self.storage.contains([span.key for span in spans], below=False) :]
        if not spans:
            return 0
        tables = self._mover.tables(block_ids)
        spans = [span for span in spans if self._has_pages(block_ids, span)]
        stored: list[tuple[Span, PoolBuffer]] = []
        try:
            if self._packed:
                self._store_packed(self._packed, tables, spans, stored)
            else:
                self._store_raw(tables, spans, stored)
            self._mover.synchronize()
            self._check_weights()
        except BaseException:
            self._give_back([taken for _, taken in stored])
            raise
        for span, taken in stored:
            self.storage.put(span.key, taken, Place(parents[span.key], span.start, span.stop))
        count = sum(span.stop - span.start for span, _ in stored)
        metrics.STORED_TOKENS.inc(count)
        return count

    def _store_raw(self, tables: BlockTables, spans: Sequence[Span], stored: list[tuple[Span, PoolBuffer]]) -> None:
        for span in spans:
            buffer = self._allocate(span, self.cache.chunk_bytes(span.stop - span.start))
            if buffer is None:
                return
            stored.append((span, buffer))
            self._mover.gather(tables, span.start, span.stop, buffer)

    def _store_packed(
        self, mover: PackedMover, tables: BlockTables, spans: Sequence[Span], stored: list[tuple[Span, PoolBuffer]]
    ) -> None:
        for few in (spans[i : i + PACK_CHUNKS] for i in range(0, len(spans), PACK_CHUNKS)):
            packed = mover.finish([mover.pack(tables, span.start, span.stop) for span in few])
            for span, chunk in zip(few, packed, strict=True):
                if chunk is None:
                    logger.warning("KV of %d tokens cannot be packed by %s", span.stop - span.start, mover.codec.id)
                    metrics.STORE_REFUSED_TOKENS.inc(span.stop - span.start)
                    return
                buffer = self._allocate(span, chunk.nbytes)
                if buffer is None:
                    return
                stored.append((span, buffer))
                mover.write(chunk, buffer)

    def _remove(self, span: Span) -> None:
        """Remove a damaged chunk from every tier; otherwise each later lookup would find it and fail again."""
        metrics.CORRUPT_CHUNKS.labels("memory").inc()
        self.storage.remove([span.key], wait=False)

    def _give_back(self, buffers: Sequence[PoolBuffer]) -> None:
        """Release buffers that copies may still be under way to or from, when these have ended."""
        try:
            self._mover.synchronize()
        finally:
            for buffer in buffers:
                buffer.release()

    def _allocate(self, span: Span, nbytes: int) -> PoolBuffer | None:
        buffer = self.storage.allocate(nbytes)
        if buffer is None:
            metrics.STORE_REFUSED_TOKENS.inc(span.stop - span.start)
        return buffer

    def _sizes(self, start: int, stop: int) -> int | range:
        """Bytes of the chunk of these token positions, or the range that they are in."""
        return self._packed.sizes(start, stop) if self._packed else self.cache.chunk_bytes(stop - start)

    def reset(self) -> int:
        """Forget what this process holds in memory; where ``reset`` says tiers, this format's chunks in every tier.

        Returns at once; what is forgotten is not read any more.
        """
        self._check_open()
        if self.config.reset == "tiers":
            self.clear(wait=False)
        return self.storage.clear(tier="memory")

    def clear(self, tenant: str | None = None, *, wait: bool = True) -> int:
        """Forget every chunk of this format, or those of one tenant, in every tier; returns how many.

        wait: for lower tiers; without, it returns at once, and nothing of it is read any more either.
        """
        self._check_open()
        return self.storage.clear(self.database.fingerprint, tenant=tenant, wait=wait)

    def close(self) -> None:
        """Write out what is queued (within ``close_timeout_s``) and let go of everything. Idempotent."""
        if not self._closed.is_set() and not self._home.left:
            self._closed.set()
            self.storage.close()

    def __enter__(self) -> CacheEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_pages(self, block_ids: Sequence[Sequence[int]], span: Span) -> bool:
        # A sliding window gives pages back early: a chunk that has lost some of them cannot be stored.
        for plane in self.cache.planes:
            first, last = span.start // plane.block_tokens, span.stop // plane.block_tokens
            ids = block_ids[plane.group][first:last]
            if len(ids) < last - first or min(ids) < 0:
                return False
        return True

    def _check_weights(self) -> None:
        if not self._holds():
            raise WeightsChangedError("the weights are not those any more that this engine's format names")

    def _check_open(self) -> None:
        self._home.check()
        if self._closed.is_set():
            raise ClosedError("this CacheEngine is closed")
