"""The blend experiments on a tiny model; runs that went wrong fail, and say why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from experiments.blending import figures as blend_figures
from experiments.blending.prompts import Prompt
from experiments.blending.session import BlendSession
from experiments.cases.blend_learned import experiment as blend_learned
from experiments.cases.blend_quality import experiment as blend_quality
from experiments.cases.blend_quality.experiment import JudgeConfig, ScaleConfig, Scored
from experiments.cases.blend_ttft import experiment as blend_ttft
from experiments.framework import plots
from experiments.framework.config import ROOT
from experiments.run import load
from lmcache.blend.models import adapt
from lmcache.config import load_config
from lmcache.errors import BlendError, ConfigError
from lmcache.storage.manager import StorageManager

CONFIGS = ROOT / "experiments" / "configs"
SELECTORS = {name: {"type": name} for name in ("random", "epic", "cacheblend", "question")}
SCALE = ScaleConfig(prompts=1, context=960, ratios=(0.15,), min_prompts=8, min_tokens=1000)
WAYS: tuple[blend_learned.Learned, ...] = ("prefix", "alone", "reordered", "prompt")
KL = {"none": 0.040, "random": 0.038, "epic": 0.028, "cacheblend": 0.020, "question": 0.012, "all": 1e-8}


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(2, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT = Prompt("wiki", "a", 0, tokens(5, 0), [tokens(40, 1), tokens(48, 2)], tokens(9, 3), tokens(6, 4))


@pytest.fixture
def session() -> Iterator[BlendSession]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    manager = StorageManager(load_config(overrides={"memory.capacity": 64 << 20, "memory.huge_pages": False}))
    texts = {"a": "".join(map(chr, tokens(900, 5)))}
    yield BlendSession("tiny", model, adapt(model), lambda t: [ord(c) % 97 for c in t], texts, manager, "tiny")
    manager.clear()
    manager.close()


@pytest.mark.parametrize("scale", ["ci", "full"])
def test_passages_are_learned_at_the_judged_ratio(scale: str) -> None:
    _, config = load(str(CONFIGS / "blend_learned.yaml"), [f"scale={scale}"])
    assert config.scales[scale].ratios == (0.15,)
    assert config.learned == ("prefix", "alone", "reordered", "prompt")


@pytest.mark.parametrize("name", ["blend_quality", "blend_quality_gemma", "blend_ttft"])
@pytest.mark.parametrize("scale", ["ci", "full"])
def test_shipped_configs_have_both_scales(name: str, scale: str) -> None:
    _, config = load(str(CONFIGS / f"{name}.yaml"), [f"scale={scale}"])
    assert config.scale in config.scales
    assert config.judge.ratio == 0.15


def test_every_selector_is_measured_against_a_full_prefill(session: BlendSession) -> None:
    rows = blend_quality.measure(session, PROMPT, SELECTORS, (0.0, 0.15, 0.5, 1.0))
    assert len(rows) == 2 + 4 * 2
    assert {row.tokens for row in rows} == {5 + 40 + 48 + 9 + 6}
    by = {(row.selector, row.ratio): row for row in rows}
    assert by["all", 1.0].kl < 1e-6
    assert by["all", 1.0].top1 == 1.0
    assert by["none", 0.0].kl > 1e-4
    assert all(by[name, 0.5].kl != by["none", 0.0].kl for name in SELECTORS)


def test_likelihood_is_that_of_the_model_itself(session: BlendSession) -> None:
    whole = torch.tensor([[*PROMPT.asked, *PROMPT.answer]])
    with torch.no_grad():
        found = session.model(whole).logits[0].double().log_softmax(-1)
    scored = range(len(PROMPT.asked) - len(PROMPT.question), whole.shape[1] - 1)
    expected = -sum(float(found[place, whole[0, place + 1]]) for place in scored) / len(scored)
    (full,) = [row for row in blend_quality.measure(session, PROMPT, {}, ()) if row.selector == "all"]
    assert full.nll == pytest.approx(expected, abs=1e-4)


def test_passages_that_storage_does_not_take_end_the_run(session: BlendSession) -> None:
    long = dataclasses.replace(PROMPT, passages=[tokens(3, 1), PROMPT.passages[1]])
    engine = session.engine(long, {"type": "none"})
    session.learn(engine, long)
    session.manager.clear()
    blended = engine.blend(long.asked, long.segments)
    with pytest.raises(ConfigError, match="0 of 51 tokens of passages were reused"):
        blend_quality.check_reused(long, blended)


def test_refused_passages_are_named(session: BlendSession, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = session.engine(PROMPT, {"type": "none"})
    monkeypatch.setattr(engine, "learn", lambda passages: 1)
    with pytest.raises(BlendError, match="storage took 1 of 2 passages"):
        session.learn(engine, PROMPT)


def scored(data: str, number: int, selector: str, ratio: float, kl: float, count: int = 1056) -> Scored:
    article = f"article{number}"
    return Scored(data, article, f"{data}/{article}#0", count, selector, ratio, kl, kl, 0.9, 2.0, False)


def good_rows(**changed: float) -> list[Scored]:
    """Eight prompts of each kind, one article each, with a spread that is common to all methods."""
    rows = []
    for data in ("wiki", "bind"):
        for selector, kl in {**KL, **changed}.items():
            ratio = {"none": 0.0, "all": 1.0}.get(selector, 0.15)
            rows += [scored(data, n, selector, ratio, kl * (1 + 0.1 * n)) for n in range(8)]
    return rows


def test_a_good_quality_run_passes() -> None:
    failures, compared = blend_quality.judge(good_rows(), JudgeConfig(), SCALE)
    assert failures == []
    assert compared["wiki: question / cacheblend"].ratio.value == pytest.approx(0.6)
    assert len(compared) == 8


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"question": 0.0145}, "wiki: question / cacheblend: KL is 0.72"),
        ({"epic": 0.0195}, "wiki: question / epic: KL is 0.61"),
        ({"cacheblend": 0.039}, "wiki: cacheblend / random: KL differs by 0.001"),
        ({"none": 0.019}, "wiki: cacheblend / none: KL differs by 0.001"),
        ({"question": 0.021}, "bind: question / cacheblend: KL differs by 0.001"),
        ({"epic": 0.011}, "bind: question / epic: KL differs by 0.001"),
        ({"all": 0.001}, "wiki: 100% is no full prefill"),
        ({"all": float("nan")}, "wiki: 100% is no full prefill"),
    ],
)
def test_quality_fails(changed: dict[str, float], said: str) -> None:
    failures, _ = blend_quality.judge(good_rows(**changed), JudgeConfig(), SCALE)
    assert any(failure.startswith(said) for failure in failures), failures


def test_quality_fails_when_a_selector_misses_a_prompt() -> None:
    rows = good_rows()
    rows.remove(next(row for row in rows if row.selector == "epic"))
    failures, _ = blend_quality.judge(rows, JudgeConfig(), SCALE)
    assert failures == ["wiki: no rows, or not of every prompt, at 15% of epic"]
    failures, _ = blend_quality.judge([], JudgeConfig(), SCALE)
    assert len(failures) == 2


def test_quality_fails_with_few_or_short_prompts() -> None:
    rows = [dataclasses.replace(row, tokens=999) for row in good_rows() if row.article != "article7"]
    failures, _ = blend_quality.judge(rows, JudgeConfig(), SCALE)
    said = [
        f"{data}: {what}" for data in ("wiki", "bind") for what in ("7 prompts; 8", "a prompt has 999 tokens; 1000")
    ]
    assert failures == [f"{what} asked" for what in said]


def test_quality_is_tabled_and_drawn(tmp_path: Path) -> None:
    found = blend_quality.summary(good_rows())
    lines = blend_quality.table(found).splitlines()
    assert len(lines) == 2 + 2 * len(KL)
    assert any(line.startswith("| wiki | question | 15% | 0.0162 [") for line in lines)
    assert any("| 0/8 |" in line for line in lines if "bind" in line)
    plots.blend_quality_figure(found, blend_quality.TITLES, "title", "caption", tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_runs_that_were_cut_off_are_resumed(tmp_path: Path) -> None:
    config = load(str(CONFIGS / "blend_quality.yaml"), ["seed=3"])[1]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    rows = [row for row in good_rows() if row.data == "wiki"]  # selectors in the order in which they are run
    rows.sort(key=lambda row: row.key)
    lines = [json.dumps(dataclasses.asdict(row)) + "\n" for row in rows]
    (tmp_path / "results.jsonl").write_text("".join(lines[:-1]))
    again = config.model_copy(update={"resume": tmp_path, "name": "again"})
    kept = blend_quality.resumed(again)
    assert list(kept) == [f"wiki/article{n}#0" for n in range(7)]  # all but the prompt that has not all its rows
    assert [row for of in kept.values() for row in of] == rows[: -len(KL)]
    with pytest.raises(ConfigError, match="other options"):
        blend_quality.resumed(again.model_copy(update={"seed": 4}))
    (tmp_path / "results.jsonl").write_text("".join(lines)[:-9])
    with pytest.raises(ConfigError, match="resume="):
        blend_quality.resumed(again)
    with pytest.raises(ConfigError, match="nowhere"):
        blend_quality.resumed(again.model_copy(update={"resume": tmp_path / "nowhere"}))


def test_where_passages_are_learned(session: BlendSession) -> None:
    other = dataclasses.replace(PROMPT, passages=[tokens(30, 6), tokens(31, 7), tokens(32, 8)])
    first, second = PROMPT.passages
    behind = {way: [blend_learned.before(PROMPT, place, other, way) for place in (0, 1)] for way in WAYS}
    assert behind["alone"] == [[], []]
    assert behind["prefix"] == [PROMPT.prefix] * 2
    assert behind["prompt"] == [
        PROMPT.prefix + [token for passage in other.passages for token in passage],
        PROMPT.prefix + other.passages[0],
    ]
    four = dataclasses.replace(PROMPT, passages=[first, second, tokens(20, 6), tokens(20, 7)])
    reordered = [blend_learned.before(four, place, other, "reordered") for place in range(4)]
    assert reordered[2] == PROMPT.prefix
    assert reordered[1] == PROMPT.prefix + four.passages[2] + four.passages[3] + first

    rows = blend_learned.measure(session, PROMPT, other, WAYS, {"question": {"type": "question"}}, 0.5)
    kl = {(row.learned, row.scored.selector): row.scored.kl for row in rows}
    assert len(kl) == len(rows) == 2 * len(WAYS)
    assert len({round(kl[way, "none"], 9) for way in WAYS}) >= 3  # KV differs by what it was learned behind
    assert all(kl[way, "question"] < kl[way, "none"] for way in WAYS)


def test_a_passage_that_was_learned_in_the_same_place_is_exact(session: BlendSession) -> None:
    """Behind all that precedes it in the prompt, KV is that of the prompt itself."""
    alone = dataclasses.replace(PROMPT, passages=PROMPT.passages[:1])
    (row,) = blend_learned.measure(session, alone, PROMPT, ["prefix"], {}, 0.5)
    assert row.scored.kl < 1e-6


def learned_rows(**changed: float) -> list[blend_learned.Row]:
    rows = [row for row in good_rows(**changed) if row.selector in ("none", "cacheblend", "question")]
    return [blend_learned.Row(way, row) for way in ("prefix", "prompt") for row in rows]


def test_learned_runs_are_judged_and_tabled() -> None:
    assert blend_learned.judge(learned_rows()) == []
    lines = blend_learned.table(learned_rows()).splitlines()
    assert len(lines) == 2 + 2 * 2 * 3
    assert any(line.startswith("| bind | prompt | question | 0.0162 [") and "1.0000 [" in line for line in lines)
    assert len(blend_learned.judge(learned_rows(question=0.021))) == 4
    assert len(blend_learned.judge(learned_rows(none=0.019))) == 4
    assert blend_learned.judge(learned_rows()[1:])[0].endswith("not measured on the same prompts; it must be below 0")
    assert blend_learned.judge([]) == ["nothing was measured"]


def timed(**seconds: float) -> list[blend_ttft.Timed]:
    times = {"full": 3.3, "cacheblend": 1.0, "question": 1.0, **seconds}
    ratios = {"full": 1.0}
    rows = [
        blend_ttft.Timed(length, name, ratios.get(name, 0.15), repeat, of * spread)
        for length in (1024, 2048)
        for name, of in times.items()
        for repeat, spread in enumerate((0.9, 1.0, 1.3))
    ]
    return [row for row in rows if row.ttft_s > 0]


def test_a_good_blend_ttft_run_passes() -> None:
    found = blend_ttft.summary(timed())
    assert [f.speedup for f in found if f.selector == "question"] == [pytest.approx(3.3)] * 2
    assert blend_ttft.judge(found, blend_ttft.JudgeConfig()) == []


def test_blend_ttft_fails_when_a_selector_is_slow_and_says_by_how_much() -> None:
    (failure,) = blend_ttft.judge(blend_ttft.summary(timed(question=1.32)), blend_ttft.JudgeConfig())
    assert failure == "question at 2048 tokens: 2.50x faster than a full prefill; 3x is asked, which is 20% more"


def test_blend_ttft_fails_when_nothing_was_measured() -> None:
    for limits in (blend_ttft.JudgeConfig(min_tokens=4000), blend_ttft.JudgeConfig(ratio=0.2)):
        (failure,) = blend_ttft.judge(blend_ttft.summary(timed()), limits)
        assert failure.startswith("nothing was measured at ")


def test_blend_ttft_is_measured_tabled_and_drawn(session: BlendSession, tmp_path: Path) -> None:
    config = load(str(CONFIGS / "blend_ttft.yaml"), ["passage=48", "question=16"])[1]
    rows = blend_ttft.measure(session, config, length=256, repeats=2, done=lambda: None)
    assert len(rows) == 2 * (1 + 2 * 3)
    found = blend_ttft.summary(rows)
    assert [f.speedup for f in found if f.selector == "full"] == [1.0]
    assert len(blend_ttft.table(found).splitlines()) == 2 + 7
    plots.blend_ttft_figure(found, "title", "caption", tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 1000


def test_blend_figures_show_what_was_computed(session: BlendSession, tmp_path: Path) -> None:
    session.learn(session.engine(PROMPT, {"type": "none"}), PROMPT)
    masks = {name: blend_figures.computed(session, PROMPT, name, 0.25) for name in ("epic", "question")}
    first, second = PROMPT.segments
    for mask in masks.values():
        assert mask.shape == (4, len(PROMPT.asked))
        assert not mask[:, : len(PROMPT.prefix)].any()  # exact
        assert mask[:, second.stop :].all()  # the question
        assert mask[-1, first.start : second.stop].sum() == 22
    assert masks["epic"][0, first.start : first.start + 11].all()
    assert 22 < masks["question"][0, first.start : second.stop].sum() < second.stop - first.start  # then it chooses
    blend_figures.life(tmp_path / "life.png")
    named = dataclasses.replace(session, texts={"a": "Title\nText"})
    blend_figures.tokens(named, PROMPT, ("epic", "question"), 0.25, tmp_path / "tokens.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("life.png", "tokens.png"))
