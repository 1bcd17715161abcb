"""The pictures of docs/blend.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tiny_blend import PROMPT

from experiments.blending import figures as blend_figures
from experiments.blending.session import BlendSession


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
