"""A real vLLM in this process, and the blender on the very model that it has loaded: what each makes of a prompt.

    echo '{"model": folder, "prompt": [ids], "options": {...}, "changes": [...]}' | python tests/blend/vllm_prefill.py

Prints JSON on the last line: {"refused": message}, or the largest differences and what they are differences of, and
what the adapter says to each of the changes, [path of an attribute, value], to the loaded model.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)


def main(scenario: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from vllm import LLM

    from lmcache.blend.models import adapt
    from lmcache.errors import BlendError, ConfigError

    given: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.3, "seed": 0}
    given |= {"skip_tokenizer_init": True, "max_logprobs": -1, **scenario.get("options", {})}
    llm = LLM(model=scenario["model"], **given)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    try:
        model = adapt(runner.get_model())
    except (BlendError, ConfigError) as error:
        return {"refused": str(error)}
    layers = runner.vllm_config.compilation_config.static_forward_context
    found = {"found": finds(layers, runner.get_model()), "kv_layers": list(model.kv_layers) == list(layers)}
    changed = [refusal(runner.get_model(), path, value) for path, value in scenario.get("changes", [])]
    return {**found, "changed": changed, **compare(llm, runner, model, torch.tensor(scenario["prompt"]))}


def refusal(model: Any, path: str, value: Any) -> str:
    """What adapt says to `model` with that attribute, or key, changed."""
    from lmcache.blend.models import adapt
    from lmcache.errors import BlendError

    *parents, name = path.split(".")
    owner = model
    for parent in parents:
        owner = owner[int(parent)] if parent.isdigit() else getattr(owner, parent)
    attributes = owner if isinstance(owner, dict) else owner.__dict__
    before = attributes[name]
    attributes[name] = value
    try:
        adapt(model)
    except BlendError as error:
        return str(error)
    finally:
        attributes[name] = before
    return ""


def finds(layers: dict[str, Any], model: Any) -> list[bool | str]:
    """What find_model makes of all layers, of all but one, and of all while vLLM hides them."""
    from lmcache.blend.models.vllm import find_model
    from lmcache.errors import BlendError

    def attempt(some: dict[str, Any]) -> bool | str:
        try:
            return find_model(some) is model
        except BlendError as error:
            return str(error)

    hidden = attempt(layers)
    gc.unfreeze()
    return [attempt(layers), attempt(dict(list(layers.items())[1:])), hidden]


def compare(llm: Any, runner: Any, model: Any, tokens: Any) -> dict[str, Any]:
    import torch
    from vllm.forward_context import set_forward_context

    from lmcache.blend.blender import Blender
    from lmcache.blend.models.base import LayerAttention
    from lmcache.blend.reuse import GivenKV

    expected, pages = prefill(llm, runner, tokens)
    shape = (len(tokens), model.kv.heads, model.kv.size)
    nothing = GivenKV([(torch.zeros(shape, dtype=model.kv.dtype),) * 2] * model.num_layers, [])

    def predicted() -> tuple[torch.Tensor, list[Any]]:
        blended = Blender(model, "all").blend(tokens, nothing, all_logits=True)
        return blended.logits.float().log_softmax(-1), blended.layers

    with torch.inference_mode(), set_forward_context(None, runner.vllm_config):  # as a connector is called
        logprobs, kv = predicted()
    sides = [
        (ours - theirs).abs().max()
        for own, page in zip(kv, pages, strict=True)
        for ours, theirs in zip(own, page, strict=True)
    ]
    result = {
        "logprobs": float((logprobs - expected).abs().max()),
        "kv": float(max(sides)),
        "spread": float(expected.std(0).mean()),
        "kv_size": float(max(side.abs().max() for page in pages for side in page)),
        "same_choice": float((logprobs.argmax(-1) == expected.argmax(-1)).float().mean()),
        "windows": [attention.window for attention in model.attention],
    }
    if any(result["windows"]):
        right = model.attention
        model.attention = [LayerAttention(a.scale, a.window and a.window + 1, a.rope) for a in right]
        result["wider_by_one"] = float((predicted()[0] - expected).abs().max())
        model.attention = right
    return result


def prefill(llm: Any, runner: Any, tokens: Any) -> tuple[Any, list[Any]]:
    """vLLM's own log-probabilities `[T, vocabulary]`, and keys and values `[T, H, D]` as its pages hold them."""
    import torch
    from vllm import SamplingParams
    from vllm.forward_context import get_forward_context
    from vllm.inputs import TokensPrompt

    slots: dict[str, torch.Tensor] = {}

    def note(*_: Any) -> None:
        slots.update({name: mapping.clone() for name, mapping in get_forward_context().slot_mapping.items()})

    hook = runner.get_model().register_forward_pre_hook(note)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=tokens.tolist())], params, use_tqdm=False)
    hook.remove()
    rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    logprobs = torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])
    layers = runner.vllm_config.compilation_config.static_forward_context
    return logprobs, [unpacked(layer, slots[name][: len(tokens)]) for name, layer in layers.items()]


def unpacked(layer: Any, slots: Any) -> tuple[Any, Any]:
    import torch

    from lmcache.connector.identity.cpu_isa import cpu_isa
    from lmcache.kernels.copy.cpu_blocks import unpack_cpu_blocks

    cache, size = layer.kv_cache, layer.head_size  # [B, H, N, 2 * D]
    _, heads, block, _ = cache.shape
    ids = (slots // block).unique()
    rows = torch.empty(1, len(ids) * block, heads, 2 * size, dtype=cache.dtype)
    unpack_cpu_blocks(cache[ids][None].contiguous(), size, cpu_isa(layer.dtype, block, size), rows)
    tokens = rows[0, torch.searchsorted(ids, slots // block) * block + slots % block]
    return tokens[..., :size], tokens[..., size:]


if __name__ == "__main__":
    result = main(json.load(sys.stdin))
    print("@@" + json.dumps({"results": result}), flush=True)
