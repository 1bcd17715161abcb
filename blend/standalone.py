"""Blending without an engine's pages: a model of Hugging Face, its passages in storage, and the fusion, put together.

    learn(passages)   prefill each behind the prefix ──> rows of the passage ──> storage
    blend(prompt)     find segments ──> retrieve, move ──> recompute what matters ──> logits, KV

Passages are prefilled behind the prefix that prompts begin with (a system prompt, or BOS): alone, their first tokens
would take the place of what attention sinks into. The prefix itself is computed once and used exactly.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lmcache.blend.blender import Blended, Blender
from lmcache.blend.chunks import SegmentFormat
from lmcache.blend.controller import LoadingController
from lmcache.blend.forward import KV
from lmcache.blend.models.base import BlendModel
from lmcache.blend.pipeline import BlendPipeline
from lmcache.blend.reuse import GivenKV, Segment
from lmcache.blend.segments import ContentIndex, as_tokens
from lmcache.blend.selectors import TokenSelector
from lmcache.blend.store import SegmentStore
from lmcache.blend.stored import StoredKV
from lmcache.engine.engine import TokenIds
from lmcache.errors import ConfigError
from lmcache.kernels.rotary.tables import RotaryTable
from lmcache.storage.manager import StorageManager

_BESIDE_LAYERS = ("load", "select", "dry run", "logits")  # stages of a blend that are not the layers' own work


class _Prefix:
    """PrefixKV over tensors."""

    def __init__(self, layers: Sequence[KV]) -> None:
        self._layers = layers

    @property
    def tokens(self) -> int:
        return len(self._layers[0][0]) if self._layers else 0

    def layer(self, index: int) -> KV:
        return self._layers[index]


class BlendEngine:
    """Blends prompts of one model out of passages that were learned.

        engine = BlendEngine(model, StorageManager(load_config()), model_id="SmolLM2-135M", prefix=bos)
        engine.learn(passages)
        blended = engine.blend(prompt)                  # passages are found by their content
        model.generate(prompt[None], past_key_values=engine.blender.cache(blended))

    model_id: the identity of the weights, part of every key. prefix: tokens that prompts begin with.
    selector, options: as of Blender. min_tokens: the shortest run of a known passage that is worth reusing.
    chunk_bytes: as of SegmentStore; the smaller, the fewer layers come at a time.
    controller: sets each prompt's ratio by what loading leaves time for; None: the selector's own ratio.
    Thread-safe. The manager is the caller's, who closes it after this. Raises ConfigError for options that do not fit.
    """

    def __init__(
        self,
        model: torch.nn.Module | BlendModel,
        manager: StorageManager,
        *,
        model_id: str,
        prefix: TokenIds = (),
        selector: str | Mapping[str, Any] | TokenSelector[Any] = "cacheblend",
        min_tokens: int = 32,
        chunk_bytes: int = 1 << 20,
        controller: LoadingController | None = None,
        **options: Any,
    ) -> None:
        if not model_id:
            raise ConfigError("model_id is empty; it must name the weights, or KV of another model would be reused")
        self.blender = Blender(model, selector, **options)
        self._pipeline = BlendPipeline(min_tokens)
        self._model, self._manager, self._model_id = self.blender.model, manager, model_id
        self._all = Blender(self._model, "all")
        self._chunk_bytes = chunk_bytes
        self._controller = controller
        if controller is not None:
            self.blender.at_ratio(controller.min_ratio)
            if self._model.kv.device.type != "cpu":
                raise ConfigError(
                    f"the model is on {self._model.kv.device}; a controller goes by seconds of the host: leave it out"
                )
        self._stores: dict[tuple[bytes, ...], SegmentStore] = {}
        self._prefix_ids = [int(token) for token in as_tokens(prefix)]
        self._prefixes: dict[SegmentStore, _Prefix] = {}

    def learn(self, passages: Iterable[TokenIds]) -> int:
        """Prefill those passages that storage does not hold and keep their KV; how many are held in the end."""
        held = 0
        for passage in passages:
            tokens = [int(token) for token in as_tokens(passage)]
            whole = [*self._prefix_ids, *tokens]
            store = self.store_for(len(whole))
            prefill = functools.partial(self._prefilled, whole, store)
            held += self._pipeline.keep(store, as_tokens(tokens), len(self._prefix_ids), prefill, below=True)
        return held

    @property
    def index(self) -> ContentIndex:
        """The passages that are known by content."""
        return self._pipeline.index()

    def blend(
        self,
        tokens: TokenIds,
        segments: Sequence[Segment] | None = None,
        *,
        always: Sequence[Segment] = (),
        all_logits: bool = False,
        timeout_s: float | None = None,
    ) -> Blended:
        """The prompt's KV and logits, as Blender.blend has them.

        segments: where passages are in the prompt, each as it was learned; None: found by content, at any alignment.
        Layers are loaded while those before them compute, unless the selector needs all of them first.
        What storage does not give within timeout_s (read_timeout_s of its configuration) is computed. When a segment
        gets lost while layers are computed, the blend is begun again with what there is by then, and at last without
        any: an answer is never made of half of one.
        Raises what Blender.blend raises.
        """
        array = as_tokens(tokens)
        ids = torch.as_tensor(array.astype("int64"), device=self._model.kv.device)
        store = self.store_for(len(ids))
        prefix = self._prefix_of(store) if self._begins_with_prefix(array.tolist()) else None
        ends_at = time.monotonic() + (self._manager.read_timeout_s if timeout_s is None else timeout_s)

        def retrieve(wanted: Sequence[Segment]) -> StoredKV:
            return store.retrieve(array, wanted, prefix=prefix, timeout_s=ends_at - time.monotonic())

        found = self._pipeline.find(
            store,
            array,
            segments,
            timeout_s=ends_at - time.monotonic(),
            prefix=prefix,
            pipelined=not self.blender.selector.needs_all_layers,
        )
        return self._pipeline.fuse(found, lambda kv: self._blended(ids, kv, always, all_logits), retrieve)

    def close(self) -> None:
        """Forget what is known of passages; their KV stays in storage."""
        self._prefixes.clear()
        self._pipeline.forget()

    def __enter__(self) -> BlendEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _blended(self, ids: torch.Tensor, reused: StoredKV, always: Sequence[Segment], all_logits: bool) -> Blended:
        """At the ratio that the controller chooses, which is told what it took."""
        if self._controller is None:
            return self.blender.blend(ids, reused, always=always, all_logits=all_logits)
        layers = self._model.num_layers
        ratio = self._controller.ratio(
            int((reused.covered & ~reused.exact).sum()),
            reused.pending_bytes / layers,
            always=int((~reused.covered).sum()),
            complete=max(self.blender.selector.check_layers, default=0) / layers,
        )
        blended = self.blender.at_ratio(ratio).blend(ids, reused, always=always, all_logits=all_logits)
        took = [seconds for stage, seconds in blended.report.seconds.items() if stage not in _BESIDE_LAYERS]
        self._controller.computed(blended.report.computed, sum(took))
        return blended

    def _begins_with_prefix(self, tokens: Sequence[int]) -> bool:
        count = len(self._prefix_ids)
        return 0 < count < len(tokens) and list(tokens[:count]) == self._prefix_ids

    def _prefix_of(self, store: SegmentStore) -> _Prefix | None:
        """The prefix's KV with the ropes of that store."""
        if not self._prefix_ids:
            return None
        found = self._prefixes.get(store)
        if found is None:
            empty = GivenKV(self._nothing(len(self._prefix_ids)), [])
            found = self._prefixes[store] = _Prefix(self._all.blend(self._prefix_ids, empty).layers)
        return found

    def _prefilled(self, whole: Sequence[int], store: SegmentStore) -> list[KV]:
        """The KV of what stands behind the prefix."""
        prefix, first = self._prefix_of(store), len(self._prefix_ids)
        with store.retrieve(whole, [], prefix=prefix) as reused:
            layers = self._all.blend(whole, reused).layers
        return [(keys[first:], values[first:]) for keys, values in layers]

    def _nothing(self, tokens: int) -> list[KV]:
        kv = self._model.kv
        row = torch.zeros(1, kv.heads, kv.size, dtype=kv.dtype, device=kv.device).expand(tokens, -1, -1)
        return [(row, row)] * self._model.num_layers

    def store_for(self, length: int) -> SegmentStore:
        """Of the ropes that the model uses for a prompt so long: "dynamic" and "longrope" have more than one."""
        frequencies = {name: rope.frequencies(length) for name, rope in self._model.ropes.items()}
        known = tuple(each.inverse.numpy().tobytes() for each in frequencies.values())
        store = self._stores.get(known)
        if store is not None and (store.format.positions or 0) >= length:
            return store
        kv = self._model.kv
        tables: dict[object, RotaryTable] = {}
        for name, each in frequencies.items():
            positions = max(self._model.ropes[name].max_positions or 0, 1 << (length - 1).bit_length())
            tables[name] = RotaryTable.from_frequencies(each, positions, device=kv.device, angles=torch.float32)
        format = SegmentFormat(
            model=self._model_id,
            dtype=kv.dtype,
            heads=kv.heads,
            head_dim=kv.size,
            tables=tuple(tables[attention.rope] for attention in self._model.attention),
            device=kv.device,
        )
        on_read = self._controller.read if self._controller else None
        self._stores[known] = SegmentStore(self._manager, format, chunk_bytes=self._chunk_bytes, on_read=on_read)
        return self._stores[known]
