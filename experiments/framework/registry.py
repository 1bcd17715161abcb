"""Which experiments there are: the folders of experiments/cases, and those that other packages bring along.

A case is a folder with ``experiment.py``, which has a ``Config`` and a ``run``, and with a YAML file for each of its
runs, of which ``<name>.yaml`` is the one that the bare name stands for. Another package names its ``experiment`` module
in an entry point of the group ``lmcache.experiments``: ``my_case = "my_package.my_case.experiment"``.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any, Protocol

from experiments.framework.config import ROOT, ExperimentConfig
from experiments.framework.report import Outcome, Results
from lmcache.registry import Registry


class Experiment(Protocol):
    """What a case's ``experiment.py`` defines."""

    __file__: str
    Config: type[ExperimentConfig]

    def run(self, config: Any, results: Results) -> Outcome:
        """Do it. ``config`` is a ``Config``; rows go to ``results`` as they come."""


_FOLDERS = [module.name for module in pkgutil.iter_modules([str(ROOT / "experiments" / "cases")]) if module.ispkg]

EXPERIMENTS: Registry[Experiment] = Registry(
    "experiment", {name: f"experiments.cases.{name}.experiment" for name in _FOLDERS}, "lmcache.experiments"
)


def config_file(given: str) -> Path:
    """The YAML file: ``given`` is its path, or its name without ``.yaml`` when it lies in the folder of a case.

    A path where there is no file stands for the case's file of that name: they lay in experiments/configs once.
    """
    path = Path(given)
    if given in EXPERIMENTS.names():
        return Path(EXPERIMENTS.get(given).__file__).with_name(f"{given}.yaml")
    return path if path.exists() else next((ROOT / "experiments" / "cases").glob(f"*/{path.stem}.yaml"), path)
