"""Adapters of vLLM's models: against what real vLLM predicts and holds in its pages, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import torch
from harness import drive

from lmcache.blend.models.vllm import find_model
from lmcache.errors import BlendError

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
SIZES = {"hidden_size": 128, "head_dim": 32}  # smaller heads vLLM does not run on a CPU
PROMPT = tiny.prompt(300).tolist()
# Every rope that vLLM and we understand alike, in some family; gemma3 has a linear one.
ROPES = {
    "llama": tiny.ROPES["llama3"],
    "qwen3": {**tiny.ROPES["yarn"], "original_max_position_embeddings": 128},
}
LAYER = "model.layers.1.self_attn"
# [what of the loaded model is changed, to what, what the adapter then says]
CHANGES: dict[str, list[tuple[str, Any, str]]] = {
    "llama": [
        (f"{LAYER}.attn.has_sink", True, "attention of layer 1: has_sink is True; supported is False"),
        (f"{LAYER}.attn.attn_type", "encoder_only", "attn_type is 'encoder_only'; supported is 'decoder'"),
        (f"{LAYER}.attn.impl.alibi_slopes", [0.5], "alibi_slopes is [0.5]"),
        (f"{LAYER}.attn.impl.logits_soft_cap", 30.0, "logits_soft_cap is 30.0"),
        (f"{LAYER}.attn.kv_sharing_target_layer_name", "model.layers.0.self_attn.attn", "kv_sharing_target"),
        (f"{LAYER}.attn.layer_name", "language_model.model.layers.1.self_attn.attn", "its name is 'language_model."),
        (f"{LAYER}.attn.use_mm_prefix", True, "use_mm_prefix is True"),
        (f"{LAYER}.attn.head_size_v", 64, "head_size is (32, 64)"),
        (f"{LAYER}.total_num_heads", 8, "heads of this worker is 4; supported is 8"),
        (f"{LAYER}.qkv_proj.quant_method", "packed", "self_attn.qkv_proj has weights for str"),
        (f"{LAYER}.rotary_emb.is_neox_style", False, "halves: False"),
        ("config.rope_parameters.factor", 8.01, "the first position that differs is "),
        ("config.rope_parameters.rope_theta", 501000.0, "the first position that differs is "),
        ("config.rope_parameters.rope_type", "spiral", "rope_type is 'spiral'"),
    ],
    "mistral": [
        (f"{LAYER}.do_llama_4_scaling", True, "do_llama_4_scaling is True"),
        ("model.layers.1.ada_rms_norm_t_cond", True, "model.layers.1 takes more than tokens"),
    ],
    "qwen2": [(f"{LAYER}.qk_norm", True, "qk_norm is True")],
    "qwen3": [
        (f"{LAYER}.dual_chunk_attention_config", {"chunk_size": 8}, "dual_chunk_attention_config"),
        ("config.rope_parameters.factor", 4.5, "the first position that differs is 0"),
    ],
}


@pytest.fixture(scope="module")
def vllm_prefill(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What vllm_prefill.py prints of a tiny model, by the options of its config and of vLLM."""

    def run(config: Any, changes: Any = (), **options: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("model")
        tiny.build(config).save_pretrained(folder)
        scenario = {"model": str(folder), "prompt": PROMPT, "options": options, "changes": changes}
        result: dict[str, Any] = drive(HERE / "vllm_prefill.py", scenario, ENVIRONMENT, folder / "log")
        return result

    return run


def config(family: str, **options: Any) -> Any:
    if family == "qwen2":  # vLLM has a window on all layers of it or on none
        options = {"layer_types": None, "max_window_layers": 0, **options}
    return tiny.config(family, **{**SIZES, **options})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_loaded_model_predicts_and_keeps_what_vllm_does(family: str, vllm_prefill: Callable[..., Any]) -> None:
    """Slow, the first one: vLLM is imported into the process that the others are forked from."""
    rope = {"rope_parameters": dict(ROPES[family])} if family in ROPES else {}
    changes = CHANGES.get(family, [])
    result = vllm_prefill(config(family, **rope), [change[:2] for change in changes])
    assert result["logprobs"] < 1e-3
    assert result["kv"] < 1e-3
    assert result["spread"] > 0.5, "predictions depend on the prompt"
    assert result["kv_size"] > 1
    window = {"mistral": [19] * 4, "qwen2": [23] * 4, "gemma3": [17, None] * 2}.get(family, [None] * 4)
    assert result["windows"] == window
    assert result.get("wider_by_one", 1.0) > 0.1, "and the comparison sees a window that is wrong by one"
    assert result["kv_layers"]
    assert result["found"][0] is True
    assert all("0 models in this process" in other for other in result["found"][1:])
    for said, (path, _, message) in zip(result["changed"], changes, strict=True):
        assert message in said, path


@pytest.mark.skipif("LMCACHE_SLOW_TESTS" not in os.environ, reason="compiles for a minute; LMCACHE_SLOW_TESTS=1")
def test_models_that_vllm_has_compiled_can_be_called_module_by_module(vllm_prefill: Callable[..., Any]) -> None:
    result = vllm_prefill(config("llama"), enforce_eager=False)
    assert result["logprobs"] < 1e-3
    assert result["kv"] < 1e-3


@pytest.mark.parametrize(
    ("options", "vllm", "message"),
    [
        ({}, {"kv_cache_dtype": "fp8"}, "dtype of its KV is torch.uint8; supported is torch.float32"),
        ({}, {"enable_lora": True}, "no LoRA"),
        (
            {"rope_parameters": tiny.ROPES["dynamic"], "max_position_embeddings": tiny.ORIGINAL},
            {},
            "the prompt's length",
        ),
        (
            {"rope_parameters": {**tiny.ROPES["longrope"], "short_factor": [1.0] * 16, "long_factor": [3.0] * 16}},
            {},
            "Phi3LongRoPEScaledRotaryEmbedding",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(
    options: dict[str, Any], vllm: dict[str, Any], message: str, vllm_prefill: Callable[..., Any]
) -> None:
    assert message in vllm_prefill(config("llama", **options), **vllm)["refused"]


def test_looking_for_models_does_not_import_vllm() -> None:
    code = "import sys; from lmcache.blend.models import BLEND_MODELS as known; known.get('vllm.LlamaForCausalLM'); "
    code += "assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_the_outermost_module_with_just_these_layers_is_the_model() -> None:
    layers = {str(index): torch.nn.Bilinear(2, 2, 2) for index in range(3)}
    decoder = torch.nn.Sequential(torch.nn.ModuleList(layers.values()))
    assert find_model(layers) is decoder
    whole = torch.nn.Sequential(decoder, torch.nn.Linear(2, 2))
    assert find_model(layers) is whole
    other = torch.nn.Sequential(decoder)
    with pytest.raises(BlendError, match="2 models in this process have just the 3 attention layers"):
        find_model(layers)
    del other
    assert find_model(layers) is whole
    with pytest.raises(BlendError, match="0 models"):
        find_model(dict(list(layers.items())[:2]))
