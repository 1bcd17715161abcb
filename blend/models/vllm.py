"""Decoders as vLLM has loaded them: their own modules are called for everything but attention.

vLLM computes queries, keys and values in one projection: `norm` gives its result, which the others take apart. Modules
are called, their weights never touched, which vLLM may have packed for the processor. To add a model: subclass the
nearest, say where it differs, and name it in BLEND_MODELS.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from lmcache.blend.models.base import BlendModel, KVShape, LayerAttention, Rope
from lmcache.errors import BlendError
from lmcache.kernels.rotary.tables import RotaryTable

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ANGLE_ERROR = 2.0**-19  # of an angle, relative: frequencies and angles are rounded to fp32, ours and vLLM's


def find_model(attention: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """The loaded model of this process that has these attention layers (vLLM's static_forward_context), and no others.

    vLLM hands its connectors the layers that keep KV, and nothing that leads from them to the model. To be called when
    KV caches are registered: once vLLM has warmed up, it hides all objects from the garbage collector (gc.freeze), and
    from us. The outermost module is meant: a decoder within a larger model is fed with more than tokens. BlendError
    unless there is exactly one; whether it can be blended, `adapt` says.
    """
    wanted, kinds = {id(layer) for layer in attention.values()}, {type(layer) for layer in attention.values()}
    holders: list[torch.nn.Module] = []
    for candidate in gc.get_objects():
        # isinstance would run other people's __class__; modules without others are no models.
        if issubclass(type(candidate), torch.nn.Module) and candidate.__dict__.get("_modules"):
            module: torch.nn.Module = candidate
            if {id(part) for part in module.modules() if type(part) in kinds} == wanted:
                holders.append(module)
    inner = {id(part) for holder in holders for part in holder.modules() if part is not holder}
    models = [holder for holder in holders if id(holder) not in inner]
    if len(models) != 1:
        raise BlendError(
            f"{len(models)} models in this process have just the {len(wanted)} attention layers of this engine; there "
            "must be one, without a draft model beside it"
        )
    return models[0]


class Llama(BlendModel):
    """Llama and all that is built like it, SmolLM2 among them.

    kv_layers: vLLM's name of each layer's KV.
    """

    plain: Mapping[str, object] = {}  # attributes of the architecture's attention, and what each must be

    def __init__(self, model: torch.nn.Module) -> None:
        whole: Any = model
        self.whole, self.config, self.decoder = whole, whole.config, whole.model
        self.blocks: Sequence[Any] = list(whole.model.layers)
        _check_modules(whole)
        layers = [block.self_attn.attn for block in self.blocks]
        for index, block in enumerate(self.blocks):
            _check_attention(index, block.self_attn, layers[0], self.plain)
        self.kv_layers: tuple[str, ...] = tuple(layer.layer_name for layer in layers)
        self.size: int = layers[0].head_size
        super().__init__(
            [LayerAttention(b.self_attn.attn.impl.scale, self.window(b), self.rope(b)) for b in self.blocks],
            {
                name: Rope(parameters, self.size, self.config.max_position_embeddings)
                for name, parameters in self.rope_parameters().items()
            },
            KVShape(layers[0].num_kv_heads, self.size, layers[0].dtype, self.blocks[0].input_layernorm.weight.device),
        )
        self._check_ropes()
        self._check_tables()

    def window(self, block: Any) -> int | None:
        """How many keys a query of that layer sees; None: all."""
        window: int | None = block.self_attn.attn.sliding_window
        return window

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
        return self._heads(x[:, : self.blocks[layer].self_attn.q_size])

    def key_value(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = x[:, self.blocks[layer].self_attn.q_size :].chunk(2, 1)
        return self._heads(keys), self._heads(values)

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        hidden = hidden + block.self_attn.o_proj(attended.flatten(1))[0]
        result: torch.Tensor = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.whole.compute_logits(self.decoder.norm(hidden))
        return result

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self.size)

    def _check_tables(self) -> None:
        """The ropes that the config describes must be those that vLLM applies, whatever the prompt's length."""
        checked = set()
        for index, block in enumerate(self.blocks):
            name, rotary = self.attention[index].rope, block.self_attn.rotary_emb
            if (name, id(rotary)) not in checked:
                _check_table(self.kv_layers[index], self.ropes[name], rotary)
                checked.add((name, id(rotary)))


class Mistral(Llama):
    """Llama, with a window on all layers or none."""

    plain: Mapping[str, object] = {"do_llama_4_scaling": False}  # queries scaled by their position


class Qwen2(Llama):
    """Llama with a bias on queries, keys and values, which vLLM's projection adds."""

    plain: Mapping[str, object] = {"dual_chunk_attention_config": None, "qk_norm": False}


class Qwen3(Llama):
    """Qwen2 whose queries and keys are normalised, each head by itself."""

    plain: Mapping[str, object] = {"dual_chunk_attention_config": None}

    def query(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        q: torch.Tensor = self.blocks[layer].self_attn.q_norm(super().query(layer, x))
        return q

    def key_value(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().key_value(layer, x)
        return self.blocks[layer].self_attn.k_norm(keys), values


class Gemma3(Qwen3):
    """Qwen3 with norms after attention and MLP too, and local layers with a rope of their own.

    Its embedding scales itself, its layers know their scale, and vLLM caps the logits.
    """

    plain: Mapping[str, object] = {}

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


def _check_modules(model: torch.nn.Module) -> None:
    """Only modules that the architecture itself has: all layers, no adapters, no quantised weights."""
    for name, module in model.named_modules():
        home, kind = type(module).__module__, type(module).__name__
        if not home.startswith(("vllm.model_executor.", "torch.nn.modules.")) or kind == "PPMissingLayer":
            raise BlendError(
                f"{name or 'the model'} is a {home}.{kind}; supported are whole models as vLLM loads them: no LoRA, no "
                "pipeline of several workers"
            )
        method = type(getattr(module, "quant_method", None)).__name__
        if method not in ("NoneType", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"):
            raise BlendError(f"{name} has weights for {method}; supported are weights that are not quantised")
        if getattr(module, "ada_rms_norm_t_cond", None) is not None:
            raise BlendError(f"{name} takes more than tokens (ada_rms_norm_t_cond); supported are layers without that")


def _check_attention(index: int, attention: Any, first: Any, plain: Mapping[str, object]) -> None:
    """Only plain causal attention over KV in the model's own dtype, all heads in this process."""
    layer = attention.attn
    impl = layer.impl
    facts: dict[str, tuple[object, object]] = {
        # A part of a larger model is fed with more than tokens.
        "its name": (layer.layer_name, f"model.layers.{index}.self_attn.attn"),
        "its class": (type(layer).__name__, "Attention"),
        "attn_type": (layer.attn_type, "decoder"),
        "heads of this worker": (attention.num_heads, attention.total_num_heads),
        "KV heads": (layer.num_kv_heads, first.num_kv_heads),
        "head_size": ((layer.head_size, layer.head_size_v), (first.head_size, first.head_size)),
        "dtype of its KV": (layer.kv_cache_torch_dtype, first.dtype),
        "kv_sharing_target_layer_name": (layer.kv_sharing_target_layer_name, None),
        "use_mm_prefix": (layer.use_mm_prefix, False),
        "has_sink": (layer.has_sink, False),
        "alibi_slopes": (getattr(impl, "alibi_slopes", None), None),
        "logits_soft_cap": (getattr(impl, "logits_soft_cap", None) or None, None),
        **{name: (getattr(attention, name, wanted), wanted) for name, wanted in plain.items()},
    }
    if first.dtype not in _DTYPES:
        raise BlendError(f"the model computes in {first.dtype}; supported are {', '.join(map(str, _DTYPES))}")
    for name, (given, supported) in facts.items():
        if given != supported:
            raise BlendError(f"attention of layer {index}: {name} is {given!r}; supported is {supported!r}")


def _check_table(layer: str, rope: Rope, rotary: Any) -> None:
    cache: torch.Tensor | None = getattr(rotary, "cos_sin_cache", None)
    shape = () if cache is None else tuple(cache.shape)
    if cache is None or len(shape) != 2 or shape[1] != rope.head_dim or not rotary.is_neox_style:
        raise BlendError(
            f"{layer} is rotated by vLLM's {type(rotary).__name__} (table: {shape}, halves: "
            f"{getattr(rotary, 'is_neox_style', None)}); supported are one table [positions, {rope.head_dim}] for "
            "prompts of all lengths, and halves (GPT-NeoX)"
        )
    short, long = rope.frequencies(1), rope.frequencies(1 << 40)
    table = RotaryTable.from_frequencies(long, shape[0], angles=torch.float32)
    ours, theirs = table.cos_sin * table.attention_factor, cache.float().cpu().view(shape[0], 2, -1)  # [P, 2, R / 2]
    angles = torch.outer(torch.arange(shape[0], dtype=torch.float32), long.inverse.float())[:, None]
    rounding = (torch.finfo(cache.dtype).eps + _ANGLE_ERROR * (1 + angles)) * table.attention_factor
    wrong = (ours - theirs).abs() > rounding
    if bool(wrong.any()) or not short.inverse.equal(long.inverse):
        first = int(wrong.any(2).any(1).nonzero()[0]) if bool(wrong.any()) else "none"
        raise BlendError(
            f"{layer} is rotated by vLLM's {type(rotary).__name__} otherwise than its config describes "
            f"({dict(rope.parameters)}): the first position that differs is {first}; supported are ropes that both "
            "understand alike, and that do not depend on the prompt's length"
        )
