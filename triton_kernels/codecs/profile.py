"""What an entropy-coded codec knows of a model: transforms, step widths and frequency tables, measured once.

A profile is data, not code: a numpy archive without pickle, named by the hash of what is in it. It covers the whole
model; `part` is what one rank's layers and heads need.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.entropy.tables import quantise_counts
from lmcache.kernels.transform.ops import CENTRE, Transform

KINDS = ("klt", "cachegen")
# Tables that every profile begins with: of exponents (nearly always 0), and of symbols that are always CENTRE.
EXPONENT_TABLE, CERTAIN_TABLE, FIRST_TABLE = 0, 1, 2
_SIDES = ("key", "value")
PROFILE_HINT = "a file made for the model: lmcache profile klt --model FOLDER --out FILE.npz TEXTS"


@dataclasses.dataclass(frozen=True)
class Profile:
    """kind: one of KINDS. key, value: over all L layers and H heads. freqs: int32 `[K, 256]`, rows sum to 4,096.

    tables, anchor_tables: int32 `[2, L, H, D]`: which table codes a channel of the keys, of the values.
    """

    kind: str
    key: Transform
    value: Transform
    freqs: torch.Tensor
    tables: torch.Tensor
    anchor_tables: torch.Tensor

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name what is in it."""
        hashed = hashlib.blake2b(self.kind.encode(), digest_size=8)
        for name, array in sorted(self._arrays().items()):
            hashed.update(f"{name}{array.dtype}{array.shape}".encode())
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()

    def part(self, layers: Sequence[int], heads: slice, device: torch.device) -> Profile:
        """What these layers and heads need, on `device` (the frequencies stay where they are)."""
        index = torch.tensor(layers)
        key, value = (side.part(index, heads, device) for side in (self.key, self.value))
        tables = [part[:, index][:, :, heads].contiguous().to(device) for part in (self.tables, self.anchor_tables)]
        return Profile(self.kind, key, value, self.freqs, tables[0], tables[1])

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, kind=np.array(self.kind), **self._arrays())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises KernelArgumentError for a file that is not there or is no profile."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            kind = str(arrays.pop("kind"))
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            sides = [
                Transform(**{n.split(".")[1]: t for n, t in tensors.items() if n.startswith(f"{s}.")}) for s in _SIDES
            ]
            profile = cls(kind, sides[0], sides[1], tensors["freqs"], tensors["tables"], tensors["anchor_tables"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise KernelArgumentError(f"{path} is no codec profile: {error}; it must be {PROFILE_HINT}") from error
        if kind not in KINDS:
            raise KernelArgumentError(f"{path} is a profile of kind {kind!r}; known: {', '.join(KINDS)}")
        if wrong := profile._wrong():
            raise KernelArgumentError(f"{path} is no codec profile: {wrong}; it must be {PROFILE_HINT}")
        return profile

    def _wrong(self) -> str:
        """What is wrong with it, or nothing: kernels believe its shapes and indices."""
        if self.key.mean.dim() != 3:
            return f"key.mean has shape {tuple(self.key.mean.shape)}"
        layers, heads, width = self.key.mean.shape
        square, single = ((0, 0), width) if self.kind == "cachegen" else ((width, width), 0)
        inner = {"mean": (width,), "bounds": (width,), "forward": square, "inverse": square}
        inner |= dict.fromkeys(("fine", "coarse", "coarse_bounds"), (single,))
        for side in (self.key, self.value):
            for name, shape in inner.items():
                tensor = getattr(side, name)
                if tensor.dtype != torch.float32 or tensor.shape != (layers, heads, *shape):
                    return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}"
                if not bool(torch.isfinite(tensor).all()):
                    return f"{name} is not finite"
        for tables, last in ((self.tables, width), (self.anchor_tables, single)):
            if tables.dtype != torch.int32 or tables.shape != (2, layers, heads, last):
                return f"the tables of its channels are {tables.dtype} of shape {tuple(tables.shape)}"
            if tables.numel() and not 0 <= int(tables.min()) <= int(tables.max()) < len(self.freqs):
                return f"it names tables {int(tables.min())} to {int(tables.max())} and has {len(self.freqs)}"
        if self.freqs.shape[1:] != (256,) or len(self.freqs) <= FIRST_TABLE:
            return f"its frequencies have shape {tuple(self.freqs.shape)}"
        return ""

    def _arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        arrays = {"freqs": self.freqs, "tables": self.tables, "anchor_tables": self.anchor_tables}
        for name in _SIDES:
            side = getattr(self, name)
            arrays |= {f"{name}.{f.name}": getattr(side, f.name) for f in dataclasses.fields(side)}
        return {name: tensor.cpu().numpy() for name, tensor in arrays.items()}


def share_tables(
    histograms: torch.Tensor, num_tables: int, *, margin: float = 1.25, rounds: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Few frequency tables for many channels: (freqs int32 `[K, 256]`, table of each `[n]`, bounds of each `[n]`).

    `histograms`: counts `[n, 256]` of symbols round(y) + 128. Channels are grouped by how wide they spread, then moved
    to the table that codes them in the fewest bits, as k-means does. A table holds the symbols within its bound: the
    farthest that its channels showed, widened by `margin`; what lies beyond is brought back by a row's exponent.
    """
    counts = histograms.double()
    distance = (torch.arange(256) - CENTRE).abs()
    spread = (counts * distance).sum(1) / counts.sum(1).clamp(min=1)
    num_tables = min(num_tables, len(counts))
    table_of = torch.empty(len(counts), dtype=torch.int64)
    table_of[spread.argsort()] = torch.arange(len(counts)) * num_tables // len(counts)
    for _ in range(rounds):
        pooled = torch.zeros(num_tables, 256, dtype=torch.float64).index_add_(0, table_of, counts) + 1e-3
        cost = counts @ -(pooled / pooled.sum(1, keepdim=True)).log2().T
        table_of = cost.argmin(1)
    used, table_of = torch.unique(table_of, return_inverse=True)
    pooled = torch.zeros(len(used), 256, dtype=torch.float64).index_add_(0, table_of, counts)
    farthest = torch.where(pooled > 0, distance, 0).amax(1)
    bounds = (farthest * margin + 1).floor().clamp(max=127).int()
    freqs = torch.zeros(len(used), 256, dtype=torch.int32)
    for row, bound in enumerate(bounds.tolist()):
        inside = slice(CENTRE - bound, CENTRE + bound + 1)
        freqs[row, inside] = quantise_counts(pooled[row : row + 1, inside])[0]
    return freqs, table_of.int(), bounds[table_of].float()


def fixed_tables() -> torch.Tensor:
    """EXPONENT_TABLE and CERTAIN_TABLE: int32 `[2, 256]`."""
    exponents = torch.zeros(1, 128)
    exponents[0, 0] = 1e9
    freqs = torch.zeros(2, 256, dtype=torch.int32)
    freqs[EXPONENT_TABLE, :128] = quantise_counts(exponents)[0]
    freqs[CERTAIN_TABLE, CENTRE] = 4096
    return freqs
