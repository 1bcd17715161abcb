"""Weights by name: equal content, one name; anything else, another; and what a look sees."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmcache.connector.identity import calls, packed_weights
from lmcache.connector.identity.weights import TURNS, Weights, models_of, tensor_digest
from lmcache.connector.identity.weights_in_use import WeightsInUse


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kv_cache = torch.zeros(4)
        self.absorbed = torch.ones(8, 8)
        self.scale = 1.0
        self.register_buffer("k_scale", torch.ones(1))


class Tiny(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(100, 16)
        self.up = torch.nn.Linear(16, 63, bias=False)
        self.attn = Attention()
        self.register_buffer("table", torch.arange(30.0), persistent=False)
        torch.nn.init.normal_(self.up.weight)


def watched(seed: int = 0) -> tuple[Tiny, Weights]:
    model = Tiny(seed)
    return model, Weights({"attn": model.attn})


def test_equal_weights_have_one_name_and_others_another() -> None:
    names = [watched(seed)[1].name for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert names[0] is not None
    assert len(names[0]) == 32


CHANGES: dict[str, Callable[[Tiny], object]] = {
    "a row of a matrix": lambda m: m.embed.weight.data[3].mul_(2),
    "one element": lambda m: m.up.weight.data.view(-1)[77:78].add_(1),
    "a buffer": lambda m: m.table.add_(1),
    "a scale": lambda m: m.attn.k_scale.mul_(2),
    "what attention derives": lambda m: m.attn.absorbed.mul_(2),
    "a number of attention": lambda m: setattr(m.attn, "scale", 0.5),
    "two elements that trade places": lambda m: m.up.weight.data[0].copy_(m.up.weight.data[0].flip(0)),
    "another parameter": lambda m: setattr(m.up, "weight", torch.nn.Parameter(torch.zeros(63, 16))),
    "a shape": lambda m: setattr(m.up, "weight", torch.nn.Parameter(m.up.weight.data.view(16, 63))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_gives_another_name(change: str) -> None:
    model, weights = watched()
    before = weights.name
    renamed: list[str | None] = []
    CHANGES[change](model)
    weights.doubt()
    assert weights.in_doubt
    weights.settle(renamed.append)
    assert not weights.in_doubt
    assert weights.name != before
    assert renamed == [weights.name]


def test_the_kv_cache_is_not_a_weight() -> None:
    model, weights = watched()
    before = weights.name
    model.attn.kv_cache = torch.ones(400)
    weights.doubt()
    weights.settle()
    assert weights.name == before


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [p.data.mul_(1.01) for p in m.parameters()],  # torch counts none of these
        lambda m: m.up.weight.data.mul_(1.01),
        lambda m: m.table.zero_(),
    ],
)
def test_a_look_sees_a_change_that_nobody_tells_of(change: Callable[[Tiny], object]) -> None:
    model, weights = watched()
    weights.look()
    assert not weights.noticed()
    change(model)
    weights.look()
    assert weights.noticed()
    assert weights.in_doubt
    assert not weights.hold()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.up, "weight", torch.nn.Parameter(m.up.weight.data.clone())),
        lambda m: setattr(m.up.weight, "data", m.up.weight.data.clone()),
        lambda m: m.attn.__dict__.update(scale=2.0),
        lambda m: m.up.weight.requires_grad_(False)[5, 7:8].mul_(2),  # one element, and torch counts it
    ],
)
def test_what_is_replaced_or_counted_is_seen_within_some_looks(change: Callable[[Tiny], object]) -> None:
    model, weights = watched()
    change(model)
    for _ in range(TURNS):
        weights.look()
    assert weights.in_doubt


def test_looks_that_see_nothing_leave_the_name_alone() -> None:
    _, weights = watched()
    token = weights.token
    for _ in range(40):
        weights.look()
    assert weights.hold()
    assert weights.token == token


def test_a_doubt_without_a_change_keeps_the_name_and_not_the_token() -> None:
    _, weights = watched()
    name, token = weights.name, weights.token
    weights.doubt()
    weights.settle(lambda name: pytest.fail("nothing changed"))
    assert weights.name == name
    assert weights.token != token


def test_a_doubt_lets_go_of_memory_that_may_be_freed() -> None:
    model, weights = watched()
    memory = weakref.ref(model.up.weight)
    model.up.weight = torch.nn.Parameter(torch.zeros(63, 16))
    weights.doubt()
    weights.look()
    assert memory() is None


def test_what_cannot_be_read_has_no_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(tensor: torch.Tensor) -> bytes:
        raise RuntimeError("no storage")

    _, weights = watched()
    monkeypatch.setattr("lmcache.connector.identity.weights.tensor_digest", broken)
    in_use = WeightsInUse(weights)
    renamed: list[str | None] = []
    weights.doubt()
    in_use.settle(5, renamed.append)
    assert renamed == [None]
    assert in_use.tags(()) is None
    assert "nothing is cached" in caplog.text
    monkeypatch.undo()
    weights.doubt()
    in_use.settle(6, renamed.append)
    assert in_use.tags(()) == {}
    in_use.close()


def test_a_layer_of_no_model_is_an_error_and_a_draft_model_counts() -> None:
    with pytest.raises(ValueError, match="no model in this process holds layer lost"):
        models_of({"lost": Attention()})
    target, draft = Tiny(0), Tiny(1)
    both = {"target": target.attn, "draft": draft.attn}
    assert models_of(both) == [target, draft]
    name = Weights(both).name
    draft.up.weight.data[0, 0] += 1
    assert Weights(both).name != name


def test_a_model_that_was_loaded_anew_is_read_anew() -> None:
    old, new = Tiny(0), Tiny(1)
    layers = {"attn": old.attn}
    weights = Weights(layers)
    layers["attn"] = new.attn
    weights.doubt()
    weights.settle()
    assert weights.name == Weights({"attn": new.attn}).name
    assert old is not new


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.ones(1, dtype=torch.bfloat16),
        torch.ones(3, 5, dtype=torch.uint8),
        torch.rand(100, 63).t(),
        torch.rand(100, 64)[:, ::2],
        torch.rand(8)[None].expand(4, 8),
    ],
)
def test_every_tensor_has_a_digest_and_an_element_changes_it(tensor: torch.Tensor) -> None:
    first = tensor_digest(tensor)
    assert first == tensor_digest(tensor)
    if tensor.numel():
        other = tensor.clone(memory_format=torch.preserve_format)
        other.view(-1)[-1:].add_(1) if other.is_contiguous() else other.select(0, 0).add_(1)
        assert tensor_digest(other) != first


# ---- weights that oneDNN has packed


class CPUDNNLGEMMHandler:
    """As vLLM's: nothing can be read of it."""


def test_a_packed_weight_is_known_by_what_it_held() -> None:
    make = packed_weights._noting(lambda weight, *rest: CPUDNNLGEMMHandler())
    weight = torch.rand(64, 48)
    first, second, other = make(weight.t(), 32), make(weight.clone().t(), 32), make((weight + 1).t(), 32)
    assert packed_weights.packed_digest(first) == packed_weights.packed_digest(second)
    assert packed_weights.packed_digest(first) != packed_weights.packed_digest(other)
    assert packed_weights.packed_digest(weight) is None


def test_a_weight_that_was_packed_unseen_is_itself_and_nobody_elses(caplog: pytest.LogCaptureFixture) -> None:
    first, second = CPUDNNLGEMMHandler(), CPUDNNLGEMMHandler()
    names = [packed_weights.packed_digest(each) for each in (first, first, second)]
    assert names[0] == names[1] != names[2]
    assert "its plugin" in caplog.text


def test_packed_weights_are_found_behind_a_layer() -> None:
    model, weights = watched()
    before = weights.name
    make = packed_weights._noting(lambda weight, *rest: CPUDNNLGEMMHandler())

    def pack(weight: torch.Tensor) -> Any:
        handler = make(weight)
        return lambda x: (handler, x)

    vars(model.up)["cpu_linear"] = pack(torch.ones(4, 4))
    weights.doubt()
    weights.settle()
    ones = weights.name
    vars(model.up)["cpu_linear"] = pack(torch.zeros(4, 4))
    for _ in range(TURNS):
        weights.look()
    assert weights.in_doubt
    weights.settle()
    assert len({before, ones, weights.name}) == 3


# ---- what vLLM calls


def called(in_use: WeightsInUse, *methods: str) -> None:
    for method in methods:
        calls._tell(method)


def test_calls_that_are_no_steps_are_doubted_and_the_next_step_settles() -> None:
    model, weights = watched()
    in_use, renamed = WeightsInUse(weights), list[str | None]()
    assert not in_use.in_doubt()
    for method in ("apply_model", "reload_weights", "wake_up", "anything", ""):
        called(in_use, method)
        assert in_use.in_doubt(), method
        in_use.settle(1, renamed.append)
        assert not in_use.in_doubt()
    called(in_use, *calls.HARMLESS)
    assert not in_use.in_doubt()
    assert not renamed
    called(in_use, "apply_model")
    model.up.weight.data.zero_()
    in_use.settle(7, renamed.append)
    assert renamed == [in_use.name]
    in_use.close()
    called(in_use, "apply_model")
    assert not in_use.in_doubt()


def test_what_was_begun_before_a_change_is_not_of_these_weights() -> None:
    model, weights = watched()
    in_use = WeightsInUse(weights)
    model.up.weight.data.zero_()
    in_use.settle(7, lambda name: None)
    assert not in_use.computed(6, images=False)
    assert in_use.computed(7, images=False)
    in_use.close()


def test_images_are_of_the_old_encoder_until_vllm_has_forgotten_them() -> None:
    model, weights = watched()
    in_use = WeightsInUse(weights)
    called(in_use, "apply_model")
    model.up.weight.data.zero_()
    in_use.settle(7, lambda name: None)
    assert not in_use.computed(8, images=True)
    called(in_use, "reset_encoder_cache")
    assert in_use.computed(8, images=True)
    called(in_use, "reload_weights")  # forgets them itself
    model.up.weight.data.add_(1)
    in_use.settle(9, lambda name: None)
    assert in_use.computed(9, images=True)
    in_use.close()


def test_several_workers_name_their_weights_together() -> None:
    made = [WeightsInUse(watched(seed)[1], rank, 2) for rank, seed in enumerate((0, 1))]
    tokens = [in_use.token for in_use in made]
    first = made[0].tags(tokens)
    assert first == made[1].tags(tokens)
    assert first is not None
    assert set(first) == {"weights"}
    assert made[0].tags(()) is None
    other = [tokens[0], "x#1"]
    assert made[0].tags(other) != first
    assert made[1].tags(other) is None  # that is not what this worker has
    for in_use in made:
        in_use.close()


def test_every_dispatcher_of_vllm_tells() -> None:
    import vllm.v1.executor.multiproc_executor as multiproc
    import vllm.v1.executor.uniproc_executor as uniproc

    heard: list[str] = []
    watcher = calls.Watcher(heard.append)

    class Worker:
        rank = 0

        def look(self) -> str:
            return "seen"

        def execute_model(self) -> None: ...

        def handle_output(self, output: object) -> None:
            heard.append(f"output {output}")

    worker = Worker()
    assert uniproc.run_method(worker, "look", (), {}) == "seen"
    uniproc.run_method(worker, lambda self: None, (), {})
    uniproc.run_method(worker, "execute_model", (), {})
    assert heard == ["look", "look", "", ""]
    heard.clear()
    process: Any = Worker()
    process.worker = worker
    multiproc.WorkerProc._execute_worker_rpc(process, ("look", (), {}, None))
    assert heard == ["look", "output seen", "look"]
    watcher.close()


def test_a_step_whose_weights_cannot_be_named_leaves_them_in_doubt() -> None:
    from types import SimpleNamespace

    from lmcache.connector.metadata import StepMetadata
    from lmcache.connector.worker import WorkerHalf

    model, weights = watched()
    in_use = WeightsInUse(weights)

    def broken(name: str | None) -> None:
        raise RuntimeError("no store")

    resumed: list[bool] = []
    half: Any = SimpleNamespace(
        _weights=in_use,
        _renamed=broken,
        _adapters=SimpleNamespace(begin_step=lambda *args: None),
        _server=SimpleNamespace(resume=lambda: resumed.append(True)),
    )
    model.up.weight.data.zero_()
    WorkerHalf.begin_step(half, StepMetadata(step=3))  # vLLM's step goes on
    assert in_use.in_doubt()
    assert not in_use.holds()
    assert resumed == [True]
    in_use.close()
