"""Models that can be blended, by package and architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmcache.blend.models.base import BlendModel
from lmcache.registry import Registry

_HUGGING_FACE = "lmcache.blend.models.huggingface"
_VLLM = "lmcache.blend.models.vllm"
BLEND_MODELS: Registry[Callable[[torch.nn.Module], BlendModel]] = Registry(
    "model to blend",
    {
        "transformers.LlamaForCausalLM": f"{_HUGGING_FACE}:Llama",
        "transformers.MistralForCausalLM": f"{_HUGGING_FACE}:Mistral",
        "transformers.Qwen2ForCausalLM": f"{_HUGGING_FACE}:Qwen2",
        "transformers.Qwen3ForCausalLM": f"{_HUGGING_FACE}:Qwen3",
        "transformers.Gemma3ForCausalLM": f"{_HUGGING_FACE}:Gemma3",
        "vllm.LlamaForCausalLM": f"{_VLLM}:Llama",
        "vllm.MistralForCausalLM": f"{_VLLM}:Mistral",
        "vllm.Qwen2ForCausalLM": f"{_VLLM}:Qwen2",
        "vllm.Qwen3ForCausalLM": f"{_VLLM}:Qwen3",
        "vllm.Gemma3ForCausalLM": f"{_VLLM}:Gemma3",
    },
    "lmcache.blend_models",
)


def adapt(model: torch.nn.Module) -> BlendModel:
    """What the blender needs of `model`. ConfigError names the architectures that are supported."""
    kind = type(model)
    return BLEND_MODELS.get(f"{kind.__module__.split('.')[0]}.{kind.__name__}")(model)
