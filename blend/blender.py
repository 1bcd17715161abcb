"""The fusion: a prompt's KV out of reused segments and of the few tokens that are computed again, layer by layer.

    layer        0        1 (check)      2 ..  last
    computed     all      chosen ones    chosen ones; behind its KV, in the last layer, what logits are asked of
    attends to   reused KV of every token at or before it, overwritten where a token was computed

Yao et al., "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion" (arXiv:2405.16444).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from lmcache.blend.forward import KV, LayerFeed, Rotation, Stopwatch, question_mass, use_one_core
from lmcache.blend.models import adapt
from lmcache.blend.models.base import BlendModel
from lmcache.blend.reuse import ReusedKV, Segment
from lmcache.blend.selectors import TokenSelector, at_ratio, build_selector, check_layers, describe
from lmcache.errors import BlendError, ConfigError
from lmcache.kernels.attention.deviation import kv_deviation
from lmcache.kernels.attention.sparse_prefill import PROVIDERS, PackedKV, sparse_prefill


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
        done: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
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
            return _Blend(self, ids, reused, executor).run(always, all_logits, stop, done)

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


class _Blend:
    """One prompt on its way through the model."""

    def __init__(self, blender: Blender, tokens: torch.Tensor, reused: ReusedKV, executor: ThreadPoolExecutor) -> None:
        self.model, self.selector, self.provider = blender.model, blender.selector, blender.provider
        self.tokens, self.reused = tokens, reused
        self.feed = LayerFeed(self.model, reused, len(tokens), executor)
        self.rotation = Rotation(self.model, len(tokens))
        self.watch = Stopwatch()
        self.planned: torch.Tensor | None = None
        self.plan: dict[object, Any] = {}
        self.asked: dict[tuple[int, float, float], torch.Tensor] = {}
        self.exact_last = bool(reused.exact[-1])
        self.bounds = torch.tensor([0, len(tokens)], device=tokens.device)

    def run(
        self,
        always: Sequence[Segment],
        all_logits: bool,
        stop: int | None,
        done: Callable[[int, torch.Tensor, torch.Tensor], None] | None,
    ) -> Blended:
        model, end = self.model, len(self.tokens)
        if stop is not None:
            always = [*always, Segment(stop, end)]
        self.prompt = prompt = describe(self.reused, always, self.selector.config, self._attention, self._truth)
        with self.watch("select"):
            rows = self.selector.start(prompt)
        choosing = max(self.selector.check_layers, default=-1)
        if stop is not None and choosing < 0:
            rows = rows[rows < stop]
        hidden = model.embed(self.tokens[rows])
        layers: list[KV] = []
        computed: list[int] = []

        def end_of(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            if done is None:
                layers.append((keys[:stop], values[:stop]))
            else:
                with self.watch("done"):
                    done(index, keys[:stop], values[:stop])
                self.feed.forget(index)

        for index in range(model.num_layers):
            with self.watch("load"):
                keys, values = self.feed.layer(index)
            if not len(rows):  # all is reused, and no logits are asked for
                computed.append(0)
                end_of(index, keys, values)
                continue
            with self.watch("project"):
                x = model.norm(index, hidden)
                k, v = model.key_value(index, x)
                k = self.rotation(index, k, rows)
            if index in self.selector.check_layers:
                with self.watch("select"):
                    k_dev, v_dev = kv_deviation(k, keys[rows], v, values[rows])
                    kept = self.selector.narrow(prompt, index, rows, k_dev, v_dev)
                    if stop is not None and index == choosing:
                        kept = kept[rows[kept] < stop]
                    rows, hidden, x, k, v = (t[kept] for t in (rows, hidden, x, k, v))
            computed.append(len(rows))
            # Rows ascend: an exact last token is the last row.
            written = len(rows) - (self.exact_last and bool(rows[-1:] == end - 1))
            with self.watch("write"):
                keys[rows[:written]] = k[:written]
                values[rows[:written]] = v[:written]
            if index + 1 == model.num_layers and not all_logits:
                rows, hidden, x = rows[-1:], hidden[-1:], x[-1:]
            if stop is None or (index + 1 < model.num_layers and len(rows)):
                hidden = self._finish(index, rows, hidden, x, keys, values)
            end_of(index, keys, values)
        logits = None
        if stop is not None:
            rows = rows[:0]
        else:
            with self.watch("logits"):
                logits = model.logits(hidden)
        report = BlendReport(len(self.tokens), prompt.num_candidates, computed, dict(self.watch.seconds))
        return Blended(logits, rows, layers, report)

    def _finish(
        self,
        index: int,
        rows: torch.Tensor,
        hidden: torch.Tensor,
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Queries, attention and the rest of the layer."""
        with self.watch("project"):
            q = self.rotation(index, self.model.query(index, x), rows)
        attention = self.model.attention[index]
        with self.watch("attend"):
            attended = sparse_prefill(
                q,
                PackedKV(keys, values, self.bounds),
                rows,
                torch.tensor([0, len(rows)], device=rows.device),
                scale=attention.scale,
                window=attention.window,
                max_kv=len(keys),
                plan=self._plan(rows),
                provider=self.provider,
            )
        with self.watch("mlp"):
            return self.model.finish(index, hidden, attended)

    def _plan(self, rows: torch.Tensor) -> dict[object, Any]:
        """That of attention, for as long as the rows are the same."""
        if self.planned is not rows:
            self.planned, self.plan = rows, {}
        return self.plan

    def _attention(self, question: int, start: float, stop: float) -> torch.Tensor:
        """Prompt.attention."""
        asked = (question, start, stop)
        if asked not in self.asked:
            layers = range(int(start * self.model.num_layers), math.ceil(stop * self.model.num_layers))
            rows, asking = self._question(question)
            known, first = self.reused.covered, layers.start
            masses = question_mass(
                self.model, self.rotation, self.feed.layer, self.tokens, rows, asking, known, self.exact_last, first
            )
            with self.watch("dry run"):
                self.asked[asked] = torch.stack(list(islice(masses, len(layers)))).mean(0)
        return self.asked[asked]

    def _question(self, limit: int) -> tuple[torch.Tensor, int]:
        """Rows of a dry run, and how many of them, the last, ask: the tail that is computed in any case.

        The first tokens of the prompt, on which attention sinks, are computed too if there is no KV of them.
        """
        include = self.prompt.include
        length = len(include)
        start = int(torch.nonzero(~include).max()) + 1 if not bool(include.all()) else 0
        asked = min(length - start, limit)
        positions = torch.arange(length, device=include.device)
        wanted = include & ((positions < _SINKS) | (positions >= length - asked))
        return torch.nonzero(wanted).flatten(), asked

    def _truth(self, question: int) -> torch.Tensor:
        """Prompt.truth."""
        true: list[KV] = []

        def copied(index: int) -> KV:
            keys, values = self.feed.layer(index)
            true.append((keys.clone(), values.clone()))
            return true[-1]

        rows, asking = self.prompt.everything, self._question(question)[1]
        known = self.reused.exact
        score = torch.zeros(len(self.tokens), device=self.tokens.device)
        passes = question_mass(self.model, self.rotation, copied, self.tokens, rows, asking, known, self.exact_last)
        for index, mass in enumerate(passes):
            old = self.feed.layer(index)
            score += mass * kv_deviation(true[-1][0], old[0], true[-1][1], old[1])[1].sqrt()
        return score / self.model.num_layers


_SINKS = 4


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
