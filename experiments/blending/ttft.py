"""Times to first token of blended prompts: what is measured, its medians, what must hold of them, and the figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pydantic import Field

from experiments.framework.plots import FADED, INK, SELECTORS, drawn
from lmcache.config import Config as Model

FULL = "full"


class ScaleConfig(Model):
    """How much is measured."""

    repeats: int = Field(ge=1, description="of every method at every length, behind one that does not count")
    lengths: tuple[int, ...] = Field(min_length=1, description="tokens of the prompts")


class JudgeConfig(Model):
    """What must hold."""

    ratio: float = Field(0.15, ge=0, le=1, description="which ratio is judged")
    min_tokens: int = Field(2000, ge=1, description="shortest prompt that is judged")
    min_speedup: float = Field(3.0, gt=0, description="of the full prefill's median over the blend's")


@dataclasses.dataclass(frozen=True)
class Timed:
    """One prompt, once. ratio: 1 for a full prefill."""

    length: int
    selector: str
    ratio: float
    repeat: int
    ttft_s: float


@dataclasses.dataclass(frozen=True)
class Found:
    """One method at one length. speedup: of medians, over the full prefill of the same run."""

    length: int
    selector: str
    ratio: float
    repeats: int
    median_s: float
    min_s: float
    max_s: float
    speedup: float


def summary(rows: Sequence[Timed]) -> list[Found]:
    """In the order of lengths, selectors and ratios, the full prefill first."""
    times: dict[tuple[int, str, float], list[float]] = {}
    for row in sorted(rows, key=lambda row: (row.length, row.selector != FULL, row.selector, row.ratio)):
        times.setdefault((row.length, row.selector, row.ratio), []).append(row.ttft_s)
    found = []
    for (length, selector, ratio), of in times.items():
        speedup = median(times[length, FULL, 1.0]) / median(of)
        found.append(Found(length, selector, ratio, len(of), median(of), min(of), max(of), speedup))
    return found


def table(found: Sequence[Found]) -> str:
    """Markdown."""
    lines = [
        "| tokens | method | computed again | TTFT median, s | min .. max | speedup |",
        "|---|---|---|---|---|---|",
    ]
    for f in found:
        name, ratio = ("full prefill", "") if f.selector == FULL else (f.selector, f"{f.ratio:.0%}")
        lines.append(
            f"| {f.length} | {name} | {ratio} | {f.median_s:.3f} | {f.min_s:.3f} .. {f.max_s:.3f} | {f.speedup:.2f}x |"
        )
    return "\n".join(lines)


def judged(found: Sequence[Found], limits: JudgeConfig) -> list[Found]:
    return [f for f in found if f.selector != FULL and f.ratio == limits.ratio and f.length >= limits.min_tokens]


def judge(found: Sequence[Found], limits: JudgeConfig) -> list[str]:
    """What is wrong with a run; empty when nothing is."""
    of = judged(found, limits)
    failures = [
        f"{f.selector} at {f.length} tokens: {f.speedup:.2f}x faster than a full prefill; {limits.min_speedup:g}x is "
        f"asked, which is {limits.min_speedup / f.speedup - 1:.0%} more"
        for f in of
        if not f.speedup >= limits.min_speedup
    ]
    return failures if of else [f"nothing was measured at {limits.ratio:.0%} and {limits.min_tokens} tokens or more"]


def draw(found: Sequence[Found], title: str, caption: str, path: Path) -> None:
    """Median TTFT with the range of all repeats against the prompt's length, a line a method; written to ``path``."""
    styles = dict(zip(sorted({f.ratio for f in found}), (":", "-", "--", "-."), strict=False))
    with drawn(title, caption, path) as grid:
        axes = grid[0, 0]
        for selector, ratio in dict.fromkeys((f.selector, f.ratio) for f in found):
            line = sorted((f for f in found if (f.selector, f.ratio) == (selector, ratio)), key=lambda f: f.length)
            bars = [[f.median_s - f.min_s for f in line], [f.max_s - f.median_s for f in line]]
            full = selector == FULL
            axes.errorbar(
                [f.length for f in line],
                [f.median_s for f in line],
                yerr=bars,
                marker="o",
                capsize=3,
                color=INK if full else SELECTORS.get(selector),
                ls="-" if full else styles[ratio],
                label="full prefill" if full else f"{selector}, {ratio:.0%}",
            )
        lengths = sorted({f.length for f in found})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        lowest, highest = axes.get_ylim()
        ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if lowest <= tick <= highest]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_xlabel("tokens of the prompt", color=FADED)
        axes.set_ylabel("time to first token, seconds (median; bars: range)", color=FADED)
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)
