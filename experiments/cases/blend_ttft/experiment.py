"""Time to first token of a blended prompt against a full prefill, by length and by the share that is computed again.

The Hugging Face path: passages were learned and lie in the memory tier; a blend finds them in the prompt by content,
retrieves and moves them, computes what the selector chooses, and gives the last token's logits and all KV. The full
prefill is the model's own forward pass with a KV cache and logits of the last token only. Methods take turns.

The same through vLLM is blend_vllm.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from tqdm import tqdm

from experiments.blending.prompts import Prompt, filled
from experiments.blending.quality import check_reused
from experiments.blending.session import BlendSession, open_session
from experiments.blending.ttft import FULL, JudgeConfig, ScaleConfig, Timed, draw, judge, judged, summary, table
from experiments.framework.config import ExperimentConfig, scale_of
from experiments.framework.report import Outcome, Results


class Config(ExperimentConfig):
    scale: Literal["ci", "full"] = Field("ci", description="which of the scales")
    scales: dict[str, ScaleConfig] = Field(description="how much each scale measures")
    selectors: dict[str, dict[str, Any]] = Field(description="name in the table: the selector's type and options")
    ratios: tuple[float, ...] = Field((0.0, 0.15, 0.3), description="shares of the reused tokens computed again")
    passage: int = Field(256, ge=32, description="tokens of a passage, about")
    question: int = Field(32, ge=1, description="tokens behind the passages, always computed")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


def run(config: Config, results: Results) -> Outcome:
    scale = scale_of(config.scales, config.scale)
    rows: list[Timed] = []
    with open_session(config) as session, tqdm(total=len(scale.lengths) * scale.repeats, unit="round") as bar:
        caption = f"{session.caption}; medians of {scale.repeats}, KV in memory"
        for length in scale.lengths:
            for row in measure(session, config, length, scale.repeats, bar.update):
                results.write(dataclasses.asdict(row))
                rows.append(row)
    found = summary(rows)
    results.table(table(found))
    failures = judge(found, config.judge)
    title = "Time to first token of a prompt made of known passages"
    draw(found, title, caption, results.folder / "blend_ttft.png")
    line = ", ".join(f"{f.selector} {f.speedup:.2f}x at {f.length} tokens" for f in judged(found, config.judge))
    told = {"found": [dataclasses.asdict(f) for f in found], "caption": caption}
    return Outcome(told, failures, f"{config.judge.ratio:.0%} computed again, against a full prefill: {line}")


@torch.no_grad()
def measure(
    session: BlendSession, config: Config, length: int, repeats: int, done: Callable[[], object]
) -> list[Timed]:
    """All methods on one prompt, in a new order each time."""
    texts = list(session.texts.values())
    prompt = filled(texts, session.encode, length=length, passage=config.passage, question=config.question)
    session.manager.clear()
    calls = methods(session, prompt, config.selectors, config.ratios)
    rows = []
    for repeat in range(-1, repeats):  # the first warms up
        order = list(calls)
        random.Random(f"{config.seed} {length} {repeat}").shuffle(order)
        for name, ratio in order:
            began = time.perf_counter()
            calls[name, ratio]()
            taken = time.perf_counter() - began
            if repeat >= 0:
                rows.append(Timed(length, name, ratio, repeat, taken))
        if repeat >= 0:
            done()
    return rows


def methods(
    session: BlendSession, prompt: Prompt, selectors: Mapping[str, Mapping[str, Any]], ratios: Sequence[float]
) -> dict[tuple[str, float], Callable[[], object]]:
    """Selector and ratio -> what is timed. Passages are learned, and it is checked that blends reuse them."""
    ids = torch.tensor([prompt.asked])
    calls: dict[tuple[str, float], Callable[[], object]] = {
        (FULL, 1.0): lambda: session.model(ids, use_cache=True, logits_to_keep=1)
    }
    for name, options in selectors.items():
        for ratio in ratios:
            engine = session.engine(prompt, {**options, "ratio": ratio})
            session.learn(engine, prompt)
            check_reused(prompt, engine.blend(prompt.asked))
            calls[name, ratio] = lambda engine=engine: engine.blend(prompt.asked)  # type: ignore[misc]
    return calls
