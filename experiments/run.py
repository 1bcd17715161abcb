"""Run an experiment: python -m experiments.run experiments/cases/quickstart/quickstart.yaml workload.documents=3 ...

YAML -> typed config -> run. The folder results/<name>-<timestamp>/ gets config.yaml (resolved), results.jsonl (one row
per request), summary.json, figures and logs. Exits with 1 when the experiment's judge finds fault, with 2 for a wrong
configuration, with 3 when an engine fails.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from experiments.framework.config import read, typed
from lmcache.errors import ConfigError

EXPERIMENTS = {
    "quickstart": "experiments.cases.quickstart.experiment",
    "ttft": "experiments.cases.ttft.experiment",
    "codec_quality": "experiments.cases.codec_quality.experiment",
    "codec_answers": "experiments.cases.codec_answers.experiment",
    "replay": "experiments.cases.replay.experiment",
    "replay_matrix": "experiments.cases.replay_matrix.experiment",
    "blend_loading": "experiments.cases.blend_loading.experiment",
    "blend_quality": "experiments.cases.blend_quality.experiment",
    "blend_ttft": "experiments.cases.blend_ttft.experiment",
    "blend_vllm": "experiments.cases.blend_vllm.experiment",
    "blend_learned": "experiments.cases.blend_learned.experiment",
}


def load(path: str, overrides: list[str]) -> tuple[Any, Any]:
    """The experiment's module and its config. Raises ConfigError."""
    values = read(path, overrides)
    name = values.get("experiment")
    if name not in EXPERIMENTS:
        raise ConfigError(f"{path}: experiment is {name!r}; known: {', '.join(EXPERIMENTS)}")
    module = importlib.import_module(EXPERIMENTS[name])
    return module, typed(module.Config, values, path)


def run(path: str, overrides: list[str]) -> int:
    """Run it and return the exit status."""
    from experiments.framework.engine import EngineFailed
    from experiments.framework.model import ModelError
    from experiments.framework.report import Results

    try:
        module, config = load(path, overrides)
        results = Results(config)
        outcome = module.run(config, results)
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
    parser.add_argument("config", help="YAML file, for example experiments/cases/quickstart/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the file")
    arguments = parser.parse_args()
    try:
        sys.exit(run(arguments.config, arguments.overrides))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
