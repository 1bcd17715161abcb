"""What a prompt's question attends to: passes over the KV that selectors may ask for before they choose tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from lmcache.blend.forward import KV, LayerFeed, Rotation, Stopwatch
from lmcache.blend.models.base import BlendModel
from lmcache.blend.reuse import ReusedKV
from lmcache.blend.selectors import Prompt
from lmcache.kernels.attention.deviation import kv_deviation
from lmcache.kernels.attention.sparse_prefill import visible

_SLAB_SCORES = 1 << 24  # attention scores held at once
_SINKS = 4  # first tokens of a prompt, which get much attention whatever they are


class Question:
    """Answers ``Prompt.attention`` and ``Prompt.truth`` for one prompt. prompt: is set before it is asked."""

    prompt: Prompt

    def __init__(
        self,
        model: BlendModel,
        tokens: torch.Tensor,
        reused: ReusedKV,
        feed: LayerFeed,
        rotation: Rotation,
        watch: Stopwatch,
    ) -> None:
        self._model, self._tokens, self._reused = model, tokens, reused
        self._feed, self._rotation, self._watch = feed, rotation, watch
        self._exact_last = bool(reused.exact[-1])
        self._answers: dict[tuple[int, float, float], torch.Tensor] = {}

    def attention(self, question: int, start: float, stop: float) -> torch.Tensor:
        """Prompt.attention."""
        asked = (question, start, stop)
        if asked not in self._answers:
            layers = range(int(start * self._model.num_layers), math.ceil(stop * self._model.num_layers))
            rows, asking = self._rows(question)
            masses = self._masses(self._feed.layer, rows, asking, self._reused.covered, layers.start)
            with self._watch("dry run"):
                self._answers[asked] = torch.stack(list(islice(masses, len(layers)))).mean(0)
        return self._answers[asked]

    def truth(self, question: int) -> torch.Tensor:
        """Prompt.truth."""
        true: list[KV] = []

        def copied(index: int) -> KV:
            keys, values = self._feed.layer(index)
            true.append((keys.clone(), values.clone()))
            return true[-1]

        asking = self._rows(question)[1]
        score = torch.zeros(len(self._tokens), device=self._tokens.device)
        for index, mass in enumerate(self._masses(copied, self.prompt.everything, asking, self._reused.exact)):
            old = self._feed.layer(index)
            score += mass * kv_deviation(true[-1][0], old[0], true[-1][1], old[1])[1].sqrt()
        return score / self._model.num_layers

    def _masses(
        self, layers: Callable[[int], KV], rows: torch.Tensor, asking: int, known: torch.Tensor, first: int = 0
    ) -> Iterator[torch.Tensor]:
        """Runs `rows` over the KV and yields, from layer `first` on, what the last `asking` of them attend to.

        fp32 `[T]`: summed over those tokens, mean over heads. The KV of `rows` is written into that of `layers`.
        `known`: bool `[T]`, tokens with KV; others are not seen, unless they are in `rows`. Done in torch: the softmax
        is needed.
        """
        tokens = self._tokens
        key_positions = torch.arange(len(tokens), device=tokens.device)
        seen = known.clone()
        seen[rows] = True
        key_positions = key_positions.where(seen, len(tokens))  # behind every query
        masks: dict[int | None, torch.Tensor] = {}
        hidden = self._model.embed(tokens[rows])
        written = len(rows) - self._exact_last
        for index in range(self._model.num_layers):
            keys, values = layers(index)
            x = self._model.norm(index, hidden)
            k, v = self._model.key_value(index, x)
            keys[rows[:written]] = self._rotation(index, k, rows)[:written]
            values[rows[:written]] = v[:written]
            attention = self._model.attention[index]
            q = self._rotation(index, self._model.query(index, x), rows)
            if attention.window not in masks:
                unseen = ~visible(rows, key_positions, attention.window)
                mask = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device)
                masks[attention.window] = mask.masked_fill_(unseen, -torch.inf)
            mask = masks[attention.window]
            if index < first:
                attended = _attend(q, (keys, values), mask, attention.scale)
            else:
                attended, mass = _attend_and_weigh(q, (keys, values), mask, asking, attention.scale)
                yield mass
            if index + 1 < self._model.num_layers:
                hidden = self._model.finish(index, hidden, attended)

    def _rows(self, limit: int) -> tuple[torch.Tensor, int]:
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


def _attend(q: torch.Tensor, kv: KV, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention's output `[N, H_q, D]`; mask: `[N, T]`, added to the logits."""
    k, v = (side.transpose(0, 1)[None] for side in kv)  # [1, H_kv, T, D]
    grouped = q.view(len(q), k.shape[1], -1, q.shape[2])
    group = grouped.shape[2]  # whose heads are rows of one: each head's keys are packed once
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped.transpose(0, 1).flatten(1, 2)[None], k, v, attn_mask=mask.repeat_interleave(group, 0), scale=scale
    )
    return out.view(k.shape[1], len(q), group, -1).transpose(0, 1).flatten(1, 2)


def _attend_and_weigh(
    q: torch.Tensor, kv: KV, mask: torch.Tensor, question: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's output `[N, H_q, D]`, and the weights of the last `question` rows summed, `[T]`.

    mask: `[N, T]`, added to the logits.
    """
    keys, values = kv
    total, q_heads, size = q.shape
    k, v = keys.permute(1, 2, 0), values.transpose(0, 1)  # [H_kv, D, T], [H_kv, T, D]
    out = torch.empty_like(q)
    mass = torch.zeros(len(keys), dtype=torch.float32, device=q.device)
    slab = max(1, _SLAB_SCORES // (len(keys) * q_heads))
    for first in range(0, total, slab):
        part = q[first : first + slab]
        grouped = (part * scale).view(len(part), len(k), -1, size).permute(1, 2, 0, 3)  # [H_kv, G, n, D]
        logits = torch.matmul(grouped.flatten(1, 2), k).view(*grouped.shape[:3], -1)
        weights = logits.add_(mask[first : first + slab]).softmax(-1)  # [H_kv, G, n, T]
        asking = max(total - question - first, 0)
        mass += weights[:, :, asking:].sum((0, 1, 2), dtype=torch.float32) / q_heads
        attended = torch.matmul(weights.flatten(1, 2), v).view(grouped.shape)
        out[first : first + slab] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out, mass
