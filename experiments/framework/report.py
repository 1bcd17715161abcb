"""What a run leaves behind: rows as they come, the resolved config, a summary, a table for the terminal."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from experiments.framework.config import ROOT, ExperimentConfig
from experiments.framework.engine import Row


@dataclass(frozen=True)
class Spread:
    """Times to first token of one phase."""

    n: int
    median_s: float
    min_s: float
    max_s: float
    cached_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class Outcome:
    """The verdict of an experiment: it passed when there are no failures."""

    summary: dict[str, Any]
    failures: list[str]
    line: str


class Results:
    """The folder of one run: ``config.yaml``, ``results.jsonl``, ``summary.json``, figures, ``log/``."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.folder = make_folder(ROOT / config.results, config.name)
        self.log = self.folder / "log"
        self.log.mkdir()
        self.rows: list[Row] = []
        resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.folder / "config.yaml").write_text(resolved)

    def add(self, row: Row) -> None:
        """Keep ``row``, in the file too."""
        self.rows.append(row)
        self.write(dataclasses.asdict(row))

    def write(self, values: dict[str, Any]) -> None:
        """A line of results.jsonl, at once: a run that is cut off leaves what it has measured."""
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def table(self, text: str) -> None:
        """Print a table, and keep it as table.md."""
        (self.folder / "table.md").write_text(text + "\n")
        print(text, flush=True)

    def close(self, outcome: Outcome) -> None:
        verdict = {"passed": not outcome.failures, "failures": outcome.failures, "line": outcome.line}
        (self.folder / "summary.json").write_text(json.dumps({**verdict, **outcome.summary}, indent=2) + "\n")


def make_folder(results: Path, name: str) -> Path:
    """A new folder ``<name>-<timestamp>`` in ``results``."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        folder = results / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{results} is full of runs of this second")


def spreads(rows: Iterable[Row]) -> dict[str, Spread]:
    """Phase -> its spread, in the order in which the phases appear."""
    phases: dict[str, list[Row]] = {}
    for row in rows:
        phases.setdefault(row.phase, []).append(row)
    return {phase: spread(of_phase) for phase, of_phase in phases.items()}


def spread(rows: Sequence[Row]) -> Spread:
    times = [row.ttft_s for row in rows]
    cached = sum(row.cached_tokens for row in rows)
    prompts = sum(row.prompt_tokens for row in rows)
    return Spread(len(rows), median(times), min(times), max(times), cached, prompts)


def table(rows: Sequence[Row], labels: dict[str, str], baseline: str) -> str:
    """Phases as lines; speed-ups are ratios of medians to ``baseline``'s."""
    found = spreads(rows)
    head = ("", "requests", "TTFT median", "min", "max", "speedup", "tokens from cache")
    lines = [head]
    for phase, label in labels.items():
        if (of := found.get(phase)) is None:
            continue
        faster = f"{found[baseline].median_s / of.median_s:.1f}x" if baseline in found else "-"
        times = (f"{of.median_s:.3f} s", f"{of.min_s:.3f}", f"{of.max_s:.3f}")
        lines.append((label, str(of.n), *times, faster, f"{of.cached_tokens} of {of.prompt_tokens}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def differing(rows: Iterable[Row], reference: str) -> list[str]:
    """One sentence for each row whose tokens are not those of the same request in phase ``reference``."""
    rows = list(rows)
    wanted = {row.key: row for row in rows if row.phase == reference}
    problems = []
    for row in rows:
        expected = wanted.get(row.key)
        if expected is None:
            problems.append(f"{row.phase}: {row.key} has no answer without the cache to compare with")
        elif row.tokens != expected.tokens:
            problems.append(f"{row.phase}: {row.key} answered {row.text!r}, without the cache {expected.text!r}")
    return problems
