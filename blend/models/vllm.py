"""Decoders as vLLM has loaded them, whose own modules do the work; only attention is ours.

vLLM computes queries, keys and values in one projection: `norm` gives its result, which the others take apart. To add
a model: subclass the nearest, say where it differs, and name it in BLEND_MODELS.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from lmcache.blend.models import BLEND_MODELS
from lmcache.blend.models.base import BlendModel, KVShape, LayerAttention, Rope
from lmcache.errors import BlendError
from lmcache.kernels.rotary_tables import rope_frequencies

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How far vLLM's cosines may be from ours: it keeps them in the model's dtype.
_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-10}


def find_model(attention: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """The loaded model of this process that has these attention layers (vLLM's static_forward_context).

    vLLM hands its connectors the layers that keep KV, and nothing that leads from them to the model. BlendError unless
    exactly one model that can be blended has them all, and no others.
    """
    wanted = {id(module) for module in attention.values()}
    kind = {type(module) for module in attention.values()}
    found = []
    # By type: asking other objects what they are runs code of theirs.
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.nn.Module) and _name(candidate) in _known():
            own = {id(module) for module in candidate.modules() if type(module) in kind}
            if own == wanted and not any(one is candidate for one in found):
                found.append(candidate)
    if len(found) != 1:
        raise BlendError(
            f"{len(found)} models with the {len(wanted)} attention layers of this engine; blending supports "
            f"{', '.join(_known())}: leave blend out, and prefixes are reused"
        )
    model: torch.nn.Module = found[0]
    return model


def _known() -> list[str]:
    return [name for name in BLEND_MODELS.names() if name.startswith("vllm.")]


def _name(model: object) -> str:
    return f"{type(model).__module__.split('.')[0]}.{type(model).__name__}"


class Llama(BlendModel):
    """Llama and all that is built like it, SmolLM2 among them.

    kv_layers: vLLM's name of each layer's KV.
    """

    attention_options: Mapping[str, object] = {}  # of vLLM's attention module, and what each must be

    def __init__(self, model: torch.nn.Module) -> None:
        whole: Any = model
        self.whole, self.config = whole, whole.config
        self.decoder = whole.model
        self.blocks: Sequence[Any] = list(whole.model.layers)
        _check_modules(whole, self.blocks)
        first = self.blocks[0].self_attn
        self.size: int = first.head_dim
        weight = self.blocks[0].input_layernorm.weight
        for block in self.blocks:
            _check_attention(block.self_attn, weight.dtype, self.attention_options)
        self.kv_layers = tuple(block.self_attn.attn.layer_name for block in self.blocks)
        super().__init__(
            [
                LayerAttention(b.self_attn.scaling, b.self_attn.attn.sliding_window or None, self.rope(b))
                for b in self.blocks
            ],
            {
                name: Rope(parameters, self.size, self.config.max_position_embeddings)
                for name, parameters in self.rope_parameters().items()
            },
            KVShape(first.num_kv_heads, self.size, weight.dtype, weight.device),
        )
        self._check_ropes()
        for index, block in enumerate(self.blocks):
            self._check_table(index, block.self_attn.rotary_emb)

    def rope(self, block: Any) -> Hashable:
        """Which of the ropes that layer has."""
        return "all"

    def rope_parameters(self) -> Mapping[Hashable, Mapping[str, object]]:
        return {"all": self.config.rope_parameters}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.decoder.embed_input_ids(tokens)
        return embedded

    def norm(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        qkv: torch.Tensor = block.self_attn.qkv_proj(block.input_layernorm(hidden))[0]
        return qkv

    def query(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        attention = self.blocks[layer].self_attn
        return self._heads(x[:, : attention.q_size])

    def key_value(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.blocks[layer].self_attn
        sides = x[:, attention.q_size :].split(attention.kv_size, 1)
        return self._heads(sides[0]), self._heads(sides[1])

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        hidden = hidden + block.self_attn.o_proj(attended.flatten(1))[0]
        result: torch.Tensor = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.whole.compute_logits(self.decoder.norm(hidden))
        return result

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, self.size))

    def _check_table(self, layer: int, rotary: Any) -> None:
        """The rope that the config describes must be the one that vLLM applies."""
        cache = getattr(rotary, "cos_sin_cache", None)
        if cache is None or not rotary.is_neox_style or rotary.rotary_dim != self.size:
            raise BlendError(
                f"the rope of layer {layer} is vLLM's {type(rotary).__name__}; only ropes in halves (GPT-NeoX) that "
                "turn whole heads, with one table for all prompts, are supported"
            )
        rope = self.ropes[self.attention[layer].rope]
        lengths = (1, len(cache))
        short, long = (
            rope_frequencies(rope.parameters, rope.head_dim, max_positions=rope.max_positions, length=length).inverse
            for length in lengths
        )
        table = self.table(layer, len(cache))
        ours = (table.cos_sin[: len(cache)] * table.attention_factor).flatten(1)
        if not short.equal(long) or float((ours - cache.float()).abs().max()) > _ROUNDING.get(cache.dtype, 0.0):
            raise BlendError(
                f"the rope of layer {layer} ({dict(rope.parameters)}) is not turned as its description says; supported "
                "are those whose angles do not depend on the prompt's length"
            )


class Mistral(Llama):
    """Llama, with a window on all layers or none."""

    attention_options: Mapping[str, object] = {"do_llama_4_scaling": False}


class Qwen2(Llama):
    """Llama with a bias on queries, keys and values, which vLLM's projection adds."""

    attention_options: Mapping[str, object] = {"dual_chunk_attention_config": None, "qk_norm": False}


class Qwen3(Llama):
    """Qwen2 whose queries and keys are normalised, each head by itself."""

    attention_options: Mapping[str, object] = {"dual_chunk_attention_config": None}

    def query(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        q: torch.Tensor = self.blocks[layer].self_attn.q_norm(super().query(layer, x))
        return q

    def key_value(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().key_value(layer, x)
        return self.blocks[layer].self_attn.k_norm(keys), values


class Gemma3(Qwen3):
    """Qwen3 with norms after attention and MLP too, and local layers with a rope of their own.

    vLLM's embedding scales itself, and caps the logits.
    """

    attention_options: Mapping[str, object] = {}

    def rope(self, block: Any) -> Hashable:
        return "sliding_attention" if block.self_attn.is_sliding else "full_attention"

    def rope_parameters(self) -> Mapping[Hashable, Mapping[str, object]]:
        return {name: self.config.rope_parameters[name] for name in sorted(set(self.config.layer_types))}

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        hidden = hidden + block.post_attention_layernorm(block.self_attn.o_proj(attended.flatten(1))[0])
        mlp = block.mlp(block.pre_feedforward_layernorm(hidden))
        result: torch.Tensor = hidden + block.post_feedforward_layernorm(mlp)
        return result


def _check_modules(model: Any, blocks: Sequence[Any]) -> None:
    """Only modules that vLLM itself puts there, all of them, on one device."""
    for name, module in model.named_modules():
        home = type(module).__module__
        if not home.startswith(("vllm.model_executor.", "torch.nn.modules.")) or "PPMissing" in type(module).__name__:
            raise BlendError(
                f"{name or 'the model'} is a {home}.{type(module).__name__}; supported are whole models as vLLM loads "
                "them: no adapters (enable_lora), no pipeline of several workers"
            )
    own = type(blocks[0])
    if any(type(block) is not own for block in blocks) or getattr(blocks[0], "ada_rms_norm_t_cond", None) is not None:
        raise BlendError(f"layers of more than one kind, or with more inputs than tokens ({own.__name__})")
    dtypes = {block.input_layernorm.weight.dtype for block in blocks}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise BlendError(f"the model computes in {sorted(map(str, dtypes))}; supported is one of {_DTYPES}")


def _check_attention(attention: Any, dtype: torch.dtype, options: Mapping[str, object]) -> None:
    """Only plain causal attention over KV in the model's own dtype, all heads in this process."""
    layer = attention.attn
    impl = layer.impl
    facts: dict[str, tuple[object, object]] = {
        "tensor parallel heads": (attention.num_heads, attention.total_num_heads),
        "attn_type": (layer.attn_type, "decoder"),
        "kv_cache_dtype": (layer.kv_cache_torch_dtype, dtype),
        "sinks": (bool(layer.has_sink), False),
        "alibi_slopes": (getattr(impl, "alibi_slopes", None), None),
        "logits_soft_cap": (getattr(impl, "logits_soft_cap", None) or None, None),
        "kv_sharing_target_layer_name": (layer.kv_sharing_target_layer_name, None),
        "head_size_v": (layer.head_size_v, attention.head_dim),
        **{name: (getattr(attention, name, wanted), wanted) for name, wanted in options.items()},
    }
    for name, (given, supported) in facts.items():
        if given is not supported and given != supported:
            raise BlendError(f"{layer.layer_name}: {name} is {given}; blending supports {supported}")
