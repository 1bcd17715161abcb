"""Times to first token of blended prompts: measured on a tiny model, judged, tabled and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.blending import ttft
from experiments.blending.session import BlendSession
from experiments.cases.blend_ttft.experiment import measure
from experiments.run import load


def timed(**seconds: float) -> list[ttft.Timed]:
    times = {"full": 3.3, "cacheblend": 1.0, "question": 1.0, **seconds}
    ratios = {"full": 1.0}
    rows = [
        ttft.Timed(length, name, ratios.get(name, 0.15), repeat, of * spread)
        for length in (1024, 2048)
        for name, of in times.items()
        for repeat, spread in enumerate((0.9, 1.0, 1.3))
    ]
    return [row for row in rows if row.ttft_s > 0]


def test_a_good_blend_ttft_run_passes() -> None:
    found = ttft.summary(timed())
    assert [f.speedup for f in found if f.selector == "question"] == [pytest.approx(3.3)] * 2
    assert ttft.judge(found, ttft.JudgeConfig()) == []


def test_blend_ttft_fails_when_a_selector_is_slow_and_says_by_how_much() -> None:
    (failure,) = ttft.judge(ttft.summary(timed(question=1.32)), ttft.JudgeConfig())
    assert failure == "question at 2048 tokens: 2.50x faster than a full prefill; 3x is asked, which is 20% more"


def test_blend_ttft_fails_when_nothing_was_measured() -> None:
    for limits in (ttft.JudgeConfig(min_tokens=4000), ttft.JudgeConfig(ratio=0.2)):
        (failure,) = ttft.judge(ttft.summary(timed()), limits)
        assert failure.startswith("nothing was measured at ")


def test_blend_ttft_is_measured_tabled_and_drawn(session: BlendSession, tmp_path: Path) -> None:
    config = load("blend_ttft", ["passage=48", "question=16"])[1]
    rows = measure(session, config, length=256, repeats=2, done=lambda: None)
    assert len(rows) == 2 * (1 + 2 * 3)
    found = ttft.summary(rows)
    assert [f.speedup for f in found if f.selector == "full"] == [1.0]
    assert len(ttft.table(found).splitlines()) == 2 + 7
    ttft.draw(found, "title", "caption", tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 1000
