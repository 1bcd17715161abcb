"""Batches of prompts for sparse_prefill, in NaN-poisoned memory, and the attention as loops over float64 arrays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from lmcache.kernels.attention.sparse_prefill import KV, PackedKV, PagedKV

Array = np.ndarray[Any, np.dtype[np.float64]]
# (relative, absolute) error of one output: that of its dtype, and of probabilities rounded to it.
TOLERANCE = {torch.bfloat16: (2**-7, 6e-3), torch.float16: (2**-10, 1e-3), torch.float32: (1e-5, 1e-5)}


@dataclasses.dataclass(frozen=True)
class World:
    """Prompts of (queries, keys). `page` 0: a packed KV."""

    prompts: tuple[tuple[int, int], ...] = ((5, 70), (0, 9), (20, 150), (1, 1))
    heads: tuple[int, int] = (4, 2)
    size: int = 64
    v_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    page: int = 0
    holes: bool = False
    unsorted: bool = False
    seed: int = 0

    def build(self, device: torch.device) -> Batch:
        rng = np.random.default_rng(self.seed)
        q_tokens, kv_tokens = (sum(lengths) for lengths in zip(*self.prompts, strict=True))
        q = torch.from_numpy(rng.standard_normal((q_tokens, self.heads[0], self.size))).to(self.dtype)
        # Each row has a gap behind it, as a fused projection of q, k and v leaves one.
        wide = torch.full((q_tokens, self.heads[0], self.size + 16), math.nan, dtype=self.dtype)
        wide[..., : self.size] = q
        shape = (kv_tokens, self.heads[1], self.size + self.v_size)
        rows = torch.from_numpy(rng.standard_normal(shape)).to(self.dtype)
        places = [np.arange(keys) for _, keys in self.prompts]
        positions = [self._positions(n, keys, rng) for n, keys in self.prompts]
        kv = self._paged(rows, places, rng) if self.page else self._packed(rows, places)
        return Batch(
            self,
            wide.to(device)[..., : self.size],
            _move(kv, device),
            torch.from_numpy(np.concatenate(positions)).to(device),
            _bounds([n for n, _ in self.prompts], torch.int32).to(device),
            rows.double().numpy(),
            places,
        )

    def _positions(self, n: int, keys: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        chosen = rng.choice(max(keys, n), n, replace=False)
        return chosen if self.unsorted else np.sort(chosen)

    def _packed(self, rows: torch.Tensor, places: list[np.ndarray[Any, Any]]) -> PackedKV:
        memory = torch.full((len(rows) + 70, self.heads[1] + 1, rows.shape[2]), math.nan, dtype=self.dtype)
        memory[: len(rows), :-1] = rows
        joined = memory[: len(rows), :-1]
        bounds = _bounds([len(p) for p in places], torch.int64)
        return PackedKV(joined[..., : self.size], joined[..., self.size :], bounds)

    def _paged(self, rows: torch.Tensor, places: list[np.ndarray[Any, Any]], rng: np.random.Generator) -> PagedKV:
        """Unused pages and the ends of last pages stay NaN; with holes, a third of the blocks is taken away."""
        counts = [-(-len(p) // self.page) for p in places]
        total = sum(counts) + 3
        memory = torch.full((total, self.heads[1], self.page, rows.shape[2]), math.nan, dtype=self.dtype)
        table = torch.full((len(places), max(counts) + 2), -1, dtype=torch.int32)
        free = iter(rng.permutation(total).tolist())
        start = 0
        for b, (place, count) in enumerate(zip(places, counts, strict=True)):
            for i in range(count):
                if self.holes and rng.random() < 0.33:
                    place[i * self.page : (i + 1) * self.page] = -1
                    continue
                table[b, i] = next(free)
                first, last = i * self.page, min((i + 1) * self.page, len(place))
                memory[int(table[b, i]), :, : last - first] = rows[start + first : start + last].transpose(0, 1)
            start += len(place)
        lengths = torch.tensor([len(p) for p in places])
        return PagedKV(memory[..., : self.size], memory[..., self.size :], table, lengths)


@dataclasses.dataclass(frozen=True)
class Batch:
    world: World
    q: torch.Tensor
    kv: KV
    positions: torch.Tensor
    cu_q: torch.Tensor
    rows: Array  # [T_kv, H_kv, D + V]
    places: list[np.ndarray[Any, Any]]

    def expected(self, *, scale: float | None = None, window: int | None = None, soft_cap: float | None = None) -> Any:
        """out `[T_q, H_q, V]` and lse `[T_q, H_q]`, token by token and head by head."""
        q, positions = self.q.double().cpu().numpy(), self.positions.cpu().numpy()
        size, group = self.world.size, self.world.heads[0] // self.world.heads[1]
        out = np.zeros((*q.shape[:2], self.world.v_size))
        lse = np.full(q.shape[:2], -np.inf)
        key, token = 0, 0
        for (n, _), place in zip(self.world.prompts, self.places, strict=True):
            rows = self.rows[key : key + len(place)]
            for t in range(token, token + n):
                seen = (place >= 0) & (place <= positions[t])
                if window is not None:
                    seen &= place > positions[t] - window
                if not seen.any():
                    continue
                for head in range(q.shape[1]):
                    pairs = rows[seen, head // group]
                    logits = pairs[:, :size] @ q[t, head] * (size**-0.5 if scale is None else scale)
                    if soft_cap is not None:
                        logits = soft_cap * np.tanh(logits / soft_cap)
                    weights = np.exp(logits - logits.max())
                    out[t, head] = weights @ pairs[:, size:] / weights.sum()
                    lse[t, head] = logits.max() + np.log(weights.sum())
            key, token = key + len(place), token + n
        return out, lse


@dataclasses.dataclass
class Result:
    """Views of NaN-filled memory, with rows, heads and components around them that belong to nobody."""

    out_memory: torch.Tensor
    lse_memory: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, batch: Batch) -> Result:
        tokens, heads = batch.q.shape[:2]
        size = batch.world.v_size
        out = torch.full((tokens + 4, heads + 2, size + 32), math.nan, dtype=batch.q.dtype, device=batch.q.device)
        lse = torch.full((heads + 2, tokens + 4), math.nan, device=batch.q.device)
        return cls(out, lse, out[2:-2, 1:-1, 16:-16], lse[1:-1, 2:-2].T)

    def check(self, expected: Any) -> None:
        """Right inside, untouched outside."""
        out, lse = self.out.double().cpu().numpy(), self.lse.double().cpu().numpy()
        relative, absolute = TOLERANCE[self.out.dtype]
        np.testing.assert_allclose(out, expected[0], relative, absolute)
        np.testing.assert_allclose(lse, expected[1], 1e-5, 2e-5)
        assert int(self.out_memory.isnan().sum()) == self.out_memory.numel() - self.out.numel()
        assert int(self.lse_memory.isnan().sum()) == self.lse_memory.numel() - self.lse.numel()


def _bounds(lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=dtype)


def _move(kv: KV, device: torch.device) -> KV:
    """Keys and values stay views of one tensor."""
    both = kv.keys._base
    assert both is not None
    moved = both.to(device)
    parts = {
        name: moved.as_strided(view.shape, view.stride(), view.storage_offset())
        for name, view in (("keys", kv.keys), ("values", kv.values))
    }
    for field in dataclasses.fields(kv):
        if field.name not in parts:
            given = getattr(kv, field.name)
            parts[field.name] = None if given is None else given.to(device)
    return type(kv)(**parts)
