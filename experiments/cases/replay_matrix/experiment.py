"""A policy against the best stock policy of each point, over many traces and sizes: hits, time, longest eviction.

A replay as in replay.py, one victim at a time. Times are of the processor, for each block, of the whole replay, which
makes a key of every block, whatever the policy. They stand beside those of ``lru`` in the same run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

from experiments.framework.config import ExperimentConfig
from experiments.framework.report import Outcome, Results
from experiments.replaying import replay, traces_more
from experiments.replaying.traces import BLOCK_TOKENS, Request
from lmcache.errors import ConfigError
from lmcache.storage.eviction.base import Place

Point = dict[str, Any]


class Config(ExperimentConfig):
    traces: tuple[str, ...] = Field(
        description=f"kind:seed, or development, held_out or fresh for the lists; kinds: {', '.join(traces_more.KINDS)}"
    )
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        description="cache sizes in blocks; larger ones are left out"
    )
    policies: tuple[str, ...] = Field(description="names of the stock policies")
    ours: str = Field("reuse", description="the policy that is judged")
    margin: float = Field(0.002, description="how far it may be below the best stock policy, anywhere")
    times_lru: float = Field(4.0, description="how many times LRU's time for each block it may take, in the median")
    longest_ms: float = Field(2.0, description="processor time that no eviction may exceed")


def run(config: Config, results: Results) -> Outcome:
    names = [name for entry in config.traces for name in traces_more.named(entry)]
    for name in names:
        if name.partition(":")[0] not in traces_more.KINDS:
            raise ConfigError(f"traces: {name!r} is none of {', '.join(traces_more.KINDS)}")
    points: list[Point] = []
    for name in tqdm(names, unit="trace"):
        requests = traces_more.read(name)
        different = len({block for request in requests for block in request})
        for size in config.sizes:
            if size < different:
                found = point(requests, size, config.policies, config.ours)
                points.append({"trace": name, "blocks": size, **found})
                results.write(points[-1])
    print(table(points))
    return Outcome({"points": len(points)}, judge(points, config), line(points))


def point(requests: Sequence[Request], size: int, policies: Sequence[str], ours: str) -> Point:
    ratios = {name: replay.replay(requests, size, replay.make(name)) for name in policies}
    best = max(ratios, key=ratios.__getitem__)
    lru_us = cost_us(requests, size, "lru")
    started = time.process_time()
    ratios[ours] = replay.replay(requests, size, replay.make(ours))
    ours_us = (time.process_time() - started) / sum(map(len, requests)) * 1e6
    longest, longest_add = longest_ms(requests, size, ours)
    return {
        "best": best,
        "gain": ratios[ours] - ratios[best],
        "lru_us": lru_us,
        "ours_us": ours_us,
        "longest_ms": longest,
        "longest_add_ms": longest_add,
        "ratios": ratios,
    }


def cost_us(requests: Sequence[Request], size: int, name: str) -> float:
    """Processor time for each block."""
    started = time.process_time()
    replay.replay(requests, size, replay.make(name))
    return (time.process_time() - started) / sum(map(len, requests)) * 1e6


def longest_ms(requests: Sequence[Request], size: int, name: str) -> tuple[float, float]:
    """Processor time of the longest eviction and of the longest add, without Python's garbage collector."""
    policy, held, evictions, adds = replay.make(name), set[int](), [0], [0]
    clock, collecting = time.thread_time_ns, gc.isenabled()
    gc.disable()
    try:
        for request in requests:
            for index in reversed(range(len(request))):
                block, key = request[index], replay.key_of(request[index])
                if block in held:
                    policy.touch(key)
                    continue
                place = Place(replay.key_of(request[index - 1]) if index else None, index * BLOCK_TOKENS, 0)
                if len(held) >= size:
                    started = clock()
                    victim = next(policy.victims())
                    policy.remove(victim)
                    evictions.append(clock() - started)
                    held.discard(replay.block_of(victim))
                started = clock()
                policy.add(key, BLOCK_TOKENS, place)
                adds.append(clock() - started)
                held.add(block)
    finally:
        if collecting:
            gc.enable()
    return max(evictions) / 1e6, max(adds) / 1e6


def ratio(found: Point) -> float:
    return float(found["ours_us"] / found["lru_us"])


def judge(points: Sequence[Point], config: Config) -> list[str]:
    failures = [
        f"{found['trace']} at {found['blocks']}: {found['gain']:+.4f} against {found['best']}"
        for found in points
        if found["gain"] < -config.margin
    ]
    failures += [
        f"{found['trace']} at {found['blocks']}: an eviction of {found['longest_ms']:.1f} ms"
        for found in points
        if found["longest_ms"] > config.longest_ms
    ]
    if points and (middle := sorted(map(ratio, points))[len(points) // 2]) > config.times_lru:
        failures.append(f"{middle:.1f} times LRU's time for each block in the median")
    return failures


def table(points: Sequence[Point]) -> str:
    """Markdown: a line a trace, a column a size; the gain over the best stock policy."""
    sizes = sorted({found["blocks"] for found in points})
    by = {(found["trace"], found["blocks"]): found for found in points}
    lines = ["| trace | " + " | ".join(f"{size:,}" for size in sizes) + " | time / LRU's | longest, ms |"]
    lines.append("|---|" + "---:|" * (len(sizes) + 2))
    for name in dict.fromkeys(found["trace"] for found in points):
        row = [by.get((name, size)) for size in sizes]
        gains = [f"{found['gain']:+.4f}" if found else "" for found in row]
        of = [found for found in row if found]
        times = sorted(map(ratio, of))
        longest = max(found["longest_ms"] for found in of)
        lines.append(f"| {name} | " + " | ".join(gains) + f" | {times[0]:.1f} to {times[-1]:.1f} | {longest:.1f} |")
    return "\n".join(lines)


def line(points: Sequence[Point]) -> str:
    if not points:
        return "no point"
    times = sorted(map(ratio, points))
    worst = islice(sorted(points, key=lambda found: float(found["gain"])), 3)
    named = ", ".join(f"{found['trace']} at {found['blocks']} {found['gain']:+.4f}" for found in worst)
    middle, most = times[len(times) // 2], times[-1]
    return f"{len(points)} points; worst: {named}; time of LRU's: median {middle:.1f}, most {most:.1f}"
