"""A config is checked before anything starts; typing errors are named with what is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.cases.quickstart.experiment import Config
from experiments.framework.config import ROOT, read, scale_of, typed
from experiments.framework.report import Results
from experiments.run import load
from lmcache.errors import ConfigError

QUICKSTART = "quickstart"


@pytest.mark.parametrize("file", sorted((ROOT / "experiments" / "cases").glob("*/*.yaml")), ids=lambda file: file.name)
def test_shipped_configs_are_valid(file: Path) -> None:
    experiment, config = load(str(file), [])
    assert isinstance(config, experiment.Config)
    assert config.experiment == file.parent.name


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sead=1", "seed"),
        ("workload.document=3", "documents"),
        ("engine.thread=2", "threads"),
        ("judge.min_speed=2", "min_speedup"),
        ("cache.memory.capcity=1GiB", "capacity"),
        ("cache.teirs=[]", "tiers"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_known_ones(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key .*known: .*{named}"):
        load(QUICKSTART, [override])


@pytest.mark.parametrize("override", ["workload.documents=none", "engine.threads=0", "judge.min_speedup=-1"])
def test_wrong_value_is_an_error(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load(QUICKSTART, [override])


@pytest.mark.parametrize("override", ["seed", "=3"])
def test_override_without_a_key_or_value_is_an_error(override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        load(QUICKSTART, [override])


def test_a_scale_that_is_not_there_names_the_others() -> None:
    assert scale_of({"ci": 1, "full": 2}, "full") == 2
    with pytest.raises(ConfigError, match="scale=ci: scales has small, full"):
        scale_of({"small": 1, "full": 2}, "ci")


def test_unknown_experiment_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"known: .*quickstart, .*ttft"):
        load(QUICKSTART, ["experiment=quickstrat"])


def test_missing_and_broken_files_are_config_errors(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    for path in (tmp_path / "none.yaml", broken):
        with pytest.raises(ConfigError, match=path.name):
            read(path)


def test_overrides_change_only_what_they_name() -> None:
    _, config = load(QUICKSTART, ["workload.documents=2", "cache.memory.capacity=1GiB"])
    _, before = load(QUICKSTART, [])
    assert config.workload.documents == 2
    assert config.workload.questions == before.workload.questions
    assert config.cache["memory"] == {"capacity": "1GiB"}
    assert config.cache["tiers"] == before.cache["tiers"]


def test_cache_null_means_vllm_alone(tmp_path: Path) -> None:
    _, config = load(QUICKSTART, ["cache=null"])
    assert config.kv_transfer(tmp_path) is None


def test_our_connector_gets_the_cache_options(tmp_path: Path) -> None:
    _, config = load(QUICKSTART, [])
    transfer = config.kv_transfer(tmp_path)
    assert transfer["kv_connector"] == "LMCacheConnector"
    assert transfer["kv_connector_module_path"] == "lmcache.connector"
    assert transfer["kv_connector_extra_config"]["tiers"][0]["path"] == f"{tmp_path}/cache"


def test_another_connector_does_not_inherit_our_module(tmp_path: Path) -> None:
    values = {
        "experiment": "quickstart",
        "name": "x",
        "connector": {"kv_connector": "Other"},
        "cache": {"any": "thing"},
    }
    transfer = typed(Config, values, "test").kv_transfer(tmp_path)
    assert transfer is not None
    assert transfer["kv_connector"] == "Other"
    assert "kv_connector_module_path" not in transfer
    assert transfer["kv_connector_extra_config"] == {"any": "thing"}


def test_resolved_config_is_written_and_can_be_run_again(tmp_path: Path) -> None:
    _, config = load(QUICKSTART, [f"results={tmp_path}", "workload.documents=2"])
    results = Results(config)
    assert results.folder.parent == tmp_path
    _, again = load(str(results.folder / "config.yaml"), [])
    assert again == config
    assert yaml.safe_load((results.folder / "config.yaml").read_text())["workload"]["documents"] == 2


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    _, config = load(QUICKSTART, [f"results={tmp_path}"])
    assert Results(config).folder != Results(config).folder


@pytest.mark.parametrize(
    ("arguments", "status", "said"), [(["--help"], 0, "usage"), ([QUICKSTART, "sead=1"], 2, "unknown key sead")]
)
def test_command_line(arguments: list[str], status: int, said: str) -> None:
    command = [sys.executable, "-m", "experiments.run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
