"""Passages learned in other places: what they are learned behind, what is measured, what is judged."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_blend import PROMPT, good_rows, tokens

from experiments.blending.session import BlendSession
from experiments.cases.blend_learned import experiment as blend_learned
from experiments.run import load

WAYS: tuple[blend_learned.Learned, ...] = ("prefix", "alone", "reordered", "prompt")


@pytest.mark.parametrize("scale", ["ci", "full"])
def test_passages_are_learned_at_the_judged_ratio(scale: str) -> None:
    _, config = load("blend_learned", [f"scale={scale}"])
    assert config.scales[scale].ratios == (0.15,)
    assert config.learned == ("prefix", "alone", "reordered", "prompt")


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
