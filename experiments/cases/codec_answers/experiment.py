"""Codecs in real vLLM: which greedy answers stay what they were, how soon they come, how much memory their KV takes.

1. vLLM alone     every question about every document, nothing cached: the answers to keep
2. each codec     a new vLLM; a question about each document fills the cache, then every question is asked from memory
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import Any

from pydantic import Field

from experiments.framework.config import ExperimentConfig
from experiments.framework.engine import Row, Step
from experiments.framework.report import Outcome, Results
from experiments.framework.session import Session
from experiments.framework.workloads import load_corpus
from experiments.kv_profile import with_profile
from lmcache.config import Config as Model

NONE, FILL = "no-cache", "fill"


class JudgeConfig(Model):
    """What must hold."""

    min_equal: dict[str, float] = Field(default_factory=dict, description="codec: least share of equal answers")


class Config(ExperimentConfig):
    codecs: dict[str, dict[str, Any]] = Field(description="name in the table: the engine's codec option")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


@dataclasses.dataclass(frozen=True)
class Found:
    """equal: answers whose tokens are all the same. prefix: mean share of an answer before its first other token."""

    codec: str
    answers: int
    equal: float
    prefix: float
    ttft_s: float
    cached_tokens: int


def run(config: Config, results: Results) -> Outcome:
    corpus = load_corpus(config.workload, config.seed)
    questions = config.workload.questions
    asked = [request for number in range(questions) for request in corpus.round(number)]
    session = Session(config, results, requests=len(asked) + len(config.codecs) * (len(asked) + len(corpus.documents)))
    found = []
    try:
        with session.engine("alone", cached=False) as engine:
            session.ask(engine, Step(NONE, asked, reset="vllm"))
        for name, options in config.codecs.items():
            codec = with_profile(options, config.engine.threads)
            with session.engine(name, cached=True, options={"codec": codec}) as engine:
                session.ask(engine, Step(FILL, corpus.round(0)), Step(name, asked, reset="vllm"))
            found.append(compare(name, results.rows))
    finally:
        session.close()
    print(table(found), flush=True)
    failures = judge(found, config.judge)
    line = ", ".join(f"{f.codec} {f.equal:.0%}" for f in found) + " of answers unchanged"
    summary = {f.codec: dataclasses.asdict(f) for f in found}
    return Outcome({"codecs": summary, **session.facts()}, failures, line)


def compare(codec: str, rows: Sequence[Row]) -> Found:
    """The answers with ``codec`` against those without a cache."""
    wanted = {row.key: row.tokens for row in rows if row.phase == NONE}
    given = [row for row in rows if row.phase == codec]
    shares = [_same_before(row.tokens, wanted[row.key]) for row in given]
    return Found(
        codec,
        len(given),
        sum(row.tokens == wanted[row.key] for row in given) / len(given),
        sum(shares) / len(shares),
        median(row.ttft_s for row in given),
        min(row.cached_tokens for row in given),
    )


def _same_before(tokens: Sequence[int], wanted: Sequence[int]) -> float:
    longest = max(len(tokens), len(wanted), 1)
    pairs = enumerate(zip(tokens, wanted, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(wanted))) / longest


def table(found: Sequence[Found]) -> str:
    lines = [
        f"{'codec':<16} {'answers':>8} {'equal':>7} {'same before':>12} {'TTFT median':>12} {'tokens from cache':>18}"
    ]
    for f in found:
        lines.append(
            f"{f.codec:<16} {f.answers:8d} {f.equal:7.0%} {f.prefix:12.0%} {f.ttft_s:10.2f} s "
            f"{f.cached_tokens:10d} or more"
        )
    return "\n".join(lines)


def judge(found: Sequence[Found], limits: JudgeConfig) -> list[str]:
    failures = [f"{f.codec}: a question was answered without the cache" for f in found if f.cached_tokens == 0]
    known = {f.codec: f for f in found}
    for codec, least in limits.min_equal.items():
        if codec not in known:
            failures.append(f"judge.min_equal names {codec!r}, which is not among the codecs")
        elif known[codec].equal < least:
            failures.append(f"{codec}: {known[codec].equal:.0%} of answers are unchanged, at least {least:.0%} asked")
    return failures
