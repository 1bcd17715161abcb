"""Passages blended in real vLLM: what it answers, what it keeps to itself, and what happens when passages are lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Failed, connector
from test_vllm import cached, same
from tiny_models import prompt

Run = Callable[..., Any]
Model = Callable[[str], Path]

SYSTEM, QUESTION = prompt(20, 40), prompt(21, 30)
PASSAGES = [prompt(30, 200), prompt(31, 170), prompt(32, 240)]
ALONE = [SYSTEM + passage for passage in PASSAGES]
MIXED = SYSTEM + PASSAGES[1] + PASSAGES[0] + prompt(22, 9) + PASSAGES[2] + QUESTION
SPANS = [[40, 210], [210, 410], [419, 659]]
REACH = 659
LEARN = {"generate": ALONE, "max_tokens": 1, "kv": [{"lmcache.blend": {"spans": [[40, len(each)]]}} for each in ALONE]}
RESET = {"reset": "vllm"}


def ask(kv: Any = None, tokens: list[int] = MIXED) -> dict[str, Any]:
    return {"generate": [tokens], "max_tokens": 12, "logprobs": 5, "kv": [{"lmcache.blend": kv}]}


BLENDED, EXACT = ask({"spans": SPANS}), ask(False)


def blending(selector: str, disk: Path | None = None, **options: Any) -> dict[str, Any]:
    return connector(disk, blend={"find": "request", "selector": {"type": selector}, **options})


@pytest.fixture(scope="session")
def plain(vllm_run: Run, tiny_model: Model) -> Callable[[str], list[dict[str, Any]]]:
    """What vLLM answers without a cache, by family."""
    known: dict[str, list[dict[str, Any]]] = {}

    def get(family: str) -> list[dict[str, Any]]:
        if family not in known:
            (known[family],) = vllm_run(tiny_model(family), None, [ask()], enable_prefix_caching=False)
        return known[family]

    return get


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_passages_that_are_all_computed_again_give_the_tokens_of_plain_vllm(
    family: str, vllm_run: Run, tiny_model: Model, plain: Run, tmp_path: Path
) -> None:
    model = tiny_model(family)
    _, memory, _, again = vllm_run(model, blending("all", tmp_path), [LEARN, BLENDED, RESET, BLENDED])
    (disk,) = vllm_run(model, blending("all", tmp_path), [BLENDED])
    for outputs in (memory, again, disk):
        assert same(outputs, plain(family))
        assert cached(outputs) == [REACH]


def test_blended_kv_is_nobody_elses(vllm_run: Run, tiny_model: Model, plain: Run, tmp_path: Path) -> None:
    model = tiny_model("llama")
    steps = [LEARN, BLENDED, EXACT, RESET, EXACT, RESET, BLENDED, EXACT, BLENDED]
    _, blended, exact, _, stored, _, hit, last, same_again = vllm_run(model, blending("none", tmp_path), steps)
    assert not same(blended, plain("llama")), "plain reuse must differ, or this test shows nothing"
    assert cached(blended) == [REACH]
    assert same(exact, plain("llama"))
    assert cached(exact) == [128], "the system prompt and the first passage, which were computed as such"
    # Once the prompt was computed in full, all of it is exact, and blending has nothing to do.
    for outputs in (stored, hit, last, same_again):
        assert same(outputs, plain("llama"))
        assert cached(outputs)[0] >= 640
    (after_restart,) = vllm_run(model, blending("none", tmp_path), [EXACT])
    assert same(after_restart, plain("llama"))


def test_the_test_above_sees_blocks_that_are_shared(vllm_run: Run, tiny_model: Model, plain: Run) -> None:
    steps = [{"share_blended": True}, LEARN, BLENDED, EXACT]
    *_, exact = vllm_run(tiny_model("llama"), blending("none"), steps)
    assert not same(exact, plain("llama"))


def test_passages_that_are_lost_midway_are_computed(vllm_run: Run, tiny_model: Model, plain: Run) -> None:
    steps = [LEARN, {"lose_passages": 1}, BLENDED, BLENDED]
    _, _, lost, missed = vllm_run(tiny_model("gemma3"), blending("none"), steps)
    for outputs in (lost, missed):
        assert same(outputs, plain("gemma3"))
    assert cached(lost) == [REACH], "they were there when they were looked up"
    assert cached(missed) == [128]


def test_text_is_found_wherever_it_was_read(vllm_run: Run, tiny_model: Model) -> None:
    # No spans: prompts teach what they are made of, and any part of that is found again at any place.
    kv = connector(blend={"selector": {"type": "none"}})
    other = prompt(40, 57) + PASSAGES[2][13:] + PASSAGES[0][:150] + QUESTION
    _, found, _, unknown = vllm_run(
        tiny_model("llama"),
        kv,
        [{"generate": ALONE, "max_tokens": 1}, ask(True, other), RESET, ask(True, prompt(50, 300))],
    )
    assert cached(found) == [57 + 227 + 150]
    assert cached(unknown) == [0]


def test_separators_end_passages_and_salts_keep_them_apart(vllm_run: Run, tiny_model: Model) -> None:
    mark = [3, 4, 3]
    kv = connector(blend={"find": "separator", "separator": mark, "selector": {"type": "all"}})
    learn = {"generate": [SYSTEM + mark + passage + mark for passage in PASSAGES], "max_tokens": 1}
    asked = {**ask(), "generate": [SYSTEM + mark + PASSAGES[1] + mark + PASSAGES[0] + mark + QUESTION], "kv": None}
    learn["salts"] = ["a"] * 3
    steps = [learn, {**asked, "salts": ["b"]}, {**asked, "salts": ["a"]}]
    _, others, own = vllm_run(tiny_model("llama"), kv, steps)
    assert cached(others) == [0]
    assert same(own, others), "that is what vLLM computes itself"
    assert cached(own) == [40 + 3 + 170 + 3 + 200]


def test_many_blended_requests_share_one_engine(vllm_run: Run, tiny_model: Model) -> None:
    # Few blocks: some are preempted and blended again.
    mixed = {"generate": [MIXED] * 4, "max_tokens": 90, "logprobs": 5, "kv": [BLENDED["kv"][0]] * 4}
    options = {"num_gpu_blocks_override": 18, "max_num_seqs": 4, "max_model_len": 1024}
    exact = {**EXACT, "max_tokens": 90, "salts": ["other"]}
    _, outputs, preemptions, expected = vllm_run(
        tiny_model("llama"), blending("all"), [LEARN, mixed, {"preemptions": True}, exact], **options
    )
    assert cached(expected) == [0]
    assert preemptions > 0
    for output in outputs:
        assert same([output], expected)


def test_what_cannot_be_blended_is_refused_at_start(vllm_run: Run, tiny_model: Model) -> None:
    with pytest.raises(Failed, match="DeepseekV2ForCausalLM"):
        vllm_run(tiny_model("deepseek"), connector(blend={}), [ask()], attention_backend="CPU_MLA")
