"""Cosines and sines of rotary position embeddings, from the description of a rope that a model's config holds.

A rope turns pair i of a key at position p by the angle p * f[i]; f are its inverse frequencies, R / 2 of them for R
rotated elements (Su et al. 2021, arXiv:2104.09864). What scaling methods change is f, and a factor on the result:

    linear        f / factor (Chen et al. 2023, arXiv:2306.15595)
    dynamic       a larger base for longer sequences ("NTK-aware"): f depends on the length, a table belongs to one
    llama3        f / factor for low frequencies, a blend in between
    yarn          f / factor for low frequencies, a ramp in between (Peng et al. 2023, arXiv:2309.00071)
    longrope, su  a divisor for each f, one set for long sequences, one for short (Ding et al. 2024, arXiv:2402.13753)
    proportional  the first pairs only, at the frequencies of the whole head; the others have f = 0

YaRN and LongRoPE multiply cosine and sine by an attention factor when a key is rotated. The factor is the same at every
position, so it cancels when a key is moved: tables hold plain cosines and sines, and `attention_factor` is only kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from lmcache.errors import KernelArgumentError

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_ORIGINAL = "original_max_position_embeddings"
# The keys that each type may have; all of them but _COMMON and _OPTIONAL it must have.
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", _ORIGINAL},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {"factor", _ORIGINAL, "finetuned", *_YARN},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor", _ORIGINAL},
    "proportional": {"factor"},
}
_OPTIONAL = {
    "dynamic": {_ORIGINAL},
    "yarn": {_ORIGINAL, "finetuned", *_YARN},
    "longrope": {"factor", "attention_factor", _ORIGINAL},
    "llama3": {_ORIGINAL},
    "proportional": {"factor"},
}
_ALIASES = {"su": "longrope"}


@dataclasses.dataclass(frozen=True)
class RopeFrequencies:
    """inverse: fp64 `[R / 2]`, radians a position. attention_factor: what applying the rope multiplies keys by."""

    inverse: torch.Tensor
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class RotaryTable:
    """cos_sin: fp32 `[P, 2, R / 2]`, cosines and sines of the angles at positions 0 .. P - 1."""

    cos_sin: torch.Tensor
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        table = self.cos_sin
        if table.dtype != torch.float32 or table.dim() != 3 or table.shape[1] != 2 or not table.is_contiguous():
            raise KernelArgumentError(
                f"cos_sin is {table.dtype} of shape {tuple(table.shape)}, strides {table.stride()}; it must be a dense "
                "float32 [positions, 2, pairs]"
            )

    @classmethod
    def from_frequencies(
        cls,
        frequencies: RopeFrequencies,
        positions: int,
        *,
        device: torch.device | str = "cpu",
        angles: torch.dtype = torch.float64,
    ) -> RotaryTable:
        """The table of positions 0 .. positions - 1, calculated in fp64 and rounded once.

        `angles`: float64, or float32 to round frequencies and angles to fp32 as vLLM and transformers do. At position p
        that turns pair i by up to p * f[i] * 2**-23 too much or too little, 0.01 radians at 100,000: keys that such an
        engine has rotated are moved by what it would have turned them if the same is done here.
        """
        if angles not in (torch.float64, torch.float32):
            raise KernelArgumentError(f"angles is {angles}; it must be torch.float64 or torch.float32")
        steps = torch.arange(positions, dtype=torch.float64).to(angles)
        turns = torch.outer(steps, frequencies.inverse.to("cpu", angles)).to(torch.float64)  # [P, R / 2]
        cos_sin = torch.stack([turns.cos(), turns.sin()], 1).to(torch.float32)
        return cls(cos_sin.to(device), frequencies.attention_factor)

    @property
    def positions(self) -> int:
        """P: the table knows the positions below it."""
        return self.cos_sin.shape[0]

    @property
    def pairs(self) -> int:
        return self.cos_sin.shape[2]

    @property
    def width(self) -> int:
        """R: elements of a head that turn."""
        return 2 * self.pairs

    def to(self, device: torch.device | str) -> RotaryTable:
        return dataclasses.replace(self, cos_sin=self.cos_sin.to(device))


def rope_frequencies(
    parameters: Mapping[str, object], head_dim: int, *, max_positions: int | None = None, length: int | None = None
) -> RopeFrequencies:
    """The inverse frequencies of a rope, in fp64, from the `rope_parameters` or `rope_scaling` of a model's config.

    `parameters` is that mapping for one kind of layer (Gemma 3 has two), with `rope_theta` and, where it is not 1,
    `partial_rotary_factor` in it, wherever the config has them. `max_positions`: `max_position_embeddings` of the
    config, needed by dynamic, and by others where the mapping leaves out what follows from it. `length`: tokens of the
    sequence, for dynamic and longrope; None means a short one. Raises KernelArgumentError for a type, key or value that
    is not understood, as keys turned by slightly wrong angles would be wrong answers that nobody notices.
    """
    rope = _Rope.read(parameters, head_dim, max_positions)
    plain = rope.theta**-rope.exponents
    if rope.type == "default":
        return RopeFrequencies(plain)
    if rope.type == "linear":
        return RopeFrequencies(plain / rope.number("factor"))
    if rope.type == "dynamic":
        return RopeFrequencies(rope.dynamic_theta(length) ** -rope.exponents)
    if rope.type == "llama3":
        return RopeFrequencies(_llama3(rope, plain))
    if rope.type == "yarn":
        return _yarn(rope, plain)
    if rope.type == "longrope":
        return _longrope(rope, plain, length)
    return RopeFrequencies(_proportional(rope, head_dim))


@dataclasses.dataclass(frozen=True)
class _Rope:
    """A description whose keys have been checked."""

    type: str
    theta: float
    dim: int  # R; an odd one is rounded up by the exponents
    values: Mapping[str, object]
    max_positions: int | None

    @classmethod
    def read(cls, parameters: Mapping[str, object], head_dim: int, max_positions: int | None) -> _Rope:
        named = parameters.get("rope_type") or parameters.get("type") or "default"
        kind = _ALIASES.get(str(named), str(named))
        if kind not in _KEYS:
            raise KernelArgumentError(f"rope_type is {named!r}; it must be one of {', '.join((*_KEYS, *_ALIASES))}")
        values = {key: value for key, value in parameters.items() if value is not None}
        unknown = set(values) - _KEYS[kind] - _COMMON
        missing = (_KEYS[kind] - _OPTIONAL.get(kind, set()) | {"rope_theta"}) - set(values)
        if kind == "yarn" and max_positions:
            missing.discard("factor")
        if unknown or missing:
            raise KernelArgumentError(
                f"a rope of type {kind} has {sorted(values)}; unknown: {sorted(unknown)}, missing: {sorted(missing)}; "
                f"known: {sorted(_KEYS[kind] | _COMMON)}"
            )
        dim = int(head_dim * _number(values, "partial_rotary_factor", 1.0))
        return cls(kind, _number(values, "rope_theta"), dim, values, max_positions)

    @property
    def exponents(self) -> torch.Tensor:
        return torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim

    def number(self, key: str, default: float | None = None) -> float:
        return _number(self.values, key, default)

    @property
    def original(self) -> float:
        """Positions that the model was trained on before its rope was scaled."""
        return self.number(_ORIGINAL, None if _ORIGINAL in self.values else self.limit(f" without {_ORIGINAL}"))

    @property
    def factor(self) -> float:
        given = "factor" in self.values
        return self.number("factor", None if given else self.limit(" without factor") / self.original)

    def limit(self, which: str = "") -> int:
        """max_positions, without which a rope of this type (`which` of them) is not defined."""
        if self.max_positions is None:
            raise KernelArgumentError(f"a rope of type {self.type}{which} needs max_positions")
        return self.max_positions

    def dynamic_theta(self, length: int | None) -> float:
        factor, dim, limit = self.number("factor"), self.dim, self.limit()
        stretch = factor * max(length or 0, limit) / limit - (factor - 1)
        return float(self.theta * stretch ** (dim / (dim - 2)))


def _number(values: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, (int, float)) or not value > 0:
        raise KernelArgumentError(f"{key} of the rope is {value!r}; it must be a number above 0")
    return float(value)


def _llama3(rope: _Rope, plain: torch.Tensor) -> torch.Tensor:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    turns = rope.original * plain / (2 * math.pi)  # in the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / rope.number("factor") + share * plain


def _yarn(rope: _Rope, plain: torch.Tensor) -> RopeFrequencies:
    low = _yarn_dimension(rope, rope.number("beta_fast", 32))
    high = _yarn_dimension(rope, rope.number("beta_slow", 1))
    if rope.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(len(plain), dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    factor = rope.factor
    scale = _yarn_scale(factor, 1.0)
    mscale, mscale_all = rope.values.get("mscale"), rope.values.get("mscale_all_dim")
    if mscale and mscale_all:
        scale = _yarn_scale(factor, rope.number("mscale")) / _yarn_scale(factor, rope.number("mscale_all_dim"))
    return RopeFrequencies(plain / factor * ramp + plain * (1 - ramp), rope.number("attention_factor", scale))


def _yarn_dimension(rope: _Rope, turns: float) -> float:
    """The pair that turns that often in the original context, as a real number."""
    return rope.dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def _longrope(rope: _Rope, plain: torch.Tensor, length: int | None) -> RopeFrequencies:
    key = "long_factor" if length and length > rope.original else "short_factor"
    divisors = torch.tensor(rope.values[key], dtype=torch.float64)
    if divisors.shape != plain.shape:
        raise KernelArgumentError(f"{key} has shape {tuple(divisors.shape)}; the rope has {len(plain)} pairs")
    if "attention_factor" in rope.values:
        scale = rope.number("attention_factor")
    else:
        factor = rope.factor
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original))
    return RopeFrequencies(plain / divisors, scale)


def _proportional(rope: _Rope, head_dim: int) -> torch.Tensor:
    turning = int(rope.number("partial_rotary_factor", 1.0) * head_dim // 2)
    frequencies = rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    frequencies[turning:] = 0
    return frequencies / rope.number("factor", 1.0)
