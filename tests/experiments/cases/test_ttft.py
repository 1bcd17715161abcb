"""A comparison of TTFT that went wrong fails, and says why; the same run without the fault passes."""

from __future__ import annotations

from typing import Any

import pytest
from synthetic import changed, good_ttft

from experiments.cases.ttft import experiment as ttft_bench


def test_a_good_ttft_run_passes() -> None:
    assert ttft_bench.judge(good_ttft(), ttft_bench.JudgeConfig()) == []


@pytest.mark.parametrize(
    ("phase", "changes", "said"),
    [
        (ttft_bench.MEMORY, {"ttft_s": 0.31}, "memory: median TTFT 0.310 s is 1.535x vllm-prefix-cache's"),
        (ttft_bench.COLD, {"ttft_s": 4.3}, "cold: median TTFT 4.300 s is 1.074x no-cache's"),
        (ttft_bench.MEMORY, {"cached_tokens": 0}, "memory: nothing was hit"),
        (ttft_bench.LOCAL, {"cached_tokens": 0}, "vllm-prefix-cache: nothing was hit"),
        (ttft_bench.COLD, {"cached_tokens": 128}, "is not cold"),
        (ttft_bench.COLD, {"prompt_tokens": 1999}, "has 1999 tokens; 2000 asked"),
        (ttft_bench.COLD, {"tokens": [1]}, "answered"),
        (ttft_bench.MEMORY, {"tokens": [1]}, "answered"),
    ],
)
def test_ttft_fails(phase: str, changes: dict[str, Any], said: str) -> None:
    failures = ttft_bench.judge(changed(good_ttft(), phase, **changes), ttft_bench.JudgeConfig())
    assert failures
    assert all(said in failure for failure in failures)


def test_ttft_fails_with_too_few_samples() -> None:
    rows = [each for each in good_ttft() if each.document != "alpha"]
    failures = ttft_bench.judge(rows, ttft_bench.JudgeConfig())
    assert len(failures) == 4
    assert all("4 requests, 5 asked" in failure for failure in failures)
