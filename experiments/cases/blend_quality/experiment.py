"""How far blending moves what a model predicts: KL divergence, top-1 agreement and perplexity, by selector and ratio.

Each passage is prefilled on its own behind the prefix and stored; a blend reuses all and computes a share again. The
question is always computed; selectors never see the answer, which the model then reads behind the blended KV. The
predictions at every token of question and answer are compared with those of a full prefill of the same tokens.
Prompts about one article share text, so intervals are bootstrapped over articles; comparisons are paired.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tqdm import tqdm

from experiments.blending.prompts import Prompt
from experiments.blending.quality import (
    FULL,
    REUSE,
    TITLES,
    Found,
    ScaleConfig,
    Scored,
    blend,
    full_prefill,
    prompts,
    summary,
)
from experiments.blending.session import BlendSession, open_session
from experiments.cases.blend_quality.figure import draw
from experiments.framework import paired
from experiments.framework.config import ExperimentConfig, read, scale_of, typed
from experiments.framework.report import Outcome, Results
from lmcache.config import Config as Model
from lmcache.errors import ConfigError


class JudgeConfig(Model):
    """What must hold of mean KL at one ratio."""

    ratio: float = Field(0.15, ge=0, le=1, description="which ratio is judged")
    max_of_cacheblend: float = Field(0.7, gt=0, description="question's KL over cacheblend's, on wiki")
    max_of_epic: float = Field(0.6, gt=0, description="question's KL over epic's, on wiki")
    max_full_kl: float = Field(1e-5, gt=0, description="nats; 100% must be a full prefill up to rounding")


class Config(ExperimentConfig):
    scale: Literal["ci", "full"] = Field("ci", description="which of the scales")
    scales: dict[str, ScaleConfig] = Field(description="how much each scale measures")
    selectors: dict[str, dict[str, Any]] = Field(description="name in the table: the selector's type and options")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")
    resume: Path | None = Field(
        None, description="results folder of a run that was cut off: prompts it has measured are taken from there"
    )


def run(config: Config, results: Results) -> Outcome:
    scale = scale_of(config.scales, config.scale)
    kept = resumed(config) if config.resume else {}
    rows: list[Scored] = []
    with open_session(config) as session:
        caption = session.caption
        for prompt in tqdm(prompts(session, scale, config.seed), unit="prompt"):
            for row in kept.get(prompt.key) or measure(session, prompt, config.selectors, scale.ratios):
                results.write(dataclasses.asdict(row))
                rows.append(row)
    found = summary(rows)
    results.table(table(found))
    failures, compared = judge(rows, config.judge, scale)
    print(
        "\n".join(f"{what}: {how.ratio} x, difference {how.difference}" for what, how in compared.items()), flush=True
    )
    caption = f"{caption}; {found[0].prompts} prompts of each kind; bars: 95% over articles"
    title = "What blending costs" + (" (this run failed)" if failures else "")
    draw(found, TITLES, title, caption, results.folder / "blend_quality.png")
    line = "; ".join(f"{what}: {how.ratio} x" for what, how in compared.items() if what.startswith("wiki: question"))
    told = {
        "found": [dataclasses.asdict(f) for f in found],
        "compared": {what: dataclasses.asdict(how) for what, how in compared.items()},
        "caption": caption,
    }
    return Outcome(told, failures, f"KL at {config.judge.ratio:.0%}, {line}")


def resumed(config: Config) -> dict[str, list[Scored]]:
    """The rows of each prompt that ``config.resume`` has all rows of. Raises ConfigError for a run of other options."""
    folder = Path(config.resume or "")
    try:
        before = typed(Config, read(folder / "config.yaml"), str(folder))
        found = [Scored(**json.loads(line)) for line in (folder / "results.jsonl").read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"resume={folder}: {error}") from error
    if _measured_by(before) != _measured_by(config):
        raise ConfigError(f"resume={folder}: that run had other options; begin anew")
    rows: dict[str, list[Scored]] = {}
    for row in found:
        rows.setdefault(row.key, []).append(row)
    wanted = [(name, ratio) for name, ratio, _ in methods(config.selectors, config.scales[config.scale].ratios)]
    return {key: of for key, of in rows.items() if [(row.selector, row.ratio) for row in of] == wanted}


def _measured_by(config: Config) -> dict[str, Any]:
    """The options that change rows."""
    free: Any = {"resume": True, "name": True, "results": True, "engine": {"threads"}, "judge": True, "scales": True}
    return {**config.model_dump(exclude=free), "scales": config.scales[config.scale]}


def methods(
    selectors: Mapping[str, Mapping[str, Any]], ratios: Sequence[float]
) -> list[tuple[str, float, dict[str, Any]]]:
    """Name, ratio and selector options: plain reuse, every selector at every ratio between, and all."""
    between = [ratio for ratio in ratios if 0 < ratio < 1]
    some = [(name, ratio, {**options, "ratio": ratio}) for name, options in selectors.items() for ratio in between]
    return [(REUSE, 0.0, {"type": "none"}), *some, (FULL, 1.0, {"type": "all"})]


def measure(
    session: BlendSession, prompt: Prompt, selectors: Mapping[str, Mapping[str, Any]], ratios: Sequence[float]
) -> list[Scored]:
    """A prompt blended every way."""
    session.manager.clear()
    engine = session.engine(prompt, {"type": "none"})
    session.learn(engine, prompt)
    expected = full_prefill(session, prompt)
    return [blend(session, engine, prompt, expected, *method) for method in methods(selectors, ratios)]


def table(found: Sequence[Found]) -> str:
    """Markdown."""
    lines = [
        "| data | selector | ratio | KL, nats (95%) | KL of the answer | top-1 | perplexity | right answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in found:
        right = f"{f.right}/{f.prompts}" if f.data == "bind" else ""
        lines.append(
            f"| {f.data} | {f.selector} | {f.ratio:.0%} | {f.kl} | {f.kl_answer.value:.4f} | {f.top1:.3f} "
            f"| {f.perplexity:.3f} | {right} |"
        )
    return "\n".join(lines)


def judge(
    rows: Sequence[Scored], limits: JudgeConfig, scale: ScaleConfig
) -> tuple[list[str], dict[str, paired.Comparison]]:
    """What is wrong with a run, and the comparisons at the judged ratio, by what is compared."""
    failures, compared = [], {}
    for data in TITLES:
        of: dict[tuple[str, float], dict[str, Scored]] = {}
        for row in rows:
            if row.data == data:
                of.setdefault((row.selector, row.ratio), {})[row.key] = row
        sides = {name: of.get((name, limits.ratio), {}) for name in ("random", "epic", "cacheblend", "question")}
        sides |= {REUSE: of.get((REUSE, 0.0), {}), FULL: of.get((FULL, 1.0), {})}
        missing = [name for name, side in sides.items() if side.keys() != sides[FULL].keys() or not side]
        if missing:
            failures.append(f"{data}: no rows, or not of every prompt, at {limits.ratio:.0%} of {', '.join(missing)}")
            continue
        failures += _measured(data, sides[FULL], limits, scale)
        for ours, theirs in (
            ("cacheblend", "random"),
            ("cacheblend", REUSE),
            ("question", "cacheblend"),
            ("question", "epic"),
        ):
            compared[f"{data}: {ours} / {theirs}"] = paired.compare(
                [row.kl for row in sides[ours].values()],
                [sides[theirs][key].kl for key in sides[ours]],
                [row.article for row in sides[ours].values()],
            )
    return failures + _verdicts(compared, limits), compared


def _measured(data: str, full: Mapping[str, Scored], limits: JudgeConfig, scale: ScaleConfig) -> list[str]:
    failures = []
    if len(full) < scale.min_prompts:
        failures.append(f"{data}: {len(full)} prompts; {scale.min_prompts} asked")
    if (shortest := min(row.tokens for row in full.values())) < scale.min_tokens:
        failures.append(f"{data}: a prompt has {shortest} tokens; {scale.min_tokens} asked")
    if not (worst := max(row.kl for row in full.values())) <= limits.max_full_kl:
        failures.append(f"{data}: 100% is no full prefill: KL {worst:.2g}, at most {limits.max_full_kl:g} is rounding")
    return failures


def _verdicts(compared: Mapping[str, paired.Comparison], limits: JudgeConfig) -> list[str]:
    failures = []
    for what in (
        "wiki: cacheblend / random",
        "wiki: cacheblend / none",
        "bind: question / cacheblend",
        "bind: question / epic",
    ):
        if what in compared and not compared[what].difference.high < 0:
            failures.append(f"{what}: KL differs by {compared[what].difference}; all of the interval must be below 0")
    for what, limit in (
        ("wiki: question / cacheblend", limits.max_of_cacheblend),
        ("wiki: question / epic", limits.max_of_epic),
    ):
        if what in compared and not compared[what].ratio.value <= limit:
            failures.append(f"{what}: KL is {compared[what].ratio} x; at most {limit:g} x is asked")
    return failures
