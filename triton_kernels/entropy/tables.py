"""Frequency tables of the entropy coder (coder.py): counts to 12-bit frequencies, and the tables that kernels read.

A table gives each symbol of its alphabet a run of the 4,096 slots; a run of f slots costs log2(4096 / f) bits:

    slots    |0 ...... f[0]-1|f[0] ........ |  ...  |4095|
    symbol   |       0       |      1       |  ...  |A-1 |
             ^start[0] = 0   ^start[1] = f[0]
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lmcache.errors import KernelArgumentError

PROB_BITS = 12
SLOTS = 1 << PROB_BITS
MAX_ALPHABET = 256
# Of a symbol's entry (see FrequencyTables): set where the symbol has a slot.
CODABLE = 1 << 56

_Floats = np.ndarray[Any, np.dtype[np.float64]]
_Ints = np.ndarray[Any, np.dtype[np.int64]]


class FrequencyTables:
    """K tables over one alphabet of A <= 256 symbols, on one device. Immutable and thread-safe.

    `freqs`: any integer dtype, `[K, A]`, each row's sum 4,096; a symbol with 0 cannot be encoded by that table.
    Raises KernelArgumentError for anything else. Two sides that exchange streams must hold the same frequencies:
    send these and not the counts, as quantise_counts computes in floating point.

    encode_entries  int64 [K, 256]   bits 0..31: (2**32 - 1) // f; 32..43: 4096 - f; 44..55: start; 56: can be encoded
    decode_entries  int32 [K, 4096]  of each slot, bits 0..7: symbol; 8..19: f - 1; 20..31: slot - start
    """

    def __init__(self, freqs: torch.Tensor, device: torch.device | str = "cpu") -> None:
        _check_table(freqs, "freqs")
        self.freqs = freqs.to("cpu", torch.int32)
        sums = self.freqs.sum(1)
        if bool((self.freqs < 0).any()) or bool((sums != SLOTS).any()):
            raise KernelArgumentError(
                f"freqs has rows that sum to {int(sums.min())} .. {int(sums.max())} and the least entry "
                f"{int(self.freqs.min())}; each row must sum to {SLOTS} and hold nothing negative (quantise_counts)"
            )
        self.num_tables, self.alphabet = self.freqs.shape
        self.encode_entries = torch.from_numpy(_encode_entries(self.freqs.numpy().astype(np.int64))).to(device)
        self.decode_entries = torch.from_numpy(_decode_entries(self.freqs.numpy().astype(np.int64))).to(device)
        self.device = self.encode_entries.device

    def to(self, device: torch.device | str) -> FrequencyTables:
        """These tables on another device."""
        return FrequencyTables(self.freqs, device)


def quantise_counts(counts: torch.Tensor) -> torch.Tensor:
    """Frequencies int32 `[K, A]`, each >= 1, rows summing to 4,096, that code `counts` in the fewest bits.

    `counts`: integers or floats >= 0, `[K, A]`, 1 <= A <= 256; a row of zeros counts as uniform. Exact: the bits
    -sum(c * log2(f / 4096)) are separable and convex, so the best integers take slots in the order of what the next
    slot saves, c * log2((f + 1) / f); with a price for a slot, each symbol has 1 / (1 - 2**(-price / c)) of them,
    and the price that spends 4,096 is found by bisection (Fox, "Discrete optimization via marginal analysis", 1966).
    """
    _check_table(counts, "counts")
    c = counts.to("cpu", torch.float64).numpy()
    if not np.isfinite(c).all() or (c < 0).any():
        raise KernelArgumentError(
            "counts holds what is negative or not finite; it must say how often each symbol occurs"
        )
    c = np.where(c.sum(1, keepdims=True) == 0, 1.0, c)
    c = c / c.sum(1, keepdims=True)
    dear, cheap = np.full((len(c), 1), 64.0), np.full((len(c), 1), 1e-9)  # sums <= 4096 and > 4096, but for A = 1
    for _ in range(80):
        price = np.sqrt(dear * cheap)
        fits = _slots_at(price, c).sum(1, keepdims=True) <= SLOTS
        dear, cheap = np.where(fits, price, dear), np.where(fits, cheap, price)
    freqs = _slots_at(dear, c)
    left = SLOTS - freqs.sum(1, keepdims=True)  # symbols whose next slot saves as much as the price, to rounding
    by_gain = np.argsort(-c * np.log2((freqs + 1) / freqs), axis=1, kind="stable")
    share = left // c.shape[1] + (np.arange(c.shape[1]) < left % c.shape[1])
    np.put_along_axis(freqs, by_gain, np.take_along_axis(freqs, by_gain, 1) + share, 1)
    return torch.from_numpy(freqs.astype(np.int32))


def entropy_bits(counts: torch.Tensor, freqs: torch.Tensor | None = None) -> torch.Tensor:
    """Bits, float64 `[K]`, that all of `counts` `[K, A]` take: their own entropy, or under the tables `freqs` `[K, A]`.

    Under `freqs` a symbol that occurs and has no slot makes the row infinite.
    """
    _check_table(counts, "counts")
    c = counts.to("cpu", torch.float64)
    if freqs is None:
        share = c / c.sum(1, keepdim=True).clamp(min=1e-300)
    else:
        if freqs.shape != counts.shape:
            raise KernelArgumentError(
                f"freqs has shape {tuple(freqs.shape)}; it must be that of counts, {tuple(counts.shape)}"
            )
        share = freqs.to("cpu", torch.float64) / SLOTS
    bits: torch.Tensor = -torch.special.xlogy(c, share).sum(1) / math.log(2)
    return bits


def _slots_at(price: _Floats, c: _Floats) -> _Ints:
    """Slots each symbol takes, at least one, if it takes all that save `price` bits or more each."""
    with np.errstate(divide="ignore", over="ignore"):
        slots = -1.0 / np.expm1(-math.log(2) * price / c)
    return np.clip(slots, 1, 2 * SLOTS).astype(np.int64)


def _encode_entries(freqs: _Ints) -> _Ints:
    """A symbol without slots gets the entry of one with all of them, which leaves the state as it was, not CODABLE."""
    starts = freqs.cumsum(1) - freqs
    codable = freqs > 0
    freqs, starts = np.where(codable, freqs, SLOTS), np.where(codable, starts, 0)
    entries = (2**32 - 1) // freqs | (SLOTS - freqs) << 32 | starts << 44 | codable * CODABLE
    padded = np.full((len(freqs), MAX_ALPHABET), (2**32 - 1) // SLOTS, dtype=np.int64)
    padded[:, : freqs.shape[1]] = entries
    return padded


def _decode_entries(freqs: _Ints) -> np.ndarray[Any, np.dtype[np.int32]]:
    num_tables, alphabet = freqs.shape
    symbols = np.repeat(np.tile(np.arange(alphabet), num_tables), freqs.ravel())
    runs = np.repeat(freqs.ravel(), freqs.ravel())
    starts = np.repeat((freqs.cumsum(1) - freqs).ravel(), freqs.ravel())
    offsets = np.tile(np.arange(SLOTS), num_tables) - starts
    entries: _Ints = (symbols | (runs - 1) << 8 | offsets << 20).reshape(num_tables, SLOTS)
    return entries.astype(np.uint32).view(np.int32)


def _check_table(table: torch.Tensor, what: str) -> None:
    if table.dim() != 2 or table.shape[0] == 0 or not 1 <= table.shape[1] <= MAX_ALPHABET:
        raise KernelArgumentError(
            f"{what} has shape {tuple(table.shape)}; it must be [K, A], K tables over 1 <= A <= {MAX_ALPHABET} symbols"
        )
    if what == "freqs" and (table.is_floating_point() or table.dtype == torch.bool):
        raise KernelArgumentError(f"freqs is {table.dtype}; it must be an integer dtype")
