"""Codecs on real KV: bits an element, and how far the predictions of the model move.

The KV of the first tokens of each document is packed and unpacked, chunk by chunk, as the engine does; the model then
predicts the text that follows from what came back. Profiles are fitted on other documents than those that are scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from tqdm import tqdm

from experiments.cases.codec_quality.figure import draw
from experiments.cases.codec_quality.measure import ELEMENT_BITS, Found, measure
from experiments.framework.config import ROOT, ExperimentConfig
from experiments.framework.model import smollm2
from experiments.framework.report import Outcome, Results
from experiments.kv_profile import with_profile
from lmcache.config import Config as Model
from lmcache.errors import ConfigError
from lmcache.kernels.codecs.base import Codec, build_codec
from lmcache.kernels.codecs.kv_model import KVModel


class JudgeConfig(Model):
    """What must hold, by codec name as in ``codecs``."""

    max_kl: dict[str, float] = Field(default_factory=dict, description="nats")
    max_bits: dict[str, float] = Field(default_factory=dict, description="bits an element")
    max_overhead: dict[str, float] = Field(default_factory=dict, description="of coded bits over their entropy")


class Config(ExperimentConfig):
    codecs: dict[str, dict[str, Any]] = Field(description="name in the table: the engine's codec option")
    prefix: int = Field(1536, ge=64, description="tokens of each document that are packed")
    scored: int = Field(512, ge=1, description="tokens behind them that are predicted")
    chunk_tokens: int = Field(64, ge=8, description="tokens of a chunk")
    documents: int = Field(4, ge=1, description="documents that are scored, the last ones by name")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="when the run fails")


def run(config: Config, results: Results) -> Outcome:
    files = sorted((ROOT / config.workload.corpus / "documents").glob("*.txt"))
    if config.documents >= len(files):
        raise ConfigError(f"documents={config.documents}: of {len(files)} some must be left to fit profiles on")
    texts = {file.stem: file.read_text() for file in files}
    scored = dict(list(texts.items())[-config.documents :])
    codecs = {name: build(options, config) for name, options in config.codecs.items()}
    model = KVModel(smollm2(), config.engine.threads)
    samples = model.samples(scored, config.prefix, config.scored)
    found = []
    for name, codec in tqdm(codecs.items(), desc="codecs", unit="codec"):
        found.append(measure(name, codec, model, samples, config.chunk_tokens))
        results.write(dataclasses.asdict(found[-1]))
    print(table(found))
    title = "Bits of a packed KV element, and what they cost"
    caption = f"SmolLM2-135M, {config.documents} documents, {config.scored} tokens behind {config.prefix} packed ones"
    draw(found, title, caption, results.folder / "codecs.png")
    failures = judge(found, config.judge)
    best = min((f for f in found if f.kl < 0.01), key=lambda f: f.bits, default=found[0])
    line = f"{best.codec}: {ELEMENT_BITS / best.bits:.1f}x smaller than bfloat16 at KL {best.kl:.4f}"
    return Outcome({f.codec: dataclasses.asdict(f) for f in found}, failures, line)


def build(options: dict[str, Any], config: Config) -> Codec | None:
    """The codec; ``profile: fit:2.3`` is the one that experiments.kv_profile fits on the first documents."""
    return build_codec(with_profile(options, config.engine.threads))


def table(found: Sequence[Found]) -> str:
    lines = [
        f"{'codec':<16} {'bits':>6} {'smaller':>8} {'KL, nats':>20} {'top-1':>7} {'keys':>7} {'values':>7} {'coder':>7}"
    ]
    for f in found:
        lines.append(
            f"{f.codec:<16} {f.bits:6.2f} {ELEMENT_BITS / f.bits:7.1f}x {f.kl:9.5f} +- {f.half:.5f} {f.top1:7.3f} "
            f"{f.key_error:6.1%} {f.value_error:6.1%} {'' if f.overhead is None else f'{f.overhead:+.1%}':>8}"
        )
    return "\n".join(lines)


def judge(found: Sequence[Found], limits: JudgeConfig) -> list[str]:
    failures = []
    known = {f.codec: f for f in found}
    for what, bounds in (("kl", limits.max_kl), ("bits", limits.max_bits), ("overhead", limits.max_overhead)):
        for codec, bound in bounds.items():
            if codec not in known:
                failures.append(f"judge.max_{what} names {codec!r}, which is not among the codecs")
            elif not getattr(known[codec], what) <= bound:
                failures.append(f"{codec}: {what} {getattr(known[codec], what):.4g}, at most {bound} allowed")
    return failures
