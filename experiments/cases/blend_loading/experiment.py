"""Loading hidden by computing: the time of a blend whose KV comes from a slower and slower tier, layer by layer.

    load         |000|111|222|...                         sequential   all of load, then all of compute
    compute          |000|111|222|...                     pipelined    side by side, behind the first layer

The tier is a disk behind a throttle (`latency`), one read at a time. Its rates are given as multiples of what computing
takes at the ratio that quality needs, as measured in this run: at 1 both take as long. Methods take turns. At last the
loading controller chooses the ratio, from what it measures itself.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from tqdm import tqdm

from experiments.blending.prompts import Prompt, filled
from experiments.blending.session import BlendSession, open_session
from experiments.cases.blend_loading.figure import draw
from experiments.cases.blend_loading.rows import Found, Timed, summary
from experiments.framework.config import ExperimentConfig, scale_of
from experiments.framework.report import Outcome, Results
from lmcache.blend.blender import Blended
from lmcache.blend.controller import LoadingController
from lmcache.blend.standalone import BlendEngine
from lmcache.blend.store import SegmentStore
from lmcache.config import Config as Model
from lmcache.config import load_config
from lmcache.errors import BlendError
from lmcache.storage.manager import StorageManager


class ScaleConfig(Model):
    """How much is measured."""

    repeats: int = Field(ge=1, description="of every method at every ratio and rate")
    length: int = Field(ge=1, description="tokens of the prompt")
    ratios: tuple[float, ...] = Field(min_length=1, description="shares of the reused tokens computed again")
    loads: tuple[float, ...] = Field(min_length=1, description="time of loading, as a multiple of that of computing")


class JudgeConfig(Model):
    """What must hold."""

    ratio: float = Field(0.15, ge=0, le=1, description="what quality needs: rates go by it, and the controller")
    max_share: float = Field(
        0.9, gt=0, description="of the sequential time, where neither part is below half the other"
    )
    max_chosen: float = Field(1.0, gt=0, description="of the sequential time at that ratio, at the controller's ratio")


class Config(ExperimentConfig):
    scale: Literal["ci", "full"] = Field("ci", description="which of the scales")
    scales: dict[str, ScaleConfig] = Field(description="how much each scale measures")
    selector: str = Field("cacheblend", description="one that needs not see all layers first")
    passage: int = Field(256, ge=32, description="tokens of a passage, about")
    question: int = Field(32, ge=1, description="tokens behind the passages, always computed")
    settle: int = Field(3, ge=1, description="blends from which the controller learns before it is measured")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


@dataclass(frozen=True)
class Bench:
    """A prompt whose passages lie in a tier of some rate."""

    engine: BlendEngine
    manager: StorageManager
    prompt: Prompt

    @property
    def store(self) -> SegmentStore:
        return self.engine.store_for(len(self.prompt.asked))

    @property
    def nbytes(self) -> int:
        """Of the passages' chunks."""
        return sum(sum(self.manager.sizes(self.store.keys(passage))) for passage in self.prompt.passages)

    def evict(self) -> None:
        self.manager.clear(tier="memory")

    def load(self) -> None:
        with self.store.retrieve(self.prompt.asked, self.prompt.segments) as reused:
            if list(reused.segments) != self.prompt.segments:
                raise BlendError(f"{len(reused.segments)} of {len(self.prompt.segments)} passages came")

    def blend(self, ratio: float, *, pipelined: bool) -> Blended:
        with self.store.retrieve(self.prompt.asked, self.prompt.segments, pipelined=pipelined) as reused:
            if list(reused.segments) != self.prompt.segments:
                raise BlendError(f"{len(reused.segments)} of {len(self.prompt.segments)} passages came")
            return self.engine.blender.at_ratio(ratio).blend(self.prompt.asked, reused)


def run(config: Config, results: Results) -> Outcome:
    scale = scale_of(config.scales, config.scale)
    found: list[Found] = []
    with open_session(config) as session, tempfile.TemporaryDirectory() as folder:
        caption = f"{session.caption}; {scale.length} tokens, medians of {scale.repeats}"
        texts = list(session.texts.values())
        prompt = filled(texts, session.encode, length=scale.length, passage=config.passage, question=config.question)
        balance = balanced_rate(session, config, prompt, Path(folder))
        for load in tqdm(scale.loads, unit="rate"):
            rows, ratio = measure(session, config, scale, prompt, load, balance / load, Path(folder))
            for row in rows:
                results.write(dataclasses.asdict(row))
            found += summary(rows, ratio)
    results.table(table(found))
    title = "A blend whose KV is loaded while it computes"
    draw(found, title, caption, results.folder / "blend_loading.png")
    line = ", ".join(
        f"{f.share:.2f} at {f.ratio:.0%}, load / compute {f.load_s / f.compute_s:.2f}" for f in judged(found)
    )
    told = {"found": [dataclasses.asdict(f) for f in found], "caption": caption}
    return Outcome(told, judge(found, config.judge), f"pipelined / sequential: {line}")


@contextmanager
def opened(
    session: BlendSession,
    config: Config,
    prompt: Prompt,
    folder: Path,
    bytes_per_s: float | None,
    controller: LoadingController | None = None,
) -> Iterator[Bench]:
    """Each layer of a passage in a chunk of its own, which are read one by one."""
    tier: dict[str, Any] = {"type": "disk", "path": str(folder), "capacity": 1 << 30}
    if bytes_per_s is not None:
        tier = {"type": "latency", "bytes_per_s": int(bytes_per_s), "inner": tier}
    manager = StorageManager(
        load_config(
            overrides={
                "memory": {"capacity": 512 << 20, "huge_pages": False},
                "tiers": [tier],
                "read_batch": 1,
                "read_threads": 1,
                "read_timeout_s": 60,
            }
        )
    )
    try:
        engine = BlendEngine(
            session.adapted,
            manager,
            model_id=session.name,
            selector=config.selector,
            ratio=config.judge.ratio,
            chunk_bytes=1,
            controller=controller,
        )
        if engine.learn(prompt.passages) != len(prompt.passages) or not manager.flush(60):
            raise BlendError("storage did not take all passages; is it too small?")
        yield Bench(engine, manager, prompt)
    finally:
        manager.close()


def balanced_rate(session: BlendSession, config: Config, prompt: Prompt, folder: Path) -> float:
    """Bytes a second at which loading takes as long as computing at the ratio that quality needs."""
    with opened(session, config, prompt, folder, None) as bench:
        compute_s = median(timed(lambda: bench.blend(config.judge.ratio, pipelined=False)) for _ in range(9))
        return bench.nbytes / compute_s


def measure(
    session: BlendSession,
    config: Config,
    scale: ScaleConfig,
    prompt: Prompt,
    load: float,
    bytes_per_s: float,
    folder: Path,
) -> tuple[list[Timed], float]:
    """All methods at one rate, and the ratio that the controller has come to."""
    rows: list[Timed] = []

    def add(method: str, ratio: float, repeat: int, call: Callable[[], object], *, evict: bool = True) -> None:
        if evict:
            bench.evict()
        rows.append(Timed(load, bytes_per_s, method, ratio, repeat, timed(call)))

    controller = LoadingController(config.judge.ratio)
    with opened(session, config, prompt, folder, bytes_per_s, controller) as bench:
        check_same(bench, config.judge.ratio)
        for repeat in range(scale.repeats):
            add("load", 0.0, repeat, bench.load)
            for ratio in scale.ratios:
                add("compute", ratio, repeat, lambda r=ratio: bench.blend(r, pipelined=False), evict=False)  # type: ignore[misc]
                modes = ["sequential", "pipelined"]
                random.Random(f"{config.seed} {load} {ratio} {repeat}").shuffle(modes)
                for mode in modes:
                    add(mode, ratio, repeat, lambda r=ratio, m=mode: bench.blend(r, pipelined=m == "pipelined"))  # type: ignore[misc]
        chosen = 0.0
        for repeat in range(-config.settle, scale.repeats):
            bench.evict()
            begun = time.perf_counter()
            report = bench.engine.blend(prompt.asked, prompt.segments).report
            taken = time.perf_counter() - begun
            chosen = (report.computed[-1] - (report.prompt_tokens - report.candidates)) / report.candidates
            if repeat >= 0:
                rows.append(Timed(load, bytes_per_s, "chosen", chosen, repeat, taken))
    return rows, chosen


def check_same(bench: Bench, ratio: float) -> None:
    """Pipelined or not, the result is the same to the bit. Raises BlendError."""
    bench.evict()
    pipelined, whole = (bench.blend(ratio, pipelined=each).layers[-1] for each in (True, False))
    if not all(map(torch.equal, pipelined, whole)):
        raise BlendError(f"ratio {ratio}: layer by layer the last layer's KV is another than all at once")


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def table(found: Sequence[Found]) -> str:
    """Markdown."""
    lines = [
        "| tier, MB/s | computed again | load, s | compute, s | sequential, s | pipelined, s | of sequential |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in found:
        rate = f"| {f.bytes_per_s / 1e6:.0f} | "
        if f.chosen:
            lines.append(f"{rate}controller: {f.ratio:.0%} | {f.load_s:.3f} | | | {f.pipelined_s:.3f} | |")
        else:
            parts = f"{f.load_s:.3f} | {f.compute_s:.3f} | {f.sequential_s:.3f} | {f.pipelined_s:.3f} | {f.share:.2f}"
            lines.append(f"{rate}{f.ratio:.0%} | {parts} |")
    return "\n".join(lines)


def judged(found: Sequence[Found]) -> list[Found]:
    return [f for f in found if f.balanced and not f.chosen]


def judge(found: Sequence[Found], limits: JudgeConfig) -> list[str]:
    """What is wrong with a run; empty when nothing is."""
    failures = [
        f"{f.bytes_per_s / 1e6:.0f} MB/s, {f.ratio:.0%}: pipelined takes {f.share:.2f} of the sequential time; "
        f"{limits.max_share:g} is allowed"
        for f in judged(found)
        if not f.share <= limits.max_share
    ]
    if not judged(found):
        failures.append("nothing was measured where loading and computing take about as long")
    failures += [
        f"{f.bytes_per_s / 1e6:.0f} MB/s: at the controller's {f.ratio:.0%} a blend takes {f.share:.2f} of the "
        f"sequential time at {limits.ratio:.0%}; {limits.max_chosen:g} is allowed"
        for f in found
        if f.chosen and not f.share <= limits.max_chosen
    ]
    return failures
