"""CacheBlend over vLLM's pages: finds a prompt's passages, fuses them into its pages, learns new ones.

    lookup   prompt ── passages in memory, leased ──> tokens that need not be computed by vLLM, and how many are exact
    load     exact chunks ─> pages ─┐
             passages ──────────────┴─ fusion ─> pages; vLLM goes on behind the last passage
    step     what vLLM computed in full ── passages ──> storage

The steps themselves are those of lmcache.blend.pipeline. Blended KV stays in the pages of its own request: the
scheduler half sees to it that it is not stored, not learned from and not shared by vLLM's own prefix cache.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lmcache.blend.blender import Blended, Blender
from lmcache.blend.chunks import SegmentFormat
from lmcache.blend.forward import KV
from lmcache.blend.models.base import BlendModel
from lmcache.blend.pipeline import BlendPipeline, FoundPassages
from lmcache.blend.reuse import Segment
from lmcache.blend.segments import Match, Tokens, as_tokens
from lmcache.blend.store import SegmentStore
from lmcache.blend.stored import StoredKV
from lmcache.config import BlendConfig
from lmcache.connector.identity.cpu_isa import write_cpu_tokens
from lmcache.connector.passages import Passages
from lmcache.engine.engine import CacheEngine
from lmcache.engine.layout import Plane
from lmcache.engine.mover import BlockTables
from lmcache.engine.token_pages import TokenPages
from lmcache.errors import BlendError
from lmcache.kernels import PagedLayers, scatter_tokens

_AGAIN_S = 0.05  # to get passages that memory says it has: the step that computes waits for them


class Blending:
    """Fuses and learns for one worker. ``find`` may be called from any thread, the rest from that of the model.

    layers: vLLM's name of each layer's KV, in the model's order. positions: the longest prompt.
    Raises BlendError where the engine's pages cannot be read token by token, ConfigError for a selector or codec that
    does not fit.
    """

    def __init__(
        self, config: BlendConfig, engine: CacheEngine, model: BlendModel, layers: Sequence[str], positions: int
    ) -> None:
        self.config = config
        self.blender = Blender(model, config.selector)
        self._engine = engine
        self._pages = TokenPages(engine.cache)
        self._layers = [self._plane(name) for name in layers]
        tables = [model.table(index, positions) for index in range(model.num_layers)]
        format = SegmentFormat(
            model=engine.format.model,
            dtype=model.kv.dtype,
            heads=model.kv.heads,
            head_dim=model.kv.size,
            tables=tuple(tables),
            device=model.kv.device,
            extras=engine.format.extras,
        )
        self.store = SegmentStore(engine.storage, format, codec=engine.config.codec)
        self._pipeline = BlendPipeline(config.min_tokens)

    def rename(self, model: str) -> None:
        """The model computes with other weights from now on: nothing that was learned before is found again."""
        format = replace(self.store.format, model=model)
        self.store = SegmentStore(self._engine.storage, format, codec=self._engine.config.codec)
        self._pipeline.forget()

    def find(
        self, tokens: bytes, passages: Passages, exact: int, tags: Mapping[str, str], timeout_s: float
    ) -> FoundPassages | None:
        """The passages of a prompt behind its first ``exact`` tokens, in memory; None where it is not worth it."""
        array = as_tokens(tokens)
        index = self._pipeline.index(tags)
        segments = index.find(array) if passages.by_content else passages.segments(array)
        # A match is of a known passage, any part of it; what a request names is one as a whole.
        wanted = [each for each in segments if each.stop > exact and each.stop - each.start >= self.config.min_tokens]
        if not wanted:
            return None
        found = self._pipeline.find(self.store, array, wanted, timeout_s=timeout_s, tags=tags)
        for each in found.missing:
            index.discard(each.passage)  # to be learned again
        reused = sum(each.stop - max(each.start, exact) for each in found.kv.segments)
        # Where most would be computed anyway, vLLM does it as fast, and exactly.
        if reused < max(self.config.min_tokens, (found.reach - exact) / 2):
            found.close()
            return None
        return found

    def fill(self, found: FoundPassages, tables: BlockTables, exact: int, stop: int) -> list[int]:
        """Fuse ``[exact, stop)`` of the prompt into pages; ``exact`` (whole blocks) tokens are in them already.

        Returns how many tokens each layer computed. Passages that are lost on the way are computed.
        """
        prefix = self._prefix(tables, exact)
        ids = torch.as_tensor(found.tokens.astype("int64"), device=self._engine.cache.device)

        def write(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            self._write(tables, layer, keys, values, exact)

        def blend(kv: StoredKV) -> Blended:
            return self.blender.blend(ids, kv.behind(prefix), stop=stop, done=write)

        return self._pipeline.fuse(found, blend, functools.partial(self._again, found)).report.computed

    def _again(self, found: FoundPassages, segments: Sequence[Segment]) -> StoredKV:
        """What memory has of passages. Lower tiers are not asked: this runs on the thread that computes the step."""
        own = [s.passage if isinstance(s, Match) else found.tokens[s.start : s.stop] for s in segments]
        there = [
            segment
            for segment, tokens in zip(segments, own, strict=True)
            if self.store.holds(tokens, below=False, tags=found.tags)
        ]
        return self.store.retrieve(found.tokens, there, timeout_s=_AGAIN_S, tags=found.tags)

    def learn(
        self, tokens: bytes, passages: Passages, tables: BlockTables, start: int, tags: Mapping[str, str]
    ) -> None:
        """Keep the passages of a prompt that end behind ``start``; the pages hold its tokens as a prefill made them."""
        array = as_tokens(tokens)
        segments = self._pieces(array, tags) if passages.by_content else passages.segments(array)
        for segment in segments:
            own = array[segment.start : segment.stop]
            if segment.stop > start and len(own) >= self.config.min_tokens:
                read = functools.partial(self._read, tables, segment)
                self._pipeline.keep(self.store, own, segment.start, read, below=False, tags=tags)

    def _plane(self, name: str) -> Plane:
        """That layer alone, as a plane."""
        for plane in self._engine.cache.planes:
            if name in plane.names:
                if not self._pages.can_read(plane):
                    raise BlendError(f"layer {name}: the order of tokens in this engine's pages is not known")
                layer = plane.pages.layers[plane.names.index(name)]
                return replace(plane, names=(name,), pages=PagedLayers([layer]))
        raise BlendError(f"layer {name} has no KV of its own in this engine")

    def _pieces(self, tokens: Tokens, tags: Mapping[str, str]) -> list[Segment]:
        """What is not known yet, in pieces."""
        known = self._pipeline.index(tags).find(tokens)
        edges = [0, *(edge for match in known for edge in (match.start, match.stop)), len(tokens)]
        size = self.config.piece_tokens
        return [
            Segment(at, min(at + size, stop))
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
            for at in range(start, stop, size)
        ]

    def _prefix(self, tables: BlockTables, tokens: int) -> _PagedPrefix | None:
        """What the pages hold of the first tokens; None where a window has given up what layers still look at."""
        for plane in self._layers:
            first = max(0, tokens - plane.window) if plane.window else 0
            ids = tables[plane.group][first // plane.block_tokens : tokens // plane.block_tokens]
            if bool((ids < 0).any()):
                return None  # computed once more
        return _PagedPrefix(self._pages, self._layers, tables, tokens) if tokens else None

    def _read(self, tables: BlockTables, segment: Segment) -> list[KV] | None:
        """Keys and values of every layer, or None where pages are gone."""
        layers = []
        for plane in self._layers:
            first, last = segment.start // plane.block_tokens, -(-segment.stop // plane.block_tokens)
            ids = tables[plane.group][first:last]
            if len(ids) < last - first or bool((ids < 0).any()):
                return None
            rows = self._pages.rows(plane, ids)[0, segment.start - first * plane.block_tokens :]
            layers.append(_sides(plane, rows[: segment.stop - segment.start]))
        return layers

    def _write(self, tables: BlockTables, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Rows from ``start`` on of a layer to pages; what else the last page holds, vLLM has yet to compute."""
        plane, stop = self._layers[layer], len(keys)
        ids = tables[plane.group][start // plane.block_tokens : -(-stop // plane.block_tokens)]
        slots = plane.slots(ids)[: stop - start]
        if self._engine.cache.cpu_isa is not None:
            pages, tokens = plane.pages.layers[0], plane.kernel_tokens
            seen = pages.view(-1, pages.shape[1], tokens, pages.shape[3])
            write_cpu_tokens(seen, keys[start:], values[start:], slots, self._engine.cache.cpu_isa)
        else:
            scatter_tokens(plane.pages, slots, torch.cat([keys[start:], values[start:]], 2)[None])


class _PagedPrefix:
    """PrefixKV over an engine's pages."""

    def __init__(self, pages: TokenPages, layers: Sequence[Plane], tables: BlockTables, tokens: int) -> None:
        self._pages, self._layers, self._tables = pages, layers, tables
        self.tokens = tokens

    def layer(self, index: int) -> KV:
        plane = self._layers[index]
        ids = self._tables[plane.group][: self.tokens // plane.block_tokens]
        return _sides(plane, self._pages.rows(plane, ids)[0])


def _sides(plane: Plane, rows: torch.Tensor) -> KV:
    """Keys and values in `[T, H, C]`."""
    key, value = ((side.start, side.start + side.width) for side in plane.sides)
    return rows[..., slice(*key)], rows[..., slice(*value)]
