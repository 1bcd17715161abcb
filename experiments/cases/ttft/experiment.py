"""The two promises about TTFT, against vLLM alone in the same run, from two engines that take turns (A B B A ...).

A warm request from memory takes little longer than a hit in vLLM's own prefix cache; a cold one takes little longer
than without us, although it is being stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pydantic import Field

from experiments.framework import plots
from experiments.framework.config import ExperimentConfig
from experiments.framework.engine import Row, Step
from experiments.framework.report import Outcome, Results, differing, spreads, table
from experiments.framework.session import Session
from experiments.framework.workloads import Corpus, load_corpus
from lmcache.config import Config as Model

NONE, LOCAL, COLD, MEMORY = "no-cache", "vllm-prefix-cache", "cold", "memory"
LABELS = {
    NONE: "cold: vLLM alone",
    COLD: "cold: with LMCache, storing",
    LOCAL: "warm: vLLM's own prefix cache",
    MEMORY: "warm: LMCache, from memory",
}
COLOURS = {NONE: "#9aa5b1", COLD: "#e0a458", LOCAL: "#cbd2d9", MEMORY: "#2a9d8f"}


class JudgeConfig(Model):
    """What must hold, of medians over the whole run."""

    max_warm_ratio: float = Field(1.5, gt=0, description="warm from memory over vLLM's own prefix-cache hit")
    max_cold_ratio: float = Field(1.05, gt=0, description="cold with us over cold without us")
    min_tokens: int = Field(2000, ge=1, description="shortest prompt that counts")
    min_samples: int = Field(5, ge=1, description="requests per phase")


class Config(ExperimentConfig):
    rounds: int = Field(2, ge=1, description="how often every document is gone over")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


def run(config: Config, results: Results) -> Outcome:
    corpus = load_corpus(config.workload, config.seed)
    session = Session(config, results, requests=config.rounds * 4 * len(corpus.documents))
    try:
        with session.engine("alone", cached=False) as alone, session.engine("lmcache", cached=True) as ours:
            for number, document in enumerate(list(corpus.documents) * config.rounds):
                for engine in (alone, ours) if number % 2 == 0 else (ours, alone):
                    session.ask(engine, *pair(corpus, document, cached=engine is ours))
    finally:
        session.close()
    return report(config, session, results)


def pair(corpus: Corpus, document: str, cached: bool) -> tuple[Step, Step]:
    """A cold request and at once a warm one, with another question."""
    first, second = (corpus.request(document, number) for number in (0, 1))
    if cached:  # vLLM's own cache is emptied in between, so that the hit is ours
        return Step(COLD, [first], reset="all"), Step(MEMORY, [second], reset="vllm")
    return Step(NONE, [first], reset="all"), Step(LOCAL, [second])


def report(config: Config, session: Session, results: Results) -> Outcome:
    rows, labels = results.rows, config.labelled(LABELS)
    failures = judge(rows, config.judge)
    found = spreads(rows)
    warm = found[MEMORY].median_s / found[LOCAL].median_s
    cold = found[COLD].median_s / found[NONE].median_s
    caption = f"{session.caption}; two engines taking turns"
    title = f"Warm: {warm:.2f}x vLLM's own prefix cache; cold: {cold:.2f}x vLLM alone"
    plots.ttft_figure(rows, labels, COLOURS, title, caption, results.folder / "ttft.png")
    print(table(rows, labels, NONE), flush=True)
    limits = config.judge
    line = (
        f"warm {warm:.2f}x vLLM's own hit (limit {limits.max_warm_ratio:g}), "
        f"cold {cold:.3f}x vLLM alone (limit {limits.max_cold_ratio:g}), medians of {found[COLD].n}"
    )
    phases = {phase: dataclasses.asdict(of) for phase, of in found.items()}
    return Outcome({"ttft": phases, "warm_ratio": warm, "cold_ratio": cold, **session.facts()}, failures, line)


def judge(rows: Sequence[Row], limits: JudgeConfig) -> list[str]:
    """What is wrong with a run's rows; empty when nothing is."""
    found = spreads(rows)
    missing = [phase for phase in LABELS if phase not in found]
    if missing:
        return [f"no requests in phase {', '.join(missing)}"]
    failures = [
        f"{p}: {of.n} requests, {limits.min_samples} asked" for p, of in found.items() if of.n < limits.min_samples
    ]
    for row in rows:
        if row.prompt_tokens < limits.min_tokens:
            failures.append(f"{row.phase}: {row.key} has {row.prompt_tokens} tokens; {limits.min_tokens} asked")
        if row.phase in (MEMORY, LOCAL) and row.cached_tokens == 0:
            failures.append(f"{row.phase}: nothing was hit for {row.key}")
        if row.phase in (NONE, COLD) and row.cached_tokens:
            failures.append(f"{row.phase}: {row.key} is not cold, {row.cached_tokens} of its tokens were cached")
    failures += differing([row for row in rows if row.phase in (NONE, COLD)], NONE)
    failures += differing([row for row in rows if row.phase in (LOCAL, MEMORY)], LOCAL)
    for above, below, limit in ((MEMORY, LOCAL, limits.max_warm_ratio), (COLD, NONE, limits.max_cold_ratio)):
        ratio = found[above].median_s / found[below].median_s
        if ratio > limit:
            failures.append(
                f"{above}: median TTFT {found[above].median_s:.3f} s is {ratio:.3f}x {below}'s "
                f"{found[below].median_s:.3f} s; at most {limit:g}x is asked"
            )
    return failures
