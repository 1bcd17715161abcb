"""The interface of a model that can be blended: its layers in pieces, so that attention runs over the blended KV.

    tokens --embed--> hidden --norm--> x --key_value--> k, v --rope--> into the KV
                        |              └---query------> q ------rope--> attention over the KV
                        └------------------------------------------------------ finish --> hidden of the next layer

N is the number of rows, tokens that are computed, at any positions of the prompt: each method works row by row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lmcache.errors import BlendError, KernelArgumentError
from lmcache.kernels.rotary.tables import RopeFrequencies, RotaryTable, rope_frequencies


@dataclass(frozen=True)
class Rope:
    """A rope as a model's config describes it; see lmcache.kernels.rotary.tables.rope_frequencies."""

    parameters: Mapping[str, object]
    head_dim: int
    max_positions: int | None

    def frequencies(self, length: int | None = None) -> RopeFrequencies:
        """Those that the model uses for a prompt of ``length`` tokens. Raises KernelArgumentError."""
        return rope_frequencies(self.parameters, self.head_dim, max_positions=self.max_positions, length=length)


@dataclass(frozen=True)
class LayerAttention:
    """scale: of the logits. window: keys that a query sees, its own included; None: all. rope: a key of `ropes`."""

    scale: float
    window: int | None = None
    rope: Hashable = "all"


@dataclass(frozen=True)
class KVShape:
    """Of one layer's keys and values, `[T, heads, size]`."""

    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class BlendModel(ABC):
    """A decoder with rotary positions (whole heads, in halves: GPT-NeoX) and causal attention. Thread-safe.

    Constructors refuse with BlendError, naming what is supported, a model that these methods would get wrong.
    """

    attention: Sequence[LayerAttention]
    ropes: Mapping[Hashable, Rope]
    kv: KVShape
    _tables: dict[Hashable, tuple[torch.Tensor, RotaryTable]] = field(default_factory=dict, init=False)

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @abstractmethod
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[N]` -> hidden states `[N, hidden]` before the first layer."""

    @abstractmethod
    def norm(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """x `[N, ..]`, what `query` and `key_value` take: the input of the layer's projections, or their result."""

    @abstractmethod
    def query(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Queries `[N, H_q, D]`, normalised where the model does that, before the rope."""

    @abstractmethod
    def key_value(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (before the rope) and values, each `[N, H_kv, D]`."""

    @abstractmethod
    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """`hidden` before the layer and `attended` `[N, H_q, D]` -> hidden after the layer."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden after the last layer -> `[N, vocabulary]`."""

    def cache(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> object:
        """A copy of keys and values `[T, H_kv, D]` of each layer, as the engine takes it; not every engine does."""
        raise BlendError(f"{type(self).__name__} has no cache to go on from; models of Hugging Face have")

    def table(self, layer: int, length: int) -> RotaryTable:
        """Of at least `length` positions, with the frequencies that the model uses for a prompt of `length` tokens.

        They depend on it for "dynamic" and "longrope". Angles are rounded to fp32 as transformers and vLLM do.
        """
        name = self.attention[layer].rope
        frequencies = self.ropes[name].frequencies(length)
        inverse, table = self._tables.get(name, (None, None))
        if table is None or table.positions < length or inverse is None or not inverse.equal(frequencies.inverse):
            positions = 1 << (length - 1).bit_length()
            table = RotaryTable.from_frequencies(frequencies, positions, device=self.kv.device, angles=torch.float32)
            self._tables[name] = (frequencies.inverse, table)
        return table

    def _check_ropes(self) -> None:
        """Called last by constructors."""
        for name, rope in self.ropes.items():
            try:
                width = 2 * len(rope.frequencies().inverse)
            except KernelArgumentError as error:
                raise BlendError(f"rope {name!r} of the model: {error}") from error
            if width != self.kv.size:
                raise BlendError(
                    f"rope {name!r} turns {width} of {self.kv.size} components of a head; only ropes that turn whole "
                    "heads are supported (no partial_rotary_factor, no learned or other positions)"
                )
