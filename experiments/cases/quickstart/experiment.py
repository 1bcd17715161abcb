"""Questions about documents, four ways: vLLM alone, with an empty cache, warm from memory, and warm from disk.

    1. vLLM alone      every question, its prefix cache emptied before each; then a hit in that prefix cache
    2. with LMCache    the first question about each document (cold), then the others with only vLLM's own cache emptied
    3. a new process   the last question about each document, from disk (the kernel's page cache dropped before)

The greedy answers must be those of 1, token for token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pydantic import Field

from experiments.framework import plots
from experiments.framework.config import ExperimentConfig
from experiments.framework.engine import Row, Step, forget_page_cache
from experiments.framework.report import Outcome, Results, differing, spreads, table
from experiments.framework.session import Session
from experiments.framework.workloads import Corpus, load_corpus
from lmcache.config import Config as Model

NONE, LOCAL, COLD, MEMORY, DISK = "no-cache", "vllm-prefix-cache", "cold", "memory", "disk"
LABELS = {
    NONE: "vLLM alone",
    LOCAL: "vLLM alone, still on the device",
    COLD: "LMCache, first sight",
    MEMORY: "LMCache, from memory",
    DISK: "LMCache, from disk after a restart",
}
COLOURS = {NONE: "#9aa5b1", LOCAL: "#cbd2d9", COLD: "#e0a458", MEMORY: "#2a9d8f", DISK: "#3d6fb4"}


class JudgeConfig(Model):
    """What must hold."""

    min_speedup: float = Field(3.0, gt=0, description="cold over warm, of medians, from memory and from disk")


class Config(ExperimentConfig):
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


def run(config: Config, results: Results) -> Outcome:
    corpus = load_corpus(config.workload, config.seed)
    documents, questions = len(corpus.documents), config.workload.questions
    session = Session(config, results, requests=documents * (2 * questions + 2))
    try:
        with session.engine("alone", cached=False) as engine:
            session.ask(engine, *alone(corpus, questions))
        with session.engine("memory", cached=True) as engine:
            others = [request for number in range(1, questions) for request in corpus.round(number)]
            session.ask(engine, Step(COLD, corpus.round(0)), Step(MEMORY, others, reset="vllm"))
        forget_page_cache(session.work)
        with session.engine("disk", cached=True) as engine:
            session.ask(engine, Step(DISK, corpus.round(questions - 1)))
    finally:
        session.close()
    return report(config, session, results)


def alone(corpus: Corpus, questions: int) -> list[Step]:
    steps = []
    for document in corpus.documents:
        requests = [corpus.request(document, number) for number in range(questions)]
        steps += [Step(NONE, requests, reset="vllm"), Step(LOCAL, requests[:1])]
    return steps


def report(config: Config, session: Session, results: Results) -> Outcome:
    rows, labels = results.rows, config.labelled(LABELS)
    failures = judge(rows, config.judge)
    found = spreads(rows)
    gain = {phase: found[NONE].median_s / found[phase].median_s for phase in (MEMORY, DISK)}
    tokens = found[NONE].prompt_tokens // found[NONE].n
    title = f"A document read before answers {gain[MEMORY]:.0f}x sooner, {gain[DISK]:.0f}x after a restart"
    caption = f"{session.caption}; documents of about {tokens} tokens; disk: page cache dropped"
    if failures:
        title = "TTFT of questions about documents (this run failed)"
    plots.ttft_figure(rows, labels, COLOURS, title, caption, results.folder / "ttft.png")
    print(table(rows, labels, NONE), flush=True)
    line = (
        f"TTFT {found[NONE].median_s:.2f} s without cache, {found[MEMORY].median_s:.2f} s from memory "
        f"({gain[MEMORY]:.1f}x), {found[DISK].median_s:.2f} s from disk after a restart ({gain[DISK]:.1f}x); "
        + ("answers differ or a limit was missed" if failures else "same answers everywhere")
    )
    phases = {phase: dataclasses.asdict(of) for phase, of in found.items()}
    return Outcome({"ttft": phases, "speedup": gain, **session.facts()}, failures, line)


def judge(rows: Sequence[Row], limits: JudgeConfig) -> list[str]:
    """What is wrong with a run's rows; empty when nothing is."""
    found = spreads(rows)
    missing = [phase for phase in LABELS if phase not in found]
    if missing:
        return [f"no requests in phase {', '.join(missing)}"]
    failures = differing(rows, NONE)
    for row in rows:
        if row.phase in (MEMORY, DISK, LOCAL) and row.cached_tokens == 0:
            failures.append(f"{row.phase}: nothing was hit for {row.key}")
        if row.phase in (NONE, COLD) and row.cached_tokens:
            failures.append(f"{row.phase}: {row.key} is not cold, {row.cached_tokens} of its tokens were cached")
    # The faster of the two: a slow store must not make a warm run look good.
    cold = min((NONE, COLD), key=lambda phase: found[phase].median_s)
    for phase in (MEMORY, DISK):
        ratio = found[cold].median_s / found[phase].median_s
        if ratio < limits.min_speedup:
            failures.append(
                f"{phase}: median TTFT {found[phase].median_s:.3f} s is {ratio:.2f}x faster than {cold}'s "
                f"{found[cold].median_s:.3f} s; at least {limits.min_speedup:g}x is asked"
            )
    return failures
