"""The fusion against Hugging Face's own forward pass, for every family."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_families as tiny
import torch

from lmcache.blend.blender import Blender
from lmcache.blend.models import adapt
from lmcache.blend.reuse import GivenKV, Segment
from lmcache.errors import BlendError, StorageError
from lmcache.kernels.rotary.ops import shift_rotary

LENGTH = 71
# Prefix, segments: odd lengths and alignments, gaps, touching ones, a covered last token, all of the prompt.
LAYOUTS = {
    "two passages": (0, [(3, 30), (33, 60)]),
    "behind a prefix": (13, [(13, 29), (29, 30), (37, 64)]),
    "to the end": (5, [(5, 71)]),
    "nothing reused": (0, []),
    "only a prefix": (70, []),
    "everything exact": (71, []),
}


def given(layers: tiny.KV, prefix: int, spans: Sequence[tuple[int, int]]) -> GivenKV:
    return GivenKV(layers, [Segment(*span) for span in spans], prefix)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_equals_full_prefill(family: str, layout: str) -> None:
    prefix, spans = LAYOUTS[layout]
    model, tokens = tiny.model(family), tiny.prompt(LENGTH)
    logits, true = tiny.prefill(model, tokens)
    assert tiny.entropy_is_real(logits)
    reused = given(tiny.spliced(true, tiny.noise(true), prefix), prefix, spans)
    blended = Blender(model, "all").blend(tokens, reused, all_logits=True)
    assert blended.positions.tolist() == list(range(min(prefix, LENGTH - 1), LENGTH))
    assert tiny.distance(blended.logits, logits[blended.positions]) < 1e-3
    for ours, theirs in zip(blended.layers, true, strict=True):
        assert tiny.distance(ours[0], theirs[0]) < 1e-3
        assert tiny.distance(ours[1], theirs[1]) < 1e-3
    last = Blender(model, "all").blend(tokens, reused)
    assert last.positions.tolist() == [LENGTH - 1]
    assert tiny.distance(last.logits, logits[-1:]) < 1e-3


@pytest.mark.parametrize("rope", tiny.ROPES)
def test_all_equals_full_prefill_with_every_scaled_rope(rope: str) -> None:
    model, tokens = tiny.model("llama", rope), tiny.prompt(LENGTH)
    logits, true = tiny.prefill(model, tokens)
    blended = Blender(model, "all").blend(tokens, given(tiny.noise(true), 0, [(1, 70)]), all_logits=True)
    assert tiny.distance(blended.logits, logits) < 1e-3


def test_upstreams_fault_rope_scaling_is_ignored_is_not_ours() -> None:
    model, tokens = tiny.model("llama", "yarn"), tiny.prompt(LENGTH)
    plain = tiny.build(tiny.config("llama"))
    plain.load_state_dict(model.state_dict())
    logits, true = tiny.prefill(model, tokens)
    assert tiny.distance(tiny.prefill(plain, tokens)[0], logits) > 0.1  # the scaling matters here
    blended = Blender(model, "all").blend(tokens, given(tiny.noise(true), 0, [(0, 70)]), all_logits=True)
    assert tiny.distance(blended.logits, logits) < 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_single_segment_that_is_the_prompt_equals_exact_reuse(family: str) -> None:
    model, tokens = tiny.model(family), tiny.prompt(LENGTH)
    logits, true = tiny.prefill(model, tokens)
    blended = Blender(model, "none").blend(tokens, given(true, 0, [(0, LENGTH)]))
    exact = Blender(model, "none").blend(tokens, given(true, LENGTH, []))
    assert tiny.distance(blended.logits, logits[-1:]) < 1e-3
    assert tiny.distance(blended.logits, exact.logits) < 1e-4
    assert blended.report.computed == [1] * 4
    for ours, kept, theirs in zip(blended.layers, exact.layers, true, strict=True):
        for side in (0, 1):
            assert torch.equal(ours[side][:-1], theirs[side][:-1])
            assert torch.equal(kept[side], theirs[side])  # the last one, exact, too


@pytest.mark.parametrize("selector", ["random", "epic", "cacheblend", "question", "oracle"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recomputing_tokens_whose_kv_is_true_changes_nothing(family: str, selector: str) -> None:
    model, tokens = tiny.model(family), tiny.prompt(LENGTH)
    logits, true = tiny.prefill(model, tokens)
    options = {"ratio": 0.3}
    blended = Blender(model, selector, **options).blend(tokens, given(true, 4, [(4, 33), (33, 63)]), all_logits=True)
    assert blended.report.computed[-1] == 8 + round(0.3 * 59)
    assert tiny.distance(blended.logits, logits[blended.positions]) < 1e-3


@pytest.mark.parametrize("covered", [False, True])
@pytest.mark.parametrize("selector", ["all", "none", "random", "epic", "cacheblend", "question", "oracle"])
def test_stop_leaves_the_question_to_the_engine(selector: str, covered: bool) -> None:
    """The KV before it is that of a blend that computes the question, too."""
    model, tokens = tiny.model("llama"), tiny.prompt(LENGTH)
    true, stop = tiny.prefill(model, tokens)[1], 60
    spans = [(3, 30), (33, LENGTH if covered else 58)]
    blender = Blender(model, selector, **({} if selector in ("all", "none") else {"ratio": 0.3}))
    whole = blender.blend(tokens, given(tiny.noise(true), 0, spans), always=[Segment(stop, LENGTH)])
    blended = blender.blend(tokens, given(tiny.noise(true), 0, spans), stop=stop)
    assert blended.logits is None
    assert blended.positions.tolist() == []
    for ours, theirs in zip(blended.layers, whole.layers, strict=True):
        for side in (0, 1):
            assert len(ours[side]) == stop
            assert tiny.distance(ours[side], theirs[side][:stop]) < 1e-4
    assert blended.report.computed[-1] == whole.report.computed[-1] - (LENGTH - stop)
    # Given layer by layer, it is the same, and nothing is kept.
    layers: tiny.KV = []
    streamed = blender.blend(
        tokens, given(tiny.noise(true), 0, spans), stop=stop, done=lambda _, k, v: layers.append((k.clone(), v.clone()))
    )
    assert streamed.layers == []
    for ours, theirs in zip(layers, blended.layers, strict=True):
        assert ours[0].equal(theirs[0])
        assert ours[1].equal(theirs[1])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_none_equals_naive_reuse_with_shifted_keys(family: str) -> None:
    """The reference prefills each passage at its new position and has Hugging Face run the question over that."""
    from transformers import DynamicCache

    model, tokens = tiny.model(family), tiny.prompt(LENGTH)
    spans = [(0, 25), (25, 60)]
    moved = [tiny.prefill(model, tokens[a:b], start=a)[1] for a, b in spans]
    cache = DynamicCache()
    for index, sides in enumerate(zip(*moved, strict=True)):
        keys, values = (torch.cat([part[side] for part in sides]).transpose(0, 1)[None] for side in (0, 1))
        cache.update(keys, values, index)
    with torch.no_grad():
        expected = model(tokens[None, 60:], past_key_values=cache).logits[0]

    layers = tiny.noise(tiny.prefill(model, tokens)[1])
    adapter = adapt(model)
    for a, b in spans:
        for index, (keys, values) in enumerate(tiny.prefill(model, tokens[a:b])[1]):
            old = torch.arange(b - a)
            shift_rotary(keys, old, old + a, adapter.table(index, LENGTH), out=layers[index][0][a:b])
            layers[index][1][a:b] = values
    blended = Blender(model, "none").blend(tokens, given(layers, 0, spans), all_logits=True)
    assert blended.positions.tolist() == list(range(60, LENGTH))
    assert tiny.distance(blended.logits, expected) < 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_upstreams_fault_scattered_rows_see_later_keys_is_not_ours(family: str) -> None:
    """KV of a later passage is perturbed: nothing of an earlier token changes, bit for bit."""
    model, tokens = tiny.model(family), tiny.prompt(LENGTH)
    true = tiny.prefill(model, tokens)[1]
    layers = tiny.noise(true)
    perturbed = tiny.spliced(layers, tiny.noise(true, seed=1, scale=30.0), 40)
    blender = Blender(model, "random", ratio=0.4)
    spans = [(2, 38), (40, 65)]
    one, two = (blender.blend(tokens, given(kv, 0, spans), all_logits=True) for kv in (layers, perturbed))
    early = one.positions < 40
    assert 0 < int(early.sum()) < 38
    assert torch.equal(one.positions, two.positions)
    assert torch.equal(one.logits[early], two.logits[early])
    assert not torch.equal(one.logits[~early], two.logits[~early])
    for a, b in zip(one.layers, two.layers, strict=True):
        assert torch.equal(a[0][:40], b[0][:40])
        assert torch.equal(a[1][:40], b[1][:40])


def test_what_a_window_no_longer_sees_changes_nothing() -> None:
    model, tokens = tiny.model("mistral"), tiny.prompt(LENGTH)
    layers = tiny.noise(tiny.prefill(model, tokens)[1])
    perturbed = tiny.spliced(tiny.noise(layers, seed=1), layers, 70 - 18)  # the window: 19 keys, the query's among them
    one, two = (Blender(model, "none").blend(tokens, given(kv, 0, [(0, 70)])) for kv in (layers, perturbed))
    assert torch.equal(one.logits, two.logits)
    seen = tiny.spliced(tiny.noise(layers, seed=1), layers, 70 - 17)
    assert not torch.equal(one.logits, Blender(model, "none").blend(tokens, given(seen, 0, [(0, 70)])).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    model = tiny.build(tiny.config("qwen3")).to(dtype)
    tokens = tiny.prompt(LENGTH)
    logits, true = tiny.prefill(model, tokens)
    blended = Blender(model, "all").blend(tokens, given(tiny.noise(true), 0, [(0, 60)]), all_logits=True)
    assert blended.logits.dtype == dtype
    scale = float(logits.float().std())
    assert tiny.distance(blended.logits.float(), logits.float()) < 0.15 * scale


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generate_goes_on_from_the_blended_cache(family: str) -> None:
    model, tokens = tiny.model(family), tiny.prompt(LENGTH)
    true = tiny.prefill(model, tokens)[1]
    blender = Blender(model, "all")
    blended = blender.blend(tokens, given(tiny.noise(true), 0, [(0, 60)]))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(1, LENGTH).long()}
    expected = model.generate(tokens[None], **options)
    found = model.generate(tokens[None], past_key_values=blender.cache(blended), **options)
    assert found.tolist() == expected.tolist()


def test_nothing_is_computed_for_tokens_that_are_not_selected() -> None:
    model, tokens = tiny.build(tiny.config("llama")), tiny.prompt(LENGTH)
    true = tiny.prefill(model, tokens)[1]
    seen: list[tuple[str, int]] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.append((name, len(inputs[0])))

    for index, block in enumerate(model.model.layers):
        block.self_attn.k_proj.register_forward_hook(watch(f"k{index}"))
        block.self_attn.q_proj.register_forward_hook(watch(f"q{index}"))
        block.mlp.register_forward_hook(watch(f"mlp{index}"))
    reused = given(tiny.noise(true), 11, [(11, 51)])
    report = Blender(model, "cacheblend", ratio=0.25).blend(tokens, reused).report
    chosen = 20 + 10  # no KV; a quarter of the segment
    assert report.computed == [60, chosen, chosen, chosen]
    assert report.candidates == 40
    assert dict(seen) == {
        **{"k0": 60, "q0": 60, "mlp0": 60},
        **{"k1": 60, "q1": chosen, "mlp1": chosen},  # keys of all are compared; nothing else is computed for all
        **{"k2": chosen, "q2": chosen, "mlp2": chosen},
        **{"k3": chosen, "q3": 1, "mlp3": 1},  # only the last token's logits are asked for
    }
    seen.clear()
    Blender(model, "epic", ratio=0.25).blend(tokens, reused)
    assert dict(seen)["k0"] == chosen


class Watched(GivenKV):
    """Tells what is fetched, and from which thread."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked = [threading.Event() for _ in range(4)]
        self.threads: set[int] = set()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked[index].set()
        self.threads.add(threading.get_ident())
        return super().layer(index)


def test_the_next_layer_is_fetched_while_one_computes() -> None:
    model, tokens = tiny.build(tiny.config("llama")), tiny.prompt(LENGTH)
    reused = Watched(tiny.noise(tiny.prefill(model, tokens)[1]), [Segment(0, 60)])
    fetched = []
    for index, block in enumerate(model.model.layers[:3]):
        # Within layer i the next one arrives, and the one behind it has not been asked for.
        block.mlp.register_forward_hook(
            lambda *args, i=index: fetched.append(
                (reused.asked[i + 1].wait(20), [e.is_set() for e in reused.asked[i + 2 :]])
            )
        )
    Blender(model, "none").blend(tokens, reused)
    assert fetched == [(True, [False, False]), (True, [False]), (True, [])]
    assert threading.get_ident() not in reused.threads


def test_a_layer_that_cannot_be_fetched_ends_the_blend_with_its_error() -> None:
    class Broken(GivenKV):
        def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if index == 2:
                raise StorageError("gone")
            return super().layer(index)

    model, tokens = tiny.model("llama"), tiny.prompt(LENGTH)
    with pytest.raises(StorageError, match="gone"):
        Blender(model, "none").blend(tokens, Broken(tiny.prefill(model, tokens)[1], [Segment(0, 60)]))


def test_given_kv_is_left_as_it_is() -> None:
    model, tokens = tiny.model("llama"), tiny.prompt(LENGTH)
    layers = tiny.noise(tiny.prefill(model, tokens)[1])
    before = [(keys.clone(), values.clone()) for keys, values in layers]
    for selector in ("all", "question", "oracle"):
        Blender(model, selector).blend(tokens, given(layers, 0, [(0, 60)]))
    assert all(
        torch.equal(a, b) for one, two in zip(layers, before, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_reused_kv_that_does_not_fit_is_refused() -> None:
    model, tokens = tiny.model("llama"), tiny.prompt(LENGTH)
    true = tiny.prefill(model, tokens)[1]
    blender = Blender(model, "none")
    with pytest.raises(BlendError, match=r"keys of layer 0 are torch.float64"):
        blender.blend(tokens, given([(k.double(), v) for k, v in true], 0, [(0, 60)]))
    with pytest.raises(BlendError, match=r"values of layer 0 .*\(71, 2, 8\)"):
        blender.blend(tokens, given([(k, v[..., :8]) for k, v in true], 0, [(0, 60)]))
    with pytest.raises(BlendError, match=r"covered is torch.bool \(71,\)"):
        blender.blend(tokens[:-1], given(true, 0, [(0, 60)]))
    with pytest.raises(BlendError, match="one token at least"):
        blender.blend([], given(true, 0, []))
    for prefix, spans in ((0, [(5, 9), (8, 12)]), (6, [(5, 9)]), (0, [(60, 72)]), (72, [])):
        with pytest.raises(BlendError, match="overlap, or leave"):
            given(true, prefix, spans)


def test_blending_works_without_an_engine() -> None:
    """Upstream's blender cannot start in a process of its own: it wants a running vLLM."""
    import subprocess
    import sys

    code = (
        "import sys, lmcache.blend.blender\n"
        "print(any(m.split('.')[0] in ('vllm', 'transformers') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
