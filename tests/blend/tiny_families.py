"""Small models of every family that can be blended, and what Hugging Face itself computes with them."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

VOCABULARY = 97
ORIGINAL = 48  # positions before the ropes of LONG were scaled: prompts in tests are longer
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_FACTORS = [1.0 + 0.1 * i for i in range(8)]
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": _FACTORS,
        "long_factor": [3 * f for f in _FACTORS],
        "original_max_position_embeddings": ORIGINAL,
    },
}
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def config(family: str, **options: Any) -> Any:
    import transformers

    given: dict[str, Any] = {
        "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "mistral": {"sliding_window": 19},
        "qwen2": {"use_sliding_window": True, "sliding_window": 23, "layer_types": LAYER_TYPES},
        "qwen3": {"head_dim": 32},
        "gemma3": {
            "head_dim": 32,
            "sliding_window": 17,
            "layer_types": LAYER_TYPES,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 20.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
    }[family]
    name = {"gemma3": "Gemma3Text"}.get(family, family.capitalize())
    return getattr(transformers, f"{name}Config")(**{**COMMON, **given, **options})


@functools.cache
def model(family: str, rope: str | None = None) -> Any:
    """A model of that family, in fp32; with one of ROPES if named."""
    options = {}
    if rope is not None:
        options = {"rope_parameters": dict(ROPES[rope])}
        if rope == "dynamic":
            options["max_position_embeddings"] = ORIGINAL
    return build(config(family, **options))


def build(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide that they are not applied
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return made


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


KV = list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor, start: int = 0) -> tuple[torch.Tensor, KV]:
    """Logits [T, vocabulary] and KV [T, H, D] of each layer of tokens at positions start .., by Hugging Face."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config: keeps what windows no longer see
    positions = torch.arange(start, start + len(tokens))[None]
    logits = model(tokens[None], position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
    return logits, [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


def noise(like: KV, seed: int = 0, scale: float = 1.0) -> KV:
    """Finite nonsense of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(s.shape, generator=generator).mul_(scale).to(s.dtype) for s in sides) for sides in like]  # type: ignore[misc]


def spliced(first: KV, rest: KV, count: int) -> KV:
    """The first `count` tokens of one KV, the others of the second."""
    return [
        tuple(torch.cat([a[:count], b[count:]]) for a, b in zip(one, two, strict=True))  # type: ignore[misc]
        for one, two in zip(first, rest, strict=True)
    ]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def entropy_is_real(logits: torch.Tensor) -> bool:
    """Whether predictions depend on anything: logits that are all alike would make every comparison pass."""
    return bool(logits.std(0).mean() > 0.1) and math.isfinite(float(logits.sum()))
