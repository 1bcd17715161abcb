"""Decoders of Hugging Face transformers: their own modules are called for everything but attention.

To add one: subclass the nearest, say where it differs, and name it in BLEND_MODELS.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lmcache.blend.models.base import BlendModel, KVShape, LayerAttention, Rope
from lmcache.errors import BlendError

if TYPE_CHECKING:
    from transformers import DynamicCache

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Llama(BlendModel):
    """Llama and all that is built like it, SmolLM2 among them."""

    def __init__(self, model: torch.nn.Module) -> None:
        _check_modules(model)
        whole: Any = model
        self.config, self.head = whole.config, whole.lm_head
        self.decoder = whole.model
        self.blocks: Sequence[Any] = whole.model.layers[: self.config.num_hidden_layers]
        first, weight = self.blocks[0].self_attn, self.head.weight
        self.size: int = first.head_dim
        super().__init__(
            [LayerAttention(b.self_attn.scaling, self.window(b), self.rope(b)) for b in self.blocks],
            {
                name: Rope(parameters, self.size, self.config.max_position_embeddings)
                for name, parameters in self.rope_parameters().items()
            },
            KVShape(first.k_proj.out_features // self.size, self.size, weight.dtype, weight.device),
        )
        self._check_ropes()

    def window(self, block: Any) -> int | None:
        """How many keys a query of that layer sees; None: all."""
        return None

    def rope(self, block: Any) -> Hashable:
        """Which of the ropes that layer has."""
        return "all"

    def rope_parameters(self) -> Mapping[Hashable, Mapping[str, object]]:
        return {"all": self.config.rope_parameters}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.decoder.embed_tokens(tokens)
        return embedded

    def norm(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.blocks[layer].input_layernorm(hidden)
        return x

    def query(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return self._heads(self.blocks[layer].self_attn.q_proj(x))

    def key_value(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.blocks[layer].self_attn
        return self._heads(attention.k_proj(x)), self._heads(attention.v_proj(x))

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        hidden = hidden + block.self_attn.o_proj(attended.flatten(1))
        result: torch.Tensor = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.decoder.norm(hidden))
        return result

    def cache(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
        """A copy of keys and values `[T, H_kv, D]` of each layer as transformers wants them."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], index)
        return cache

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self.size)


class Mistral(Llama):
    """Llama with a window on all layers, or none."""

    def window(self, block: Any) -> int | None:
        window: int | None = self.config.sliding_window
        return window


class Qwen2(Llama):
    """Llama with a bias on queries, keys and values (which its own projections add), and a window on some layers."""

    def window(self, block: Any) -> int | None:
        window: int | None = block.self_attn.sliding_window
        return window


class Qwen3(Qwen2):
    """Qwen2 whose queries and keys are normalised, each head by itself."""

    def query(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        q: torch.Tensor = self.blocks[layer].self_attn.q_norm(super().query(layer, x))
        return q

    def key_value(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().key_value(layer, x)
        return self.blocks[layer].self_attn.k_norm(keys), values


class Gemma3(Qwen3):
    """Qwen3 with norms after attention and MLP too, local layers with a rope of their own, and capped logits.

    Its embedding scales itself, and its layers know their scale (query_pre_attn_scalar).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        for option in ("attn_logit_softcapping", "use_bidirectional_attention"):
            if getattr(self.config, option, None):
                # transformers ignores the first for Gemma 3, vLLM does not.
                raise BlendError(f"{option} is {getattr(self.config, option)!r}; only models without it are supported")

    def rope(self, block: Any) -> Hashable:
        name: str = block.self_attn.layer_type
        return name

    def rope_parameters(self) -> Mapping[Hashable, Mapping[str, object]]:
        return {name: self.config.rope_parameters[name] for name in sorted(set(self.config.layer_types))}

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        hidden = hidden + block.post_attention_layernorm(block.self_attn.o_proj(attended.flatten(1)))
        mlp = block.mlp(block.pre_feedforward_layernorm(hidden))
        result: torch.Tensor = hidden + block.post_feedforward_layernorm(mlp)
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, cap = super().logits(hidden), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _check_modules(model: torch.nn.Module) -> None:
    """Only modules that the architecture itself has: no quantised layers, no adapters, no other attention."""
    own = type(model).__module__
    for name, module in model.named_modules():
        home = type(module).__module__
        if home != own and not home.startswith(("torch.nn.modules.", "transformers.activations")):
            raise BlendError(
                f"{name or 'the model'} is a {home}.{type(module).__name__}; supported are the modules of {own} as "
                "they are, in bfloat16, float16 or float32: neither quantised ones nor adapters"
            )
    kinds = {(type(p.data), p.dtype, p.device) for p in model.parameters()}
    if len(kinds) != 1 or not all(kind is torch.Tensor and dtype in _DTYPES for kind, dtype, _ in kinds):
        raise BlendError(
            f"the model's weights are {sorted(map(str, kinds))}; supported are plain tensors of one dtype (bfloat16, "
            "float16 or float32) on one device"
        )
