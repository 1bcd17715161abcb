"""The experiment on loading with a tiny model; runs that went wrong fail, and say why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments.blending.prompts import filled
from experiments.blending.session import BlendSession
from experiments.cases.blend_loading import experiment as blend_loading
from experiments.cases.blend_loading.experiment import JudgeConfig
from experiments.cases.blend_loading.figure import draw
from experiments.cases.blend_loading.rows import Found, summary
from experiments.run import load
from lmcache.errors import BlendError

TINY = ["passage=48", "question=16", "settle=1", "engine.threads=1"]


def row(load_s: float, compute_s: float, pipelined_s: float, **changes: Any) -> Found:
    made = Found(1.0, 50e6, 0.15, load_s, compute_s, load_s + compute_s, pipelined_s)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("scale", ["ci", "full"])
def test_the_shipped_config_has_both_scales(scale: str) -> None:
    _, config = load("blend_loading", [f"scale={scale}"])
    assert config.judge.ratio in config.scales[scale].ratios
    assert 1 in config.scales[scale].loads


def test_a_good_run_passes() -> None:
    found = [row(1.0, 1.0, 1.1), row(1.0, 0.1, 1.09), row(1.0, 1.0, 1.2, chosen=True)]
    assert blend_loading.judge(found, JudgeConfig()) == []


def test_a_run_fails_when_nothing_is_hidden() -> None:
    (failure,) = blend_loading.judge([row(1.0, 1.0, 1.9)], JudgeConfig())
    assert failure == "50 MB/s, 15%: pipelined takes 0.95 of the sequential time; 0.9 is allowed"


def test_a_run_fails_when_neither_could_hide_the_other() -> None:
    (failure,) = blend_loading.judge([row(1.0, 0.4, 1.0), row(0.1, 1.0, 1.0)], JudgeConfig())
    assert failure.startswith("nothing was measured")


def test_a_run_fails_when_the_controller_chooses_too_much() -> None:
    (failure,) = blend_loading.judge([row(1.0, 1.0, 1.1), row(1.0, 1.0, 2.2, ratio=0.9, chosen=True)], JudgeConfig())
    assert failure == "50 MB/s: at the controller's 90% a blend takes 1.10 of the sequential time at 15%; 1 is allowed"


def test_all_is_measured_tabled_and_drawn(session: BlendSession, tmp_path: Path) -> None:
    _, config = load("blend_loading", [*TINY, "scales.ci.repeats=1"])
    scale = config.scales["ci"]
    prompt = filled(list(session.texts.values()), session.encode, length=256, passage=48, question=16)
    rate = blend_loading.balanced_rate(session, config, prompt, tmp_path / "tier")
    assert 1e5 < rate < 1e9
    rows, chosen = blend_loading.measure(session, config, scale, prompt, 2.0, rate / 2, tmp_path / "tier")
    assert {each.bytes_per_s for each in rows} == {rate / 2}
    assert {each.method for each in rows} == {"load", "compute", "sequential", "pipelined", "chosen"}
    assert len(rows) == 1 + 3 * len(scale.ratios) + 1
    assert config.judge.ratio - 0.01 <= chosen <= 1
    found = summary(rows, chosen)
    assert [f.chosen for f in found] == [False] * len(scale.ratios) + [True]
    assert all(f.sequential_s > f.load_s / 2 for f in found)
    assert len(blend_loading.table(found).splitlines()) == 2 + len(found)
    draw(found, "title", "caption", tmp_path / "loading.png")
    assert (tmp_path / "loading.png").stat().st_size > 1000


def test_passages_that_storage_has_lost_are_no_measurement(session: BlendSession, tmp_path: Path) -> None:
    _, config = load("blend_loading", TINY)
    prompt = filled(list(session.texts.values()), session.encode, length=256, passage=48, question=16)
    with blend_loading.opened(session, config, prompt, tmp_path / "tier", None) as bench:
        bench.load()
        bench.manager.clear()
        for broken in (bench.load, lambda: bench.blend(0.15, pipelined=True)):
            with pytest.raises(BlendError, match="0 of 2 passages came"):
                broken()
