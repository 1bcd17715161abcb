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
OTHER = {"generate": [prompt(3, 700)], "max_tokens": 12}
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
    """What vLLM alone answers: with the first weights, with the second, and with the first after each change."""
    first, second = tiny_model("llama"), tiny_model("llama", 1)
    steps: list[Any] = [ASK, {"apply": ROW}, ASK, {"apply": SCALE}, ASK, {"reload": str(second)}, ASK]
    out = vllm_run(first, None, steps, enable_prefix_caching=False)
    return {name: tokens(out[at]) for name, at in (("first", 0), ("row", 2), ("scaled", 4), ("second", 6))}


def test_the_weights_here_answer_differently(plain: dict[str, list[list[int]]]) -> None:
    answers = [plain[name][0] for name in ("first", "row", "scaled", "second")]
    assert len({tuple(answer) for answer in answers}) == 4


@pytest.mark.parametrize("name", ["LMCacheConnector", "LMCacheConnectorV1"])
def test_weights_that_are_changed_in_place_have_kv_of_their_own(
    name: str, vllm_run: Run, tiny_model: Model, plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    first, second = tiny_model("llama"), tiny_model("llama", 1)
    kv = connector(tmp_path, name=name)
    steps: list[Any] = [
        *(ASK, FORGET, ASK),  # 0 2
        *({"reload": str(second)}, {"reset": "all"}, ASK, FORGET, ASK),  # 5 7
        *({"reload": str(first)}, FORGET, ASK),  # 10: no reset of ours, and they are the first again
        *({"apply": ROW}, FORGET, ASK, FORGET, ASK),  # 13 15: one row
        *({"apply": SCALE}, FORGET, ASK),  # 18
        *({"call": "get_model_inspection"}, FORGET, ASK),  # 21: a call that changes nothing
    ]
    out = vllm_run(first, kv, steps)
    assert [tokens(out[at]) for at in (0, 2, 5, 7, 10)] == [
        plain["first"],
        plain["first"],
        plain["second"],
        plain["second"],
        plain["first"],
    ]
    assert [tokens(out[at]) for at in (13, 15, 18, 21)] == [
        plain["row"],
        plain["row"],
        plain["scaled"],
        plain["scaled"],
    ]
    for at in (0, 5, 13, 18):
        assert cached(out[at]) == [0, 0], at
    for at in (2, 7, 10, 15, 21):
        assert min(cached(out[at])) >= 512, at
    # A new process finds what belongs to its weights, and nothing of the others.
    for model, answer in ((first, "first"), (second, "second")):
        (again,) = vllm_run(model, kv, [ASK])
        assert tokens(again) == plain[answer]
        assert min(cached(again)) >= 512


def test_what_vllm_still_has_of_other_weights_is_not_stored(
    vllm_run: Run, tiny_model: Model, plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    first, kv = tiny_model("llama"), connector(tmp_path)
    # Nobody resets anything: vLLM goes on with blocks of the old weights, and answers as it likes.
    vllm_run(first, kv, [ASK, {"apply": SCALE}, ASK, ASK])
    # What came of that must be nobody's: neither the first weights' nor the scaled ones'.
    again, _, scaled = vllm_run(first, kv, [ASK, {"apply": SCALE}, ASK])[:3]
    fresh = vllm_run(first, kv, [{"apply": SCALE}, ASK])[1]
    assert tokens(again) == plain["first"]
    assert tokens(fresh) == tokens_of_scaled(vllm_run, first)
    assert scaled


def tokens_of_scaled(vllm_run: Run, model: Path) -> list[list[int]]:
    _, out = vllm_run(model, None, [{"apply": SCALE}, ASK], enable_prefix_caching=False)
    return tokens(out)


def test_what_is_changed_behind_vllms_back_is_seen(vllm_run: Run, tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    counted = "model.model.embed_tokens.weight.requires_grad_(False)[0].mul_(2)"  # torch counts it
    uncounted = "[parameter.data.mul_(1.5) for parameter in model.parameters()]"
    steps: list[Any] = [ASK, FORGET, {"touch": counted}, ASK, FORGET, {"touch": uncounted}, ASK]
    out = vllm_run(model, connector(tmp_path), steps)
    assert cached(out[3]) == cached(out[6]) == [0, 0]


def test_dummy_weights_share_nothing_with_real_ones(
    vllm_run: Run, tiny_model: Model, plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    model, kv = tiny_model("llama"), connector(tmp_path)
    (dummy,) = vllm_run(model, kv, [ASK], load_format="dummy")
    (real,) = vllm_run(model, kv, [ASK])
    assert cached(real) == [0, 0]
    assert tokens(real) == plain["first"] != tokens(dummy)


@pytest.mark.parametrize("name", ["LMCacheConnector", "LMCacheConnectorV1"])
def test_a_reset_forgets_memory_and_leaves_shared_tiers_alone(
    name: str, vllm_run: Run, tiny_model: Model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    steps: list[Any] = [ASK, {"reset": "all"}, ASK]
    _, done, memory_only = vllm_run(model, connector(name=name), steps)
    assert done is True
    assert cached(memory_only) == [0, 0]
    _, _, from_disk = vllm_run(model, connector(tmp_path / "kept", name=name), steps)
    assert min(cached(from_disk)) >= 512
