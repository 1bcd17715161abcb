"""Codecs on real KV: bits an element, and how far the predictions of the model move.

The KV of the first tokens of each document is packed and unpacked, chunk by chunk, as the engine does; the model then
predicts the text that follows from what came back. Profiles are fitted on other documents than those that are scored.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from tqdm import tqdm

from experiments import plots
from experiments.config import ROOT, ExperimentConfig
from experiments.kv_profile import with_profile
from experiments.model import smollm2
from experiments.report import Outcome, Results
from lmcache.config import Config as Model
from lmcache.errors import ConfigError
from lmcache.kernels import PagedLayers, gather_tokens, scatter_tokens
from lmcache.kernels.codecs.base import Codec, build_codec
from lmcache.kernels.codecs.coded import CodedPlane
from lmcache.kernels.codecs.kv_model import KV, KVModel, Sample
from lmcache.kernels.entropy.tables import entropy_bits
from lmcache.kernels.sides import PlaneCodec, Side

ELEMENT_BITS = 16  # what KV takes in the engines that users run: bfloat16


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


@dataclasses.dataclass(frozen=True)
class Found:
    """One codec on all documents. error: relative RMS of keys and of values. half: of the 95 % interval of kl.

    overhead: of an entropy coder's bytes, lengths and states included, over the empirical entropy of its symbols.
    """

    codec: str
    bits: float
    kl: float
    half: float
    top1: float
    key_error: float
    value_error: float
    overhead: float | None
    seconds: float


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
    plots.codec_figure(found, title, caption, results.folder / "codecs.png")
    failures = judge(found, config.judge)
    best = min((f for f in found if f.kl < 0.01), key=lambda f: f.bits, default=found[0])
    line = f"{best.codec}: {ELEMENT_BITS / best.bits:.1f}x smaller than bfloat16 at KL {best.kl:.4f}"
    return Outcome({f.codec: dataclasses.asdict(f) for f in found}, failures, line)


def build(options: dict[str, Any], config: Config) -> Codec | None:
    """The codec; ``profile: fit:2.3`` is the one that experiments.kv_profile fits on the first documents."""
    return build_codec(with_profile(options, config.engine.threads))


def measure(name: str, codec: Codec | None, model: KVModel, samples: Sequence[Sample], chunk_tokens: int) -> Found:
    started = time.monotonic()
    divergences, same, taken, elements = [], [], Taken(), 0
    squares = torch.zeros(2, 2, dtype=torch.float64)  # of errors and of values, of keys and of values
    for sample in samples:
        kv = there_and_back(codec, sample.kv, chunk_tokens, taken)
        for layer, other in zip(sample.kv, kv, strict=True):
            for side in (0, 1):
                elements += layer[side].numel()
                squares[0, side] += (layer[side] - other[side]).double().square().sum()
                squares[1, side] += layer[side].double().square().sum()
        divergence, top1 = model.divergence(sample, kv)
        divergences.append(divergence)
        same.append(top1)
    kl = torch.cat(divergences)
    errors = (squares[0] / squares[1]).sqrt().tolist()
    return Found(
        name,
        8 * taken.nbytes / elements if codec else float(ELEMENT_BITS),
        float(kl.mean()),
        1.96 * float(kl.std()) / math.sqrt(len(kl)),
        float(torch.cat(same).double().mean()),
        errors[0],
        errors[1],
        taken.overhead,
        time.monotonic() - started,
    )


@dataclasses.dataclass
class Taken:
    """What packed chunks take. coded: bytes of entropy coders; counts: how often their tables code each symbol."""

    nbytes: int = 0
    coded: int = 0
    counts: torch.Tensor | None = None

    @property
    def overhead(self) -> float | None:
        return None if self.counts is None else 8 * self.coded / float(entropy_bits(self.counts.double()).sum()) - 1


def there_and_back(codec: Codec | None, kv: KV, chunk_tokens: int, taken: Taken) -> KV:
    """KV after packing and unpacking."""
    heads, tokens, width = kv[0][0].shape
    layers = [torch.cat(sides, -1)[None].contiguous() for sides in kv]  # [1, H, T, 2D]
    pages = PagedLayers(layers)
    back = PagedLayers([torch.full_like(layer, math.nan) for layer in layers])
    sides = [Side("key", 0, width, heads), Side("value", width, width, heads)]
    plane = codec.bind(sides, range(len(kv)), 0, pages.device) if codec else None
    for start in range(0, tokens, chunk_tokens):
        slots = torch.arange(start, min(start + chunk_tokens, tokens))
        one_chunk(codec, plane, sides, pages, back, slots, taken)
    return [(layer[0, ..., :width], layer[0, ..., width:]) for layer in back.layers]


def one_chunk(
    codec: Codec | None,
    plane: PlaneCodec | None,
    sides: Sequence[Side],
    pages: PagedLayers,
    back: PagedLayers,
    slots: torch.Tensor,
    taken: Taken,
) -> None:
    exact = slots if codec is None or plane is None else slots[: codec.sink_tokens if slots[0] == 0 else 0]
    kept = torch.empty(pages.num_layers, len(exact), pages.token_bytes, dtype=torch.uint8)
    if codec is not None and plane is not None:
        slots = torch.cat([torch.full_like(exact, -1), slots[len(exact) :]])  # what is kept is not packed
        packed = plane.pack([side.of(pages) for side in sides], slots)
        if not bool(packed.sound):
            raise ConfigError(f"codec {codec.id} cannot pack this KV")
        parts = [part[: int(used)] for part, used in zip(packed.parts, packed.used, strict=True)]
        nbytes = sum(len(part) for part in parts)
        taken.nbytes += nbytes
        if isinstance(plane, CodedPlane):
            counts = plane.counts([side.of(pages) for side in sides], slots)
            taken.counts = counts if taken.counts is None else taken.counts + counts
            taken.coded += nbytes
        plane.unpack([side.of(back) for side in sides], slots, parts)
    if len(exact):
        gather_tokens(pages, exact, kept)
        scatter_tokens(back, exact, kept)
    # Kept tokens are counted as the engines that users run would keep them, in bfloat16.
    taken.nbytes += kept.numel() * ELEMENT_BITS // (8 * pages.dtype.itemsize)


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
