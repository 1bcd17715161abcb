"""What blending costs, on a tiny model; runs that went wrong fail, and say why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_blend import KL, PROMPT, good_rows, tokens

from experiments.blending.quality import TITLES, ScaleConfig, check_reused, summary
from experiments.blending.session import BlendSession
from experiments.cases.blend_quality import experiment as blend_quality
from experiments.cases.blend_quality.experiment import JudgeConfig
from experiments.cases.blend_quality.figure import draw
from experiments.run import load
from lmcache.errors import BlendError, ConfigError

GEMMA = str(Path(blend_quality.__file__).with_name("blend_quality_gemma.yaml"))
SELECTORS = {name: {"type": name} for name in ("random", "epic", "cacheblend", "question")}
SCALE = ScaleConfig(prompts=1, context=960, ratios=(0.15,), min_prompts=8, min_tokens=1000)


@pytest.mark.parametrize("name", ["blend_quality", GEMMA, "blend_ttft"], ids=["plain", "gemma", "ttft"])
@pytest.mark.parametrize("scale", ["ci", "full"])
def test_shipped_configs_have_both_scales(name: str, scale: str) -> None:
    _, config = load(name, [f"scale={scale}"])
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
        check_reused(long, blended)


def test_refused_passages_are_named(session: BlendSession, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = session.engine(PROMPT, {"type": "none"})
    monkeypatch.setattr(engine, "learn", lambda passages: 1)
    with pytest.raises(BlendError, match="storage took 1 of 2 passages"):
        session.learn(engine, PROMPT)


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
    found = summary(good_rows())
    lines = blend_quality.table(found).splitlines()
    assert len(lines) == 2 + 2 * len(KL)
    assert any(line.startswith("| wiki | question | 15% | 0.0162 [") for line in lines)
    assert any("| 0/8 |" in line for line in lines if "bind" in line)
    draw(found, TITLES, "title", "caption", tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_runs_that_were_cut_off_are_resumed(tmp_path: Path) -> None:
    config = load("blend_quality", ["seed=3"])[1]
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
