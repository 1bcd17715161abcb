"""A quickstart that went wrong fails, and says why; the same run without the fault passes."""

from __future__ import annotations

import pytest
from synthetic import changed, good_quickstart, row

from experiments.cases.quickstart import experiment as quickstart


def test_a_good_quickstart_passes() -> None:
    assert quickstart.judge(good_quickstart(), quickstart.JudgeConfig()) == []


@pytest.mark.parametrize("phase", [quickstart.LOCAL, quickstart.COLD, quickstart.MEMORY, quickstart.DISK])
def test_quickstart_fails_when_an_answer_differs(phase: str) -> None:
    rows = good_quickstart()
    last = max(i for i, each in enumerate(rows) if each.phase == phase)
    rows[last] = row(phase, rows[last].document, rows[last].question, rows[last].ttft_s, rows[last].cached_tokens)
    rows[last].tokens[-1] += 1
    (failure,) = quickstart.judge(rows, quickstart.JudgeConfig())
    assert failure.startswith(f"{phase}: {rows[last].key} answered")


@pytest.mark.parametrize("phase", [quickstart.MEMORY, quickstart.DISK])
def test_quickstart_fails_when_warm_is_slow(phase: str) -> None:
    (failure,) = quickstart.judge(changed(good_quickstart(), phase, ttft_s=1.4), quickstart.JudgeConfig())
    assert failure.startswith(f"{phase}: median TTFT 1.400 s is 2.87x faster")


def test_quickstart_compares_with_the_faster_of_the_two_cold_runs() -> None:
    rows = changed(changed(good_quickstart(), quickstart.COLD, ttft_s=40.0), quickstart.MEMORY, ttft_s=1.4)
    (failure,) = quickstart.judge(rows, quickstart.JudgeConfig())
    assert "faster than no-cache's 4.020 s" in failure


@pytest.mark.parametrize("phase", [quickstart.MEMORY, quickstart.DISK])
def test_quickstart_fails_when_nothing_was_hit(phase: str) -> None:
    failures = quickstart.judge(changed(good_quickstart(), phase, cached_tokens=0), quickstart.JudgeConfig())
    assert len(failures) == 5
    assert all(f"{phase}: nothing was hit" in failure for failure in failures)


@pytest.mark.parametrize("phase", [quickstart.NONE, quickstart.COLD])
def test_quickstart_fails_when_cold_is_not_cold(phase: str) -> None:
    failures = quickstart.judge(changed(good_quickstart(), phase, cached_tokens=128), quickstart.JudgeConfig())
    assert failures
    assert all("is not cold" in failure for failure in failures)


@pytest.mark.parametrize("phase", list(quickstart.LABELS))
def test_quickstart_fails_when_a_phase_is_missing(phase: str) -> None:
    rows = [each for each in good_quickstart() if each.phase != phase]
    assert quickstart.judge(rows, quickstart.JudgeConfig()) == [f"no requests in phase {phase}"]


def test_quickstart_fails_without_a_reference_answer() -> None:
    rows = [*good_quickstart(), row(quickstart.MEMORY, "zeta", 1, 0.3, 2432)]
    (failure,) = quickstart.judge(rows, quickstart.JudgeConfig())
    assert "zeta#1 has no answer without the cache" in failure
