"""A case is a folder: nothing else has to be touched for it to be found, run and named in messages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.framework.config import ROOT
from experiments.framework.registry import EXPERIMENTS, config_file
from experiments.run import load, run
from lmcache.errors import ConfigError

CASES = ROOT / "experiments" / "cases"


def test_every_folder_of_cases_is_an_experiment_with_a_config_of_its_name() -> None:
    folders = {path.parent.name for path in CASES.glob("*/experiment.py")}
    assert folders == {path.name for path in CASES.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders <= set(EXPERIMENTS.names())
    for name in folders:
        assert config_file(name) == CASES / name / f"{name}.yaml"


@pytest.mark.parametrize("given", ["blend_quality_gemma", "experiments/configs/blend_quality_gemma.yaml"])
def test_any_file_of_a_case_is_found_by_its_name_and_where_it_lay_once(given: str) -> None:
    assert config_file(given) == CASES / "blend_quality" / "blend_quality_gemma.yaml"


def test_a_name_that_no_case_has_is_taken_for_a_file() -> None:
    with pytest.raises(ConfigError, match="quickstrat"):
        load("quickstrat", [])


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Another package's case, installed."""
    info = tmp_path / "their_cases-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-cases\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmcache.experiments]\nnothing = their_cases.nothing.experiment\n")
    folder = tmp_path / "their_cases" / "nothing"
    folder.mkdir(parents=True)
    (folder / "nothing.yaml").write_text("experiment: nothing\nname: nothing\ncache: null\nanswer: 42\n")
    (folder / "experiment.py").write_text(
        "from experiments.framework.config import ExperimentConfig\n"
        "from experiments.framework.report import Outcome\n"
        "class Config(ExperimentConfig):\n"
        "    answer: int\n"
        "def run(config, results):\n"
        "    results.write({'answer': config.answer})\n"
        "    return Outcome({'answer': config.answer}, [], 'nothing was measured')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("their_cases", "their_cases.nothing", "their_cases.nothing.experiment"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "nothing"


def test_another_packages_case_runs_by_its_name(
    theirs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(theirs, [f"results={tmp_path / 'results'}", "answer=43"]) == 0
    assert capsys.readouterr().out.endswith("ok: nothing was measured\n")
    (row,) = tmp_path.glob("results/nothing-*/results.jsonl")
    assert row.read_text() == '{"answer": 43}\n'
