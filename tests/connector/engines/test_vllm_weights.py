"""Real vLLM whose weights change while it runs: KV is that of the weights that compute, or computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import connector
from tiny_models import prompt

Run = Callable[..., Any]
Model = Callable[..., Path]

ASK = {"generate": [prompt(1, 700), prompt(2, 640)], "max_tokens": 12}
FORGET = {"reset": "vllm"}  # vLLM's own cache; ours stays
# All of a model, and as little of it as one row of one matrix.
SCALE = "[parameter.data.mul_(1.5) for parameter in model.parameters()]"
ROW = f"model.model.embed_tokens.weight.data[{prompt(1, 700)[5]}].mul_(-3)"


def tokens(outputs: list[dict[str, Any]]) -> list[list[int]]:
    return [out["tokens"] for out in outputs]


def cached(outputs: list[dict[str, Any]]) -> list[int]:
    return [out["cached"] for out in outputs]


@pytest.fixture(scope="module")
def plain(vllm_run: Run, tiny_model: Model) -> dict[str, list[list[int]]]:
    """What vLLM alone answers: with the first weights, after each change of them, and with the second."""
    first, second = tiny_model("llama"), tiny_model("llama", 1)
    back = {"reload": str(first)}
    steps: list[Any] = [ASK, {"apply": ROW}, ASK, back, {"apply": SCALE}, ASK, {"reload": str(second)}, ASK]
    out = vllm_run(first, None, steps, enable_prefix_caching=False)
    return {name: tokens(out[at]) for name, at in (("first", 0), ("row", 2), ("scaled", 5), ("second", 7))}


def test_the_weights_here_answer_differently(plain: dict[str, list[list[int]]]) -> None:
    answers = [plain[name][0] for name in ("first", "row", "scaled", "second")]
    assert len({tuple(answer) for answer in answers}) == 4


def test_weights_that_are_changed_in_place_have_kv_of_their_own(
    vllm_run: Run, tiny_model: Model, plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    first, second = tiny_model("llama"), tiny_model("llama", 1)
    kv = connector(tmp_path)
    (dummy,) = vllm_run(first, kv, [ASK], load_format="dummy")
    assert tokens(dummy) != plain["first"]
    steps: list[Any] = [
        *(ASK, FORGET, ASK),  # 0 2
        *({"reload": str(second)}, {"reset": "all"}, ASK, FORGET, ASK),  # 5 7
        *({"reload": str(first)}, FORGET, ASK),  # 10: no reset of ours, and they are the first again
        *({"apply": ROW}, FORGET, ASK, FORGET, ASK),  # 13 15: one row
        *({"reload": str(first)}, {"apply": SCALE}, FORGET, ASK),  # 19
        *({"call": "get_model_inspection"}, {"call": "get_model"}, FORGET, ASK),  # 23: calls that change nothing
    ]
    out = vllm_run(first, kv, steps)
    expected = {0: "first", 2: "first", 5: "second", 7: "second", 10: "first", 13: "row", 15: "row"}
    for at, name in {**expected, 19: "scaled", 23: "scaled"}.items():
        assert tokens(out[at]) == plain[name], at
    for at in (0, 5, 13, 19):
        assert cached(out[at])[0] == 0, at
    for at in (2, 7, 10, 15, 23):
        assert min(cached(out[at])) >= 512, at
    # A new process finds what belongs to its weights, whichever they are at the time, and nothing of the others.
    steps = [ASK, {"reload": str(second)}, FORGET, ASK]
    out = vllm_run(first, kv, steps)
    for at, name in ((0, "first"), (3, "second")):
        assert tokens(out[at]) == plain[name]
        assert min(cached(out[at])) >= 512


def test_the_same_under_vllms_built_in_name(
    vllm_run: Run, tiny_model: Model, plain: dict[str, list[list[int]]]
) -> None:
    kv = connector(name="LMCacheConnectorV1")
    steps: list[Any] = [
        *(ASK, {"reload": str(tiny_model("llama", 1))}, FORGET, ASK),  # 3
        *({"reset": "all"}, ASK),  # 5: the wrapper passes it on
    ]
    out = vllm_run(tiny_model("llama"), kv, steps)
    assert [tokens(out[at]) for at in (0, 3, 5)] == [plain["first"], plain["second"], plain["second"]]
    assert cached(out[3]) == cached(out[5]) == [0, 0]
    assert out[4] is True


def test_what_vllm_still_has_of_other_weights_is_not_stored(
    vllm_run: Run, tiny_model: Model, plain: dict[str, list[list[int]]]
) -> None:
    steps: list[Any] = [
        # Nobody resets anything: vLLM goes on with blocks of the old weights, and answers as it likes.
        *(ASK, {"apply": SCALE}, ASK, ASK),
        # What came of that is nobody's: neither the first weights' nor the scaled ones'.
        *({"reload": str(tiny_model("llama"))}, FORGET, ASK),  # 6
        *({"apply": SCALE}, FORGET, ASK),  # 9
    ]
    out = vllm_run(tiny_model("llama"), connector(), steps)
    assert tokens(out[6]) == plain["first"]
    assert tokens(out[9]) == plain["scaled"]
    assert tokens(out[2]) != plain["scaled"], "vLLM itself mixed them, so this test has seen what it is about"


def test_what_is_changed_behind_vllms_back_is_seen(vllm_run: Run, tiny_model: Model) -> None:
    steps: list[Any] = [ASK, FORGET, {"touch": SCALE}, ASK]
    out = vllm_run(tiny_model("llama"), connector(), steps)
    assert cached(out[3]) == [0, 0]


def test_a_reset_and_a_sleep_leave_shared_tiers_alone(vllm_run: Run, tiny_model: Model, tmp_path: Path) -> None:
    steps: list[Any] = [ASK, {"reset": "all"}, ASK, {"sleep": 1}, {"wake": True}, ASK]
    out = vllm_run(tiny_model("llama"), connector(tmp_path), steps)
    assert out[1] is True
    assert tokens(out[0]) == tokens(out[2]) == tokens(out[5])
    assert min(cached(out[2])) >= 512
    assert min(cached(out[5])) >= 512
