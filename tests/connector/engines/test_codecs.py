"""Packed chunks in real vLLM: the text stays what it was, and no engine reads another codec's chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Failed, connector
from tiny_models import prompt

Run = Callable[..., Any]
Model = Callable[[str], Path]

# 700 tokens: five whole blocks of vLLM's 128 and a rest.
PROMPTS = [prompt(1, 700), prompt(2, 600)]
ASK = {"generate": PROMPTS, "max_tokens": 1, "logprobs": 1024}  # the whole vocabulary


def divergences(outputs: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[float]:
    """KL, in nats, of the first token's distribution in each answer."""
    found = []
    for out, other in zip(outputs, expected, strict=True):
        p, q = other["logprobs"][0], out["logprobs"][0]
        found.append(sum(math.exp(p[t]) * (p[t] - q[t]) for t in p.keys() & q.keys()))
    return found


def cached(outputs: list[dict[str, Any]]) -> list[int]:
    return [out["cached"] for out in outputs]


@pytest.mark.parametrize(
    ("family", "options", "bound"),
    [
        ("llama", {}, 0.01),
        ("llama", {"dtype": "bfloat16"}, 0.05),  # another order inside the blocks where the processor has AMX
        ("qwen3", {}, 0.01),
        ("gemma3", {}, 0.01),
        ("deepseek", {"attention_backend": "CPU_MLA"}, 0.01),  # AMX_MLA takes no float32
    ],
)
def test_int8_is_near_what_was_computed(
    family: str, options: dict[str, Any], bound: float, vllm_run: Run, tiny_model: Model, tmp_path: Path
) -> None:
    model, kv, options = tiny_model(family), connector(tmp_path, codec="int8"), {**options, "max_logprobs": 1024}
    computed, _, warm = vllm_run(model, kv, [ASK, {"reset": "vllm"}, ASK], **options)
    # What another prompt's KV would do to these answers is ten times as much or more.
    another = min(divergences(computed, computed[::-1]))
    assert cached(computed) == [0, 0]
    assert cached(warm)[0] >= 640
    assert max(divergences(warm, computed)) < bound < 0.1 * another
    if family in ("llama", "gemma3"):
        (disk,) = vllm_run(model, kv, [ASK], **options)
        assert cached(disk) == cached(warm)
        assert max(divergences(disk, computed)) < bound


def test_every_codec_reads_real_text_and_none_reads_anothers_chunks(vllm_run: Run, tmp_path: Path) -> None:
    """Slow: a real model answers once for each codec, over one shared folder."""
    from transformers import AutoTokenizer

    from experiments.framework.model import smollm2

    model = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [file.read_text() for file in sorted((ROOT / "data" / "documents").glob("*.txt"))[:2]]
    ask = {**ASK, "logprobs": 200, "generate": [tokenizer(text)["input_ids"][:900] for text in texts]}
    found = {}
    for codec, bound in {"raw": 1e-5, "int8": 0.001, "fp8": 0.02, "rotated": 0.05, "int4": 0.05}.items():
        cold, _, warm = vllm_run(
            model, connector(tmp_path, codec=codec), [ask, {"reset": "vllm"}, ask], max_logprobs=200
        )
        assert cached(cold) == [0, 0], f"{codec} read what another codec had written to the same folder"
        assert cached(warm) == [896, 896]
        found[codec] = max(divergences(warm, cold))
        assert abs(found[codec]) < bound, found
        if codec in ("raw", "int8"):
            assert [out["tokens"] for out in warm] == [out["tokens"] for out in cold]
    assert found["raw"] < found["int8"] < min(found["fp8"], found["rotated"], found["int4"]), found


def test_a_codec_that_cannot_work_is_a_clear_error_at_start(vllm_run: Run, tiny_model: Model) -> None:
    with pytest.raises(Failed, match="unknown codec 'int5'; known: raw"):
        vllm_run(tiny_model("llama"), connector(codec="int5"), [ASK])
    with pytest.raises(Failed, match="codec klt needs profile"):
        vllm_run(tiny_model("llama"), connector(codec="klt"), [ASK])
