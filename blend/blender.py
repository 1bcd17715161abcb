"""The fusion: a prompt's KV out of reused segments and of the few tokens that are computed again, layer by layer.

    layer        0        1 (check)      2 ..  last
    computed     all      chosen ones    chosen ones; behind its KV, in the last layer, what logits are asked of
    attends to   reused KV of every token at or before it, overwritten where a token was computed

Yao et al., "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion" (arXiv:2405.16444).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from lmcache.blend.forward import KV, LayerFeed, Rotation, Stopwatch, use_one_core
from lmcache.blend.models import adapt
from lmcache.blend.models.base import BlendModel
from lmcache.blend.question import Question
from lmcache.blend.reuse import ReusedKV, Segment
from lmcache.blend.selectors import TokenSelector, at_ratio, build_selector, check_layers, describe
from lmcache.errors import BlendError, ConfigError
from lmcache.kernels.attention.deviation import kv_deviation
from lmcache.kernels.attention.sparse_prefill import PROVIDERS, PackedKV, sparse_prefill

Done = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class BlendReport:
    """computed: tokens whose KV was computed, of each layer. seconds: of the host, by stage; "load" is time waited."""

    prompt_tokens: int
    candidates: int
    computed: list[int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Blended:
    """logits: `[n, vocabulary]` of the tokens at `positions` (int64 `[n]`, ascending): the last, or all computed ones.

    layers: keys and values of each layer, `[T, H_kv, D]`; they are the caller's. With `stop`: of the tokens before
    it, and no logits. With `done`: none.
    """

    logits: torch.Tensor | None
    positions: torch.Tensor
    layers: list[KV]
    report: BlendReport


class Blender:
    """Blends prompts for one model.

        blender = Blender(model, "cacheblend", ratio=0.15)
        blended = blender.blend(tokens, reused)
        model.generate(tokens[None], past_key_values=blender.cache(blended))

    model: of Hugging Face transformers, or a BlendModel. selector: a name of TOKEN_SELECTORS, a mapping of type and
    options, or a selector; options by keyword are added. provider: of attention (kernels.sparse_prefill.PROVIDERS).
    Thread-safe. Raises BlendError for a model that is not supported, ConfigError for unknown names and options.
    """

    def __init__(
        self,
        model: torch.nn.Module | BlendModel,
        selector: str | Mapping[str, Any] | TokenSelector[Any] = "cacheblend",
        *,
        provider: str = "triton",
        **options: Any,
    ) -> None:
        self.model = model if isinstance(model, BlendModel) else adapt(model)
        if not isinstance(selector, TokenSelector):
            given = {"type": selector} if isinstance(selector, str) else selector
            selector = build_selector({**given, **options})
        elif options:
            raise ConfigError(f"{sorted(options)}: a selector that is built already takes no options")
        self.selector = selector
        check_layers(self.selector, self.model.num_layers)
        PROVIDERS.get(provider)
        self.provider = provider

    @torch.no_grad()
    def blend(
        self,
        tokens: torch.Tensor | Sequence[int],
        reused: ReusedKV,
        *,
        always: Sequence[Segment] = (),
        all_logits: bool = False,
        stop: int | None = None,
        done: Done | None = None,
    ) -> Blended:
        """The KV of all `tokens` (`[T]`), and logits of the last one, or with all_logits of all computed ones.

        always: spans that are computed in any case, unless exact: the question, say. Exact tokens keep their KV's bits.
        stop: only the KV of the tokens before it is wanted. Those from it on are the question, which selectors may ask;
            whoever goes on with the KV computes them.
        done: is given the number, keys and values of each layer when only later ones are left; they are not kept then.
        Raises BlendError for reused KV that does not fit the prompt or the model.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.model.kv.device)
        _check(ids, reused)
        if stop is not None and (all_logits or not 0 < stop < len(ids)):
            raise BlendError(f"stop is {stop}; it must lie within the {len(ids)} tokens, and there are no logits then")
        with ThreadPoolExecutor(1, "lmcache-blend-load", use_one_core) as executor:
            return _Fusion(self, ids, reused, executor, always, all_logits, stop, done).run()

    def at_ratio(self, ratio: float) -> Blender:
        """The same with another ratio. ConfigError where the selector has none that decides."""
        other = copy(self)
        other.selector = at_ratio(self.selector, ratio)
        return other

    def cache(self, blended: Blended, tokens: int | None = None) -> object:
        """The first `tokens` of the KV as a transformers DynamicCache, copied; by default all but the last token's.

        Given that and the prompt, `model.generate` computes the last token again and goes on from there. Raises
        BlendError for a model that is not of Hugging Face.
        """
        count = len(blended.layers[0][0]) - 1 if tokens is None else tokens
        return self.model.cache([(keys[:count], values[:count]) for keys, values in blended.layers])


class _Fusion:
    """One prompt on its way through the model, layer by layer. rows, hidden: the tokens that are computed now.

    always, all_logits, stop, done: as of Blender.blend.
    """

    def __init__(
        self,
        blender: Blender,
        tokens: torch.Tensor,
        reused: ReusedKV,
        executor: ThreadPoolExecutor,
        always: Sequence[Segment],
        all_logits: bool,
        stop: int | None,
        done: Done | None,
    ) -> None:
        self.model, self.selector, self.provider = blender.model, blender.selector, blender.provider
        self.all_logits, self.stop, self.done = all_logits, stop, done
        self.end, self.exact_last = len(tokens), bool(reused.exact[-1])
        self.feed = LayerFeed(self.model, reused, self.end, executor)
        self.rotation = Rotation(self.model, self.end)
        self.watch = Stopwatch()
        self.planned: torch.Tensor | None = None
        self.plan: dict[object, Any] = {}
        self.bounds = torch.tensor([0, self.end], device=tokens.device)
        self.layers: list[KV] = []
        self.computed: list[int] = []
        question = Question(self.model, tokens, reused, self.feed, self.rotation, self.watch)
        always = always if stop is None else [*always, Segment(stop, self.end)]
        self.prompt = question.prompt = describe(
            reused, always, self.selector.config, question.attention, question.truth
        )
        with self.watch("select"):
            self.rows = self.selector.start(self.prompt)
        self.last_check = max(self.selector.check_layers, default=-1)
        if stop is not None and self.last_check < 0:
            self.rows = self.rows[self.rows < stop]
        self.hidden = self.model.embed(tokens[self.rows])

    def run(self) -> Blended:
        for index in range(self.model.num_layers):
            with self.watch("load"):
                keys, values = self.feed.layer(index)
            if len(self.rows):
                self._compute(index, keys, values)
            else:  # all is reused, and no logits are asked for
                self.computed.append(0)
            self._hand_over(index, keys, values)
        logits = None
        if self.stop is None:
            with self.watch("logits"):
                logits = self.model.logits(self.hidden)
        positions = self.rows if self.stop is None else self.rows[:0]
        report = BlendReport(self.end, self.prompt.num_candidates, self.computed, dict(self.watch.seconds))
        return Blended(logits, positions, self.layers, report)

    def _compute(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Recompute the rows' KV of a layer into `keys` and `values`, and take the rows through the layer."""
        with self.watch("project"):
            x = self.model.norm(index, self.hidden)
            k, v = self.model.key_value(index, x)
            k = self.rotation(index, k, self.rows)
        if index in self.selector.check_layers:
            with self.watch("select"):
                kept = self._kept(index, k, v, keys, values)
                self.rows, self.hidden, x, k, v = (t[kept] for t in (self.rows, self.hidden, x, k, v))
        self.computed.append(len(self.rows))
        # Rows ascend: an exact last token is the last row.
        written = len(self.rows) - (self.exact_last and bool(self.rows[-1:] == self.end - 1))
        with self.watch("write"):
            keys[self.rows[:written]] = k[:written]
            values[self.rows[:written]] = v[:written]
        is_last = index + 1 == self.model.num_layers
        if is_last and not self.all_logits:
            self.rows, self.hidden, x = self.rows[-1:], self.hidden[-1:], x[-1:]
        if self.stop is None or (not is_last and len(self.rows)):
            self.hidden = self._finish(index, x, keys, values)

    def _kept(
        self, index: int, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Places in the rows of those that a check layer chooses, by how far their KV is from the reused."""
        k_dev, v_dev = kv_deviation(k, keys[self.rows], v, values[self.rows])
        kept = self.selector.narrow(self.prompt, index, self.rows, k_dev, v_dev)
        if self.stop is not None and index == self.last_check:
            kept = kept[self.rows[kept] < self.stop]
        return kept

    def _finish(self, index: int, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Queries, attention and the rest of the layer."""
        with self.watch("project"):
            q = self.rotation(index, self.model.query(index, x), self.rows)
        attention = self.model.attention[index]
        if self.planned is not self.rows:
            self.planned, self.plan = self.rows, {}
        with self.watch("attend"):
            attended = sparse_prefill(
                q,
                PackedKV(keys, values, self.bounds),
                self.rows,
                torch.tensor([0, len(self.rows)], device=self.rows.device),
                scale=attention.scale,
                window=attention.window,
                max_kv=len(keys),
                plan=self.plan,
                provider=self.provider,
            )
        with self.watch("mlp"):
            return self.model.finish(index, self.hidden, attended)

    def _hand_over(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The layer's KV is complete."""
        keys, values = keys[: self.stop], values[: self.stop]
        if self.done is None:
            self.layers.append((keys, values))
        else:
            with self.watch("done"):
                self.done(index, keys, values)
            self.feed.forget(index)


def _check(tokens: torch.Tensor, reused: ReusedKV) -> None:
    if tokens.dim() != 1 or len(tokens) == 0:
        raise BlendError(f"tokens has shape {tuple(tokens.shape)}; it must be [T], one token at least")
    for name, mask in (("covered", reused.covered), ("exact", reused.exact)):
        if mask.dtype != torch.bool or mask.shape != tokens.shape or mask.device != tokens.device:
            raise BlendError(
                f"{name} is {mask.dtype} {tuple(mask.shape)} on {mask.device}; it must be bool ({len(tokens)},) on "
                f"{tokens.device}, one for each token of the prompt"
            )
    if bool((reused.exact & ~reused.covered).any()):
        raise BlendError("some tokens are exact but not covered; exact ones are among the covered")
