"""Selectors: how many, which, and the same again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_families as tiny
import torch

from lmcache.blend.blender import Blender
from lmcache.blend.reuse import GivenKV, Segment
from lmcache.blend.selectors import TOKEN_SELECTORS, Prompt, build_selector, describe
from lmcache.errors import ConfigError

LENGTH = 71


def prompt(
    segments: Sequence[tuple[int, int]],
    prefix: int = 0,
    always: Sequence[tuple[int, int]] = (),
    length: int = LENGTH,
    attention: torch.Tensor | None = None,
    **options: Any,
) -> Prompt:
    nothing = torch.zeros(length, 1, 1)
    reused = GivenKV([(nothing, nothing)], [Segment(*span) for span in segments], prefix)
    config = build_selector({"type": "none", **options}).config
    weights = torch.ones(length) if attention is None else attention
    return describe(
        reused, [Segment(*span) for span in always], config, lambda n, start, stop: weights, lambda n: weights
    )


def narrowed(
    options: dict[str, Any], given: Prompt, k_dev: torch.Tensor, v_dev: torch.Tensor, layer: int = 1
) -> list[int]:
    selector = build_selector(options)
    rows = selector.start(given)
    return rows[selector.narrow(given, layer, rows, k_dev[rows], v_dev[rows])].tolist()


def test_what_is_computed_in_any_case() -> None:
    none = build_selector("none")
    assert none.start(prompt([(3, 30), (33, 60)])).tolist() == [*range(3), *range(30, 33), *range(60, 71)]
    assert none.start(prompt([(5, 71)], prefix=5)).tolist() == [70]  # the last has logits
    assert none.start(prompt([], prefix=71)).tolist() == [70]
    assert none.start(prompt([(0, 71)], last_tokens=4)).tolist() == [67, 68, 69, 70]
    assert none.start(prompt([(0, 71)], sinks=2)).tolist() == [0, 1, 70]
    assert none.start(prompt([(9, 71)], prefix=9, sinks=11)).tolist() == [9, 10, 70]  # exact ones never
    assert none.start(prompt([(9, 71)], prefix=9, always=[(5, 12), (20, 22)])).tolist() == [9, 10, 11, 20, 21, 70]
    assert none.start(prompt([(0, 3)], length=3, last_tokens=50, sinks=50)).tolist() == [0, 1, 2]


def test_all_takes_all_that_is_not_exact() -> None:
    assert build_selector("all").start(prompt([(9, 40)], prefix=9)).tolist() == list(range(9, 71))


@pytest.mark.parametrize(
    ("ratio", "minimum", "count"), [(0.0, 0, 0), (0.15, 0, 6), (0.15, 9, 9), (1.0, 0, 40), (0.01, 100, 40)]
)
@pytest.mark.parametrize("name", ["random", "epic", "cacheblend", "question", "oracle"])
def test_counts(name: str, ratio: float, minimum: int, count: int) -> None:
    given = prompt([(11, 31), (31, 51)], prefix=11)
    options = {"type": name, "ratio": ratio, "min_tokens": minimum}
    selector, noise = build_selector(options), torch.rand(2, LENGTH)
    chosen = narrowed(options, given, *noise) if selector.check_layers else selector.start(given).tolist()
    assert chosen == sorted(set(chosen))
    assert chosen[count:] == list(range(51, 71))
    assert len(chosen) == count + 20
    assert not chosen or chosen[0] >= 11


def test_random_is_drawn_by_its_seed() -> None:
    given = prompt([(0, 60)])
    one, same, other = (
        build_selector({"type": "random", "seed": s, "ratio": 0.3}).start(given).tolist() for s in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_epic_takes_the_first_tokens_of_each_segment() -> None:
    given = prompt([(3, 23), (23, 43), (45, 65)])
    rest = [0, 1, 2, 43, 44, *range(65, 71)]
    exactly = build_selector({"type": "epic", "segment_tokens": 2}).start(given).tolist()
    assert exactly == sorted([3, 4, 23, 24, 45, 46, *rest])
    # 7 of 60 tokens: 2 of each, and one more, where the tie is decided by position
    shared = build_selector({"type": "epic", "ratio": 7 / 60}).start(given).tolist()
    assert shared == sorted([3, 4, 5, 23, 24, 45, 46, *rest])
    assert build_selector({"type": "epic", "segment_tokens": 0}).start(given).tolist() == rest


def test_cacheblend_takes_the_tokens_that_moved_most() -> None:
    given = prompt([(0, 70)])
    k_dev, v_dev = torch.zeros(LENGTH), torch.zeros(LENGTH)
    k_dev[[4, 9, 50]] = torch.tensor([3.0, 5.0, 4.0])
    v_dev[[4, 8, 50]] = torch.tensor([3.0, 7.0, 0.5])
    options = {"type": "cacheblend", "ratio": 3 / 70}
    assert narrowed(options, given, k_dev, v_dev) == [4, 8, 9, 70]
    assert narrowed({**options, "value_weight": 0.0}, given, k_dev, v_dev) == [4, 9, 50, 70]
    assert narrowed({**options, "key_weight": 0.0}, given, k_dev, v_dev) == [4, 8, 50, 70]
    assert narrowed({**options, "threshold": 0.8}, given, k_dev, v_dev) == [4, 8, 70]  # 9 has 5 of 7
    k_dev[12] = torch.nan  # nothing can be said about it: behind all others
    assert narrowed(options, given, k_dev, v_dev) == [4, 8, 9, 70]


def test_of_equal_scores_the_first_win() -> None:
    given = prompt([(5, 70)], prefix=5)
    ones = torch.ones(LENGTH)
    assert narrowed({"type": "cacheblend", "ratio": 4 / 65}, given, ones, ones) == [5, 6, 7, 8, 70]


def test_gradual_ratios_narrow_layer_by_layer() -> None:
    given = prompt([(0, 70)])
    options = {"type": "cacheblend", "check_layers": (1, 2, 3), "ratios": (0.5, 0.3, 0.1)}
    noise = torch.rand(2, LENGTH)
    for layer, count in ((1, 35), (2, 21), (3, 7)):
        assert len(narrowed(options, given, *noise, layer=layer)) == count + 1
    model, tokens = tiny.model("llama"), tiny.prompt(LENGTH)
    layers = tiny.noise(tiny.prefill(model, tokens)[1])
    blended = Blender(model, options).blend(tokens, GivenKV(layers, [Segment(0, 70)]))
    assert blended.report.computed == [71, 36, 22, 8]


def test_question_weighs_movement_by_attention() -> None:
    attention = torch.full((LENGTH,), 0.1)
    attention[[10, 30]] = 2.0
    v_dev = torch.ones(LENGTH)
    v_dev[30], v_dev[40] = 4.0, 9.0
    given = prompt([(0, 70)], attention=attention)
    assert narrowed({"type": "question", "ratio": 2 / 70}, given, torch.rand(LENGTH), v_dev) == [10, 30, 70]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_questions_attention_is_that_of_hugging_face(family: str) -> None:
    """Over true KV, the dry run sees what a full prefill's last tokens attend to."""
    model = tiny.build(tiny.config(family, attn_implementation="eager"))
    tokens = tiny.prompt(LENGTH)
    true = tiny.prefill(model, tokens)[1]
    with torch.no_grad():
        weights = model(tokens[None], output_attentions=True).attentions
    expected = torch.stack([layer[0, :, 61:].sum(1).mean(0) for layer in weights]).mean(0)

    seen = []

    class Spy(type(build_selector("question"))):  # type: ignore[misc]
        def start(self, prompt: Prompt) -> torch.Tensor:
            seen.append(prompt.attention(10, 0.0, 1.0))
            return super().start(prompt)  # type: ignore[no-any-return]

    selector = Spy(Spy.Config())
    Blender(model, selector).blend(tokens, GivenKV(true, [Segment(5, 61)], prefix=5))
    assert tiny.distance(seen[0], expected) < 1e-4
    assert abs(float(seen[0].sum()) - 10) < 1e-3


def test_tokens_without_kv_are_not_seen_by_the_dry_run() -> None:
    """All but the question and the first tokens: they would have to be computed twice."""
    model, tokens = tiny.model("llama"), tiny.prompt(LENGTH)
    layers = tiny.noise(tiny.prefill(model, tokens)[1])
    seen = []

    class Spy(type(build_selector("question"))):  # type: ignore[misc]
        def start(self, prompt: Prompt) -> torch.Tensor:
            seen.append(prompt.attention(64, 0.0, 1.0))
            return super().start(prompt)  # type: ignore[no-any-return]

    selector = Spy(Spy.Config())
    Blender(model, selector).blend(tokens, GivenKV(layers, [Segment(10, 30), Segment(40, 65)]))
    hidden = [*range(4, 10), *range(30, 40)]
    assert float(seen[0][hidden].sum()) == 0
    assert bool((seen[0][[*range(4), *range(10, 30), *range(40, 71)]] > 0).all())


def test_oracle_finds_the_token_whose_kv_is_wrong() -> None:
    model, tokens = tiny.model("qwen3"), tiny.prompt(LENGTH)
    true = tiny.prefill(model, tokens)[1]
    wrong = [(keys.clone(), values.clone()) for keys, values in true]
    for _, values in wrong:
        values[[17, 44]] += 3.0
    blender = Blender(model, "oracle", ratio=2 / 65)
    blended = blender.blend(tokens, GivenKV(wrong, [Segment(0, 65)]), all_logits=True)
    assert blended.positions.tolist() == [17, 44, *range(65, 71)]


@pytest.mark.parametrize("name", TOKEN_SELECTORS.names())
def test_short_prompts_and_nothing_to_choose(name: str) -> None:
    model = tiny.model("gemma3")
    for length, prefix, spans in (
        (1, 0, []),
        (1, 1, []),
        (1, 0, [(0, 1)]),
        (3, 1, [(1, 2)]),
        (40, 0, []),
        (40, 39, []),
    ):
        tokens = tiny.prompt(length)
        logits, true = tiny.prefill(model, tokens)
        blended = Blender(model, name).blend(tokens, GivenKV(true, [Segment(*span) for span in spans], prefix))
        assert tiny.distance(blended.logits, logits[-1:]) < 1e-3


def test_selection_is_deterministic() -> None:
    model, tokens = tiny.model("gemma3"), tiny.prompt(LENGTH)
    layers = tiny.noise(tiny.prefill(model, tokens)[1])
    for name in TOKEN_SELECTORS.names():
        blender = Blender(model, name)
        one, two = (blender.blend(tokens, GivenKV(layers, [Segment(2, 60)]), all_logits=True) for _ in range(2))
        assert torch.equal(one.positions, two.positions)
        assert torch.equal(one.logits, two.logits)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown token selector 'cachblend'; known: all, cacheblend, epic"):
        build_selector("cachblend")
    with pytest.raises(ConfigError, match=r"unknown key ration; known: .*ratio"):
        build_selector({"type": "cacheblend", "ration": 0.2})
    for options in (
        {"check_layers": (2, 1)},
        {"check_layers": (-1,)},
        {"check_layers": (1, 2), "ratios": (0.3,)},
        {"check_layers": (1, 2), "ratios": (0.1, 0.3)},
        {"ratios": (1.5,)},
        {"ratio": -0.1},
    ):
        with pytest.raises(ConfigError, match=r"selector \(cacheblend\)"):
            build_selector({"type": "cacheblend", **options})
    with pytest.raises(ConfigError, match=r"depth is .* must ascend within 0 .. 1"):
        build_selector({"type": "question", "depth": (0.5, 0.5)})
    model = tiny.model("llama")
    with pytest.raises(ConfigError, match=r"check layers \(4,\): the model has layers 0 .. 3"):
        Blender(model, "cacheblend", check_layers=(4,))
    with pytest.raises(ConfigError, match=r"'ratio'.*takes no options"):
        Blender(model, build_selector("none"), ratio=0.1)
    with pytest.raises(ConfigError, match="unknown attention provider"):
        Blender(model, "none", provider="nonesuch")


def test_question_compares_only_what_it_attends_to() -> None:
    attention = torch.linspace(0, 1, LENGTH)
    given = prompt([(0, 70)], attention=attention)
    start = build_selector({"type": "question", "ratio": 0.1, "compared": 2}).start
    assert start(given).tolist() == list(range(56, 71))
    assert start(prompt([(0, 70)], attention=-attention)).tolist() == [*range(14), 70]
    everything = build_selector({"type": "question", "ratio": 0.5, "compared": 2}).start(given)
    assert everything.tolist() == list(range(71))
