"""Rows, table, figure and summary are written; the command's status is the judge's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import changed, good_quickstart, good_ttft

from experiments import run
from experiments.cases.quickstart import experiment as quickstart
from experiments.cases.ttft import experiment as ttft_bench
from experiments.framework import engine, plots
from experiments.framework.engine import Row
from experiments.framework.report import Results, table

# What the synthetic rows are rows of.
SIZE = ["workload.documents=5", "workload.questions=2"]
TOLD = {"started": 1.0, "hardware": "a test", "cores": 2, "versions": {"vllm": "0", "torch": "2+cpu"}}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make engines answer with the given rows instead of starting vLLM."""

    def give(rows: list[Row]) -> None:
        left = list(rows)

        class Pretended(contextlib.nullcontext[Any]):
            told = TOLD

            def __init__(self, job: engine.Job, log: Path) -> None:
                super().__init__(self)
                assert (job.kv_transfer is None) == (job.run == 0)

            def run(self, step: engine.Step) -> Iterator[Row]:
                for request in step.requests:
                    found = next((row for row in left if row.phase == step.phase), None)
                    assert found, f"{step.phase}: {request.key} is more than the run should ask"
                    left.remove(found)
                    yield found

        monkeypatch.setattr("experiments.framework.session.Engine", Pretended)
        monkeypatch.setattr("experiments.framework.session.model_path", lambda config: "models/pretended")

    return give


@pytest.mark.parametrize(("name", "rows"), [("quickstart", good_quickstart()), ("ttft", good_ttft() * 2)])
def test_run_writes_everything_and_passes(
    name: str, rows: list[Row], pretend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(rows)
    assert run.run(name, [f"results={tmp_path}", *SIZE]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"{name}-2")
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted(json.dumps(dataclasses.asdict(row)) for row in rows)
    assert json.loads((folder / "summary.json").read_text())["passed"] is True
    assert (folder / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "config.yaml").is_file()
    assert not (folder / "work").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok: ")


def test_failed_run_says_why_and_exits_with_1(pretend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(changed(good_quickstart(), quickstart.DISK, ttft_s=3.9))
    assert run.run("quickstart", [f"results={tmp_path}", *SIZE]) == 1
    out = capsys.readouterr().out
    assert "FAILED disk: median TTFT 3.900 s" in out
    assert out.splitlines()[-1].startswith("FAILED: ")
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["passed"] is False
    assert len(summary["failures"]) == 1


def test_engine_that_dies_is_an_error_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    child.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such model')\n")
    child.chmod(0o755)
    monkeypatch.setattr("experiments.framework.session.model_path", lambda config: "models/pretended")
    popen = engine.subprocess.Popen
    monkeypatch.setattr(engine.subprocess, "Popen", lambda command, **options: popen([str(child)], **options))
    assert run.run("quickstart", [f"results={tmp_path / 'results'}"]) == 3
    assert "no such model" in capsys.readouterr().err


def test_table_has_a_line_per_phase_with_its_speedup() -> None:
    lines = table(good_quickstart(), quickstart.LABELS, quickstart.NONE).splitlines()
    assert len(lines) == 1 + len(quickstart.LABELS)
    assert len({len(line) for line in lines}) == 1
    (memory,) = [line for line in lines if line.startswith(quickstart.LABELS[quickstart.MEMORY])]
    assert "12.6x" in memory
    assert "12160 of 12500" in memory


def test_rows_are_on_disk_as_soon_as_they_are_measured(tmp_path: Path) -> None:
    _, config = run.load("ttft", [f"results={tmp_path}"])
    results = Results(config)
    for count, each in enumerate(good_ttft()[:3], start=1):
        results.add(each)
        assert len((results.folder / "results.jsonl").read_text().splitlines()) == count


def test_figure_leaves_out_phases_without_requests(tmp_path: Path) -> None:
    rows = [each for each in good_ttft() if each.phase != ttft_bench.MEMORY]
    plots.ttft_figure(rows, ttft_bench.LABELS, ttft_bench.COLOURS, "title", "caption", tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("override", "name"),
    [("cache=null", "no connector"), ("connector.kv_connector=Other", "Other"), ("seed=1", "LMCache")],
)
def test_labels_name_what_ran(override: str, name: str) -> None:
    _, config = run.load("ttft", [override])
    assert config.labelled({"memory": "LMCache, from memory"}) == {"memory": f"{name}, from memory"}
