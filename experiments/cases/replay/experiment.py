"""Hit ratio of eviction policies against the size of the cache, on request traces, without an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field
from tqdm import tqdm

from experiments.cases.replay.figure import draw
from experiments.framework.config import ExperimentConfig
from experiments.framework.report import Outcome, Results
from experiments.replaying.replay import belady, infinite, make, replay
from experiments.replaying.traces import SYNTHETIC, read
from lmcache.config import Config as Model
from lmcache.errors import ConfigError

BELADY, INFINITE = "belady", "infinite"


class JudgeConfig(Model):
    """What must hold on every trace that is replayed."""

    ours: str = Field("reuse", description="the policy that is judged")
    margin: float = Field(0.0, description="how far it must be above the best other policy, at every size")
    floors: dict[str, dict[int, float]] = Field(
        default_factory=dict, description="policy: blocks: hit ratio that must be reached"
    )
    known: dict[str, dict[int, float]] = Field(
        default_factory=dict, description="policy: blocks: hit ratio, known from elsewhere, to 0.0015"
    )


class Config(ExperimentConfig):
    trace: str = Field("mooncake", description=f"mooncake, {', '.join(SYNTHETIC)}, or a file in Mooncake's format")
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="cache sizes in blocks; none: by how many different blocks there are"
    )
    policies: tuple[str, ...] = Field(description="names of eviction policies")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


def run(config: Config, results: Results) -> Outcome:
    for name in config.policies:
        make(name)  # an unknown one is an error now, not when its turn comes
    try:
        requests = read(config.trace)
    except FileNotFoundError as error:
        known = ", ".join(("mooncake", *SYNTHETIC))
        raise ConfigError(f"trace: {config.trace!r} is neither a file nor one of {known}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"trace: {config.trace!r} cannot be read: {error!r}") from error
    different = len({block for request in requests for block in request})
    sizes = config.sizes or tuple(max(1, different // part) for part in (128, 64, 32, 16, 8, 4, 2))
    found: dict[str, dict[int, float]] = {}
    steps = [(name, size) for name in (*config.policies, BELADY) for size in sizes]
    for name, size in tqdm(steps, desc=config.trace, unit="replay"):
        started = time.monotonic()
        ratio = belady(requests, size) if name == BELADY else replay(requests, size, make(name))
        found.setdefault(name, {})[size] = ratio
        seconds = time.monotonic() - started
        results.write({"policy": name, "blocks": size, "hit_ratio": ratio, "seconds": seconds})
    endless = infinite(requests)
    print(table(found, sizes, endless))
    total = sum(map(len, requests))
    caption = (
        f"{config.trace}: {len(requests):,} requests, {total:,} blocks, {different:,} different; hit: cached prefix"
    )
    draw(found, endless, config.judge.ours, "Hit ratio by cache size", caption, results.folder / "eviction.png")
    failures = judge(found, sizes, config.judge)
    ours = found.get(config.judge.ours, {})
    others = stock(found, config.judge)
    gains = [ours[size] - max(found[name][size] for name in others) for size in sizes] if ours else [0.0]
    line = f"{config.judge.ours} less the best other, {len(sizes)} sizes: {min(gains):+.4f} to {max(gains):+.4f}"
    return Outcome({**found, INFINITE: endless}, failures, line)


def stock(found: dict[str, dict[int, float]], rules: JudgeConfig) -> list[str]:
    return [name for name in found if name not in (rules.ours, BELADY)] or list(found)


def judge(found: dict[str, dict[int, float]], sizes: Sequence[int], rules: JudgeConfig) -> list[str]:
    failures = []
    for size in sizes if rules.ours in found else ():
        name = max(stock(found, rules), key=lambda other: found[other][size])
        if not found[rules.ours][size] > found[name][size] + rules.margin:
            ours, best = found[rules.ours][size], found[name][size]
            failures.append(f"{rules.ours} at {size} blocks: {ours:.4f}, {name} {best:.4f}")
    checks: tuple[tuple[str, dict[str, dict[int, float]], Callable[[float, float], bool]], ...] = (
        ("at least", rules.floors, lambda got, wanted: got >= wanted),
        ("known", rules.known, lambda got, wanted: abs(got - wanted) < 0.0015),
    )
    for what, expected, holds in checks:
        for name, by_size in expected.items():
            for size, wanted in by_size.items():
                got = found.get(name, {}).get(size)
                if got is not None and not holds(got, wanted):
                    failures.append(f"{name} at {size} blocks: {got:.4f}, {what} {wanted}")
    return failures


def table(found: dict[str, dict[int, float]], sizes: Sequence[int], endless: float) -> str:
    """Markdown: a line a size, a column a policy."""
    lines = ["| blocks | " + " | ".join(found) + " |", "|---:|" + "---:|" * len(found)]
    lines += [f"| {size:,} | " + " | ".join(f"{of[size]:.4f}" for of in found.values()) + " |" for size in sizes]
    return "\n".join([*lines, f"infinite: {endless:.4f}"])
