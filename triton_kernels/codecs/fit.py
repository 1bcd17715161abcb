"""Fit a codec profile: transforms from second moments, steps from how much each layer's error moves the predictions.

Rate-distortion in three steps, for each (side, layer):

    1. klt: whiten by what errors are weighted with (queries for keys, the output projection for values), diagonalise
       the weighted covariance: one step width for all channels is then the best for a given weighted error.
       cachegen: no transform; differences from anchors.
    2. KL(step) of that (side, layer) alone, others exact, is measured: s * step^2. Equal slopes, d KL / d bit, need
       step ~ 1 / sqrt(s).
    3. One factor over all steps is set so that the code takes `bits` bits an element on the calibration text.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lmcache.kernels.codecs.kv_model import KVModel, Sample, replaced
from lmcache.kernels.codecs.profile import FIRST_TABLE, Profile, fixed_tables, share_tables
from lmcache.kernels.entropy.tables import entropy_bits
from lmcache.kernels.transform.ops import ANCHOR_GROUP, CENTRE, Transform

logger = logging.getLogger(__name__)

# Tokens of a text that are fitted on, tokens behind them whose predictions are compared, first tokens left out.
PREFIX, SCORED, SINKS = 1024, 128, 4
TABLES = 192
# Of the mean of the diagonal, added to the weights: directions that no query of the calibration text looked at.
_RIDGE = 1e-3
_ANCHOR_STEPS = 100  # from the middle to the farthest anchor


@dataclasses.dataclass
class Moved:
    """One side in the domain of its codec: y [L, H, T, D] of the calibration text, for a step width of 1."""

    y: torch.Tensor
    mean: torch.Tensor
    forward: torch.Tensor
    inverse: torch.Tensor


def fit_texts(
    kind: str,
    folder: Path,
    texts: Mapping[str, str],
    rates: Sequence[float],
    *,
    prefix: int = PREFIX,
    scored: int = SCORED,
    threads: int = 1,
) -> list[Profile]:
    """A profile of `kind` ("klt" or "cachegen") for each rate, in bits an element, of the model in a folder.

    Shared tables, anchors and streams come on top of the rate.

    folder: Hugging Face's, of a model with rotary attention. texts: by name, each of more than `prefix` tokens; four
    of a few thousand words are enough. Takes a minute or two for a model of 135M parameters. Raises
    KernelArgumentError for a text that is too short.
    """
    model = KVModel(folder, threads)
    samples = model.samples(texts, prefix, scored)
    weights = model.weights(list(texts.values()), prefix)
    sides = [_stack(samples, side) for side in (0, 1)]
    if kind == "klt":
        moved = [_decorrelate(x, w) for x, w in zip(sides, (weights.queries, weights.outputs), strict=True)]
    else:
        moved = [_difference(x) for x in sides]
    scale = torch.stack([side.y.flatten(2).std(2).log().mean(1).exp() for side in moved])  # [2, L]
    steps = scale * _allocation(kind, model, samples[0], moved, scale)
    normalised = [side.y / step[:, None, None, None] for side, step in zip(moved, steps, strict=True)]
    return [_assemble(kind, sides, moved, steps * _factor_for(bits, normalised)) for bits in rates]


def _stack(samples: Sequence[Sample], side: int) -> torch.Tensor:
    """[L, H, T, D] of all samples, without their first tokens; whole groups of anchors of each."""
    parts = []
    for sample in samples:
        x = torch.stack([layer[side] for layer in sample.kv])[:, :, SINKS:]
        parts.append(x[:, :, : x.shape[2] // ANCHOR_GROUP * ANCHOR_GROUP])
    return torch.cat(parts, 2)


def _decorrelate(x: torch.Tensor, weights: torch.Tensor) -> Moved:
    x = x.double()
    eye = torch.eye(x.shape[-1], dtype=torch.float64)
    ridge = weights.diagonal(dim1=-2, dim2=-1).mean(-1) * _RIDGE
    values, vectors = torch.linalg.eigh(weights + ridge[..., None, None] * eye)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT  # [L, H, D, D]
    mean = x.mean(2)
    centred = x - mean[:, :, None]
    covariance = centred.mT @ centred / x.shape[2]
    _, basis = torch.linalg.eigh(root @ covariance @ root)
    forward = root @ basis  # y = x @ forward
    return Moved((centred @ forward).float(), mean.float(), forward.float(), torch.linalg.inv(forward).float())


def _difference(x: torch.Tensor) -> Moved:
    mean = x.mean(2)
    y = x - x[:, :, ::ANCHOR_GROUP].repeat_interleave(ANCHOR_GROUP, 2)
    nothing = torch.zeros(*x.shape[:2], 0, 0)
    return Moved(y, mean, nothing, nothing)


def _allocation(kind: str, model: KVModel, sample: Sample, moved: Sequence[Moved], scale: torch.Tensor) -> torch.Tensor:
    """[2, L]: step widths relative to `scale`, geometric mean 1, at which every side of every layer costs the same."""
    probe = 0.7
    costs = torch.zeros(2, len(sample.kv), dtype=torch.float64)
    for side in (0, 1):
        for layer in range(costs.shape[1]):
            step = float(scale[side, layer]) * probe
            rounded = _rounded(kind, moved[side], layer, step)
            divergence, _ = model.divergence(sample, replaced(sample.kv, layer, side, rounded, SINKS))
            costs[side, layer] = divergence.mean().clamp(min=1e-9)
        logger.info("%s: measured which layers' %s matter", kind, ("keys", "values")[side])
    slope = costs.sqrt()
    return (slope.log().mean() - slope.log()).exp().float()


def _rounded(kind: str, moved: Moved, layer: int, step: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [H, T, D] -> what it is after coding with that step."""
    if kind == "klt":
        mean, forward, inverse = moved.mean[layer][:, None], moved.forward[layer], moved.inverse[layer]
        return lambda x: ((x - mean) @ forward / step).round() * step @ inverse + mean

    def delta(x: torch.Tensor) -> torch.Tensor:
        anchors = x[:, ::ANCHOR_GROUP].repeat_interleave(ANCHOR_GROUP, 1)[:, : x.shape[1]]
        return ((x - anchors) / step).round() * step + anchors

    return delta


def _factor_for(bits: float, normalised: Sequence[torch.Tensor]) -> float:
    """What to multiply all steps with for `bits` bits an element, by bisection on the entropy of every channel."""
    low, high = 0.05, 5.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        total = sum(float(entropy_bits(_histograms(y / middle)).sum()) for y in normalised)
        found = total / sum(y.numel() for y in normalised)
        low, high = (middle, high) if found > bits else (low, middle)
    return math.sqrt(low * high)


def _histograms(y: torch.Tensor) -> torch.Tensor:
    """Counts of round(y) + 128: [L * H * D, 256]."""
    symbols = (y.round().clamp(-127, 127) + CENTRE).long().transpose(2, 3).flatten(0, 2)  # [L * H * D, T]
    counts = torch.zeros(len(symbols), 256)
    return counts.scatter_add_(1, symbols, torch.ones_like(symbols, dtype=torch.float32))


def _assemble(kind: str, sides: Sequence[torch.Tensor], moved: Sequence[Moved], steps: torch.Tensor) -> Profile:
    layers, heads, _, width = moved[0].y.shape
    width_of = [step[:, None, None].expand(layers, heads, width).contiguous() for step in steps]
    histograms = []
    for x, step in zip(moved, width_of, strict=True):
        y = x.y / step[:, :, None]
        if kind == "cachegen":
            # Anchors themselves are not coded here.
            y = y.view(layers, heads, -1, ANCHOR_GROUP, width)[:, :, :, 1:].flatten(2, 3)
        histograms.append(_histograms(y))
    freqs, tables, bounds = share_tables(torch.cat(histograms), TABLES)
    all_freqs, anchor_tables = [fixed_tables(), freqs], torch.zeros(2, layers, heads, 0, dtype=torch.int32)
    nothing = torch.zeros(layers, heads, 0)
    coarse = coarse_bounds = [nothing, nothing]
    if kind == "cachegen":
        firsts = [x[:, :, ::ANCHOR_GROUP] - part.mean[:, :, None] for x, part in zip(sides, moved, strict=True)]
        coarse = [(first.abs().amax(2) / _ANCHOR_STEPS).clamp(min=1e-6) for first in firsts]
        counts = [_histograms(first / step[:, :, None]) for first, step in zip(firsts, coarse, strict=True)]
        more, of_anchors, reach = share_tables(torch.cat(counts), TABLES // 4)
        all_freqs.append(more)
        anchor_tables = of_anchors.view(2, layers, heads, width) + FIRST_TABLE + len(freqs)
        coarse_bounds = list(reach.view(2, layers, heads, width))
    bounds = bounds.view(2, layers, heads, width)
    transforms = [
        Transform(
            mean=part.mean.contiguous(),
            bounds=bounds[side].contiguous(),
            forward=(part.forward / steps[side][:, None, None, None]).contiguous(),
            inverse=(part.inverse * steps[side][:, None, None, None]).contiguous(),
            fine=width_of[side] if kind == "cachegen" else nothing,
            coarse=coarse[side].contiguous(),
            coarse_bounds=coarse_bounds[side].contiguous(),
        )
        for side, part in enumerate(moved)
    ]
    return Profile(
        kind,
        transforms[0],
        transforms[1],
        torch.cat(all_freqs),
        tables.view(2, layers, heads, width) + FIRST_TABLE,
        anchor_tables,
    )
