"""Synthetic rows of a run that went well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.cases.quickstart import experiment as quickstart
from experiments.cases.ttft import experiment as ttft_bench
from experiments.framework.engine import Row

DOCUMENTS = ("alpha", "beta", "gamma", "delta", "epsilon")


def row(phase: str, document: str, question: int, ttft_s: float, cached: int, **changes: Any) -> Row:
    answer = [len(document), question, 7]
    made = Row(phase, document, question, 0, 2500, cached, ttft_s, ttft_s + 1, answer, f"{document} {question}")
    return replace(made, **changes)


def good_quickstart() -> list[Row]:
    rows = []
    for number, name in enumerate(DOCUMENTS):
        late = 0.01 * number
        rows += [row(quickstart.NONE, name, question, 4.0 + late, 0) for question in (0, 1)]
        rows.append(row(quickstart.LOCAL, name, 0, 0.2 + late, 2432))
        rows.append(row(quickstart.COLD, name, 0, 4.1 + late, 0))
        rows.append(row(quickstart.MEMORY, name, 1, 0.3 + late, 2432))
        rows.append(row(quickstart.DISK, name, 1, 0.5 + late, 2432))
    return rows


def good_ttft() -> list[Row]:
    rows = []
    for number, name in enumerate(DOCUMENTS):
        late = 0.001 * number
        rows.append(row(ttft_bench.NONE, name, 0, 4.0 + late, 0))
        rows.append(row(ttft_bench.LOCAL, name, 1, 0.2 + late, 2432))
        rows.append(row(ttft_bench.COLD, name, 0, 4.1 + late, 0))
        rows.append(row(ttft_bench.MEMORY, name, 1, 0.25 + late, 2432))
    return rows


def changed(rows: list[Row], phase: str, **changes: Any) -> list[Row]:
    """The rows, with those of ``phase`` changed."""
    return [replace(each, **changes) if each.phase == phase else each for each in rows]
