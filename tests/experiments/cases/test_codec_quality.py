"""What a codec does to KV: the judge, the table and the figure of rows that were measured elsewhere."""

from __future__ import annotations

from pathlib import Path

from experiments.cases.codec_quality.experiment import JudgeConfig, judge, table
from experiments.cases.codec_quality.figure import draw
from experiments.cases.codec_quality.measure import Found

RAW = Found("raw", 16.0, 0.0, 0.0, 1.0, 0.0, 0.0, None, 1.0)
INT8 = Found("int8", 8.5, 0.0004, 0.0001, 0.99, 0.005, 0.006, None, 1.0)
KLT = Found("klt-2.3", 2.5, 0.008, 0.001, 0.97, 0.08, 0.2, 0.03, 1.0)


def test_what_is_over_a_limit_or_not_among_the_codecs_fails() -> None:
    assert judge([RAW, INT8, KLT], JudgeConfig(max_kl={"int8": 0.001}, max_overhead={"klt-2.3": 0.04})) == []
    failures = judge([RAW, INT8], JudgeConfig(max_kl={"int8": 0.0003}, max_bits={"klt-2.3": 3}))
    assert failures == [
        "int8: kl 0.0004, at most 0.0003 allowed",
        "judge.max_bits names 'klt-2.3', which is not among the codecs",
    ]


def test_codecs_are_tabled_and_drawn(tmp_path: Path) -> None:
    lines = table([RAW, INT8, KLT]).splitlines()
    assert len(lines) == 4
    assert "6.4x" in lines[3]
    assert lines[3].endswith("+3.0%")
    draw([RAW, INT8, KLT], "title", "caption", tmp_path / "codecs.png")
    assert (tmp_path / "codecs.png").read_bytes().startswith(b"\x89PNG")
