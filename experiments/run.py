"""Run an experiment: python -m experiments.run CASE [key.path=value ...]

CASE is the name of a folder of experiments/cases (quickstart), or the path of a YAML file.
YAML -> typed config -> run. The folder results/<name>-<timestamp>/ gets config.yaml (resolved), results.jsonl (one row
per request), summary.json, figures and logs. Exits with 1 when the experiment's judge finds fault, with 2 for a wrong
configuration, with 3 when an engine fails.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from experiments.framework.registry import Experiment


def load(given: str, overrides: list[str]) -> tuple[Experiment, Any]:
    """The experiment that the YAML file ``given`` (or a case's own) names, and its config. Raises ConfigError."""
    from experiments.framework.config import read, typed
    from experiments.framework.registry import EXPERIMENTS, config_file

    path = config_file(given)
    values = read(path, overrides)
    name = values.get("experiment")
    if name not in EXPERIMENTS.names():
        raise ConfigError(f"{path}: experiment is {name!r}; known: {', '.join(EXPERIMENTS.names())}")
    experiment = EXPERIMENTS.get(name)
    return experiment, typed(experiment.Config, values, str(path))


def run(given: str, overrides: list[str]) -> int:
    """Run it and return the exit status."""
    from experiments.framework.engine import EngineFailed
    from experiments.framework.model import ModelError
    from experiments.framework.report import Results

    try:
        experiment, config = load(given, overrides)
        results = Results(config)
        outcome = experiment.run(config, results)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EngineFailed, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    results.close(outcome)
    for failure in outcome.failures:
        print(f"FAILED {failure}", flush=True)
    print(f"results: {results.folder}")
    print(f"{'FAILED' if outcome.failures else 'ok'}: {outcome.line}", flush=True)
    return 1 if outcome.failures else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", help="a folder of experiments/cases, or a YAML file; for example quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the file")
    arguments = parser.parse_args()
    try:
        sys.exit(run(arguments.case, arguments.overrides))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
