"""A Hugging Face model as the fit of a profile sees it: the KV of a text, and how far other KV moves predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lmcache.errors import KernelArgumentError

# Keys and values of each layer, [H, T, D].
KV = list[tuple[torch.Tensor, torch.Tensor]]
_CAPTURE = "lmcache_capture"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text: the KV of its first tokens, and what the model predicts from there on (log-probabilities, float64)."""

    name: str
    kv: KV
    rest: torch.Tensor
    expected: torch.Tensor


@dataclasses.dataclass
class Weights:
    """How much each channel's error matters, [L, H, D, D]: second moments of queries, Gram matrices of outputs."""

    queries: torch.Tensor
    outputs: torch.Tensor


class KVModel:
    """`folder`: a Hugging Face folder of a model with rotary attention. Needs transformers. Not thread-safe.

    One thread by default, because the machine may be shared.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._moments: dict[int, torch.Tensor] | None = None

        def capture(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._moments is not None:
                heads = key.shape[1]
                rows = query[0].reshape(heads, -1, query.shape[-1])  # [H, group * T, D]
                moment = (rows.mT @ rows).double() / rows.shape[1]
                self._moments[module.layer_idx] = self._moments.get(module.layer_idx, 0) + moment
            return sdpa_attention_forward(module, query, key, *args, **kwargs)

        AttentionInterface.register(_CAPTURE, capture)
        # Without a mask of that name, attention behind a cache would be causal from the wrong corner.
        AttentionMaskInterface.register(_CAPTURE, sdpa_mask)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=_CAPTURE
        ).eval()

    @torch.no_grad()
    def samples(self, texts: Mapping[str, str], prefix: int, scored: int) -> list[Sample]:
        """The first `prefix` tokens of each text as KV, predictions over the next `scored`."""
        from transformers import DynamicCache

        samples = []
        for name, text in texts.items():
            ids = self.tokenizer(text, return_tensors="pt").input_ids[:, : prefix + scored]
            if ids.shape[1] <= prefix:
                raise KernelArgumentError(f"{name} has {ids.shape[1]} tokens; more than {prefix} are needed")
            cache = DynamicCache()
            self.model.model(ids[:, :prefix], past_key_values=cache)
            kv = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
            samples.append(Sample(name, kv, ids[:, prefix:], self.predict(kv, ids[:, prefix:])))
        return samples

    @torch.no_grad()
    def predict(self, kv: KV, rest: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [T, vocabulary] of what follows each token of `rest` behind `kv`."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(kv):
            cache.update(keys[None].clone(), values[None].clone(), layer)
        return torch.log_softmax(self.model(rest, past_key_values=cache).logits[0].double(), -1)

    def divergence(self, sample: Sample, kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL divergence in nats, whether the likeliest token is the same), per token, of `kv` in place of the true."""
        found = self.predict(kv, sample.rest)
        divergence = (sample.expected.exp() * (sample.expected - found)).sum(-1)
        return divergence, sample.expected.argmax(-1) == found.argmax(-1)

    @torch.no_grad()
    def weights(self, texts: Sequence[str], tokens: int) -> Weights:
        """Measured over `texts`, `tokens` of each."""
        self._moments = {}
        try:
            for text in texts:
                self.model.model(self.tokenizer(text, return_tensors="pt").input_ids[:, :tokens])
            queries = torch.stack([self._moments[layer] for layer in sorted(self._moments)]) / len(texts)
        finally:
            self._moments = None
        outputs = []
        heads, width = queries.shape[1:3]
        for _, block in zip(queries, self.model.model.layers, strict=True):
            weight = block.self_attn.o_proj.weight.double()  # [hidden, query heads * D]
            per_head = weight.view(len(weight), heads, -1, width)  # [hidden, H, group, D]
            outputs.append(torch.einsum("ohgd,ohge->hde", per_head, per_head) / per_head.shape[2])
        return Weights(queries, torch.stack(outputs))


def replaced(kv: KV, layer: int, side: int, change: Callable[[torch.Tensor], torch.Tensor], sinks: int) -> KV:
    """`kv` with `change(x)` in place of one side (0: keys) of a layer, but for the first `sinks` tokens."""
    sides = list(kv[layer])
    sides[side] = torch.cat([sides[side][:, :sinks], change(sides[side])[:, sinks:]], 1)
    return [*kv[:layer], (sides[0], sides[1]), *kv[layer + 1 :]]
