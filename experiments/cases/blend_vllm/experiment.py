"""blend_ttft in real vLLM: prompts of known passages through the connector, against vLLM alone, taking turns.

Each selector has an engine of its own, which has read the passages behind the prefix, one request each; vLLM alone is
another engine. TTFT is vLLM's own, from the arrival of a request to its first token.
"""

from __future__ import annotations

import dataclasses
import random
from contextlib import ExitStack
from typing import Any, Literal

from pydantic import Field

from experiments.blending.prompts import Encode, Prompt, filled
from experiments.blending.ttft import FULL, JudgeConfig, ScaleConfig, Timed, draw, judge, judged, summary, table
from experiments.framework.config import ROOT, ExperimentConfig, scale_of
from experiments.framework.engine import Engine, Step
from experiments.framework.report import Outcome, Results
from experiments.framework.session import Session
from experiments.framework.workloads import Request

LEARN, ASK = "learn", "ask"


class Config(ExperimentConfig):
    scale: Literal["ci", "full"] = Field("ci", description="which of the scales")
    scales: dict[str, ScaleConfig] = Field(description="how much each scale measures")
    selectors: dict[str, dict[str, Any]] = Field(description="name in the table: the selector's type and options")
    ratios: tuple[float, ...] = Field((0.15,), description="shares of the reused tokens computed again")
    passage: int = Field(256, ge=32, description="tokens of a passage, about")
    question: int = Field(32, ge=1, description="tokens behind the passages, which vLLM computes")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


def run(config: Config, results: Results) -> Outcome:
    scale = scale_of(config.scales, config.scale)
    blends = [(name, ratio) for name in config.selectors for ratio in config.ratios]
    rounds = len(scale.lengths) * (scale.repeats + 1)
    session = Session(config, results, requests=rounds * (1 + len(blends)))
    prompts = [prompt_of(config, session.model, length) for length in scale.lengths]
    try:
        with ExitStack() as started:
            engines: dict[tuple[str, float], Engine] = {
                (FULL, 1.0): started.enter_context(session.engine("alone", cached=False))
            }
            for name, ratio in blends:
                options = {"blend": {"find": "request", "selector": {**config.selectors[name], "ratio": ratio}}}
                engine = session.engine(f"{name}-{ratio:g}", cached=True, options=options)
                engines[name, ratio] = started.enter_context(engine)
            timed, failures = measure(config, session, engines, prompts, scale.repeats)
    finally:
        session.close()
    return report(config, session, results, timed, failures, scale.repeats)


def prompt_of(config: Config, model: str, length: int) -> Prompt:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    files = sorted((ROOT / config.workload.corpus / "documents").glob("*.txt"))
    texts = [file.read_text().strip() for file in files]
    encode: Encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    return filled(texts, encode, length=length, passage=config.passage, question=config.question)


def measure(
    config: Config,
    session: Session,
    engines: dict[tuple[str, float], Engine],
    prompts: list[Prompt],
    repeats: int,
) -> tuple[list[Timed], list[str]]:
    """All engines on every prompt, in a new order each time, and what is wrong with what they did."""
    rows, failures = [], []
    for prompt in prompts:
        length = len(prompt.asked)
        reach = prompt.segments[-1].stop
        for (name, _), engine in engines.items():
            if name != FULL:
                list(engine.run(Step(LEARN, learning(prompt), reset="vllm")))
        for repeat in range(-1, repeats):  # the first warms up
            order = list(engines)
            random.Random(f"{config.seed} {length} {repeat}").shuffle(order)
            for name, ratio in order:
                kv = None if name == FULL else {"lmcache.blend": {"spans": spans(prompt)}}
                request = Request(f"{name}-{length}", max(repeat, 0), tokens=prompt.asked, kv_transfer_params=kv)
                (row,) = engines[name, ratio].run(Step(ASK, [request], reset="vllm"))
                session.bar.update()
                if row.cached_tokens != (0 if name == FULL else reach):
                    failures.append(f"{name} at {length} tokens: {row.cached_tokens} were reused, not {reach}")
                if repeat >= 0:
                    session.results.add(row)
                    rows.append(Timed(length, name, ratio, repeat, row.ttft_s))
    return rows, failures


def learning(prompt: Prompt) -> list[Request]:
    """A request for each passage, behind the prefix."""
    first = len(prompt.prefix)
    return [
        Request(
            f"passage-{number}",
            0,
            tokens=[*prompt.prefix, *passage],
            kv_transfer_params={"lmcache.blend": {"spans": [[first, first + len(passage)]]}},
        )
        for number, passage in enumerate(prompt.passages)
    ]


def spans(prompt: Prompt) -> list[list[int]]:
    return [[segment.start, segment.stop] for segment in prompt.segments]


def report(
    config: Config, session: Session, results: Results, rows: list[Timed], failures: list[str], repeats: int
) -> Outcome:
    found = summary(rows)
    results.table(table(found))
    caption = f"{session.caption}; medians of {repeats}, KV in memory"
    title = "Time to first token of a prompt made of known passages, in vLLM"
    draw(found, title, caption, results.folder / "blend_vllm.png")
    line = ", ".join(f"{f.selector} {f.speedup:.2f}x at {f.length} tokens" for f in judged(found, config.judge))
    told = {"found": [dataclasses.asdict(f) for f in found], "caption": caption, **session.facts()}
    failures = [*failures, *judge(found, config.judge)]
    return Outcome(told, failures, f"{config.judge.ratio:.0%} computed again, against vLLM alone: {line}")
