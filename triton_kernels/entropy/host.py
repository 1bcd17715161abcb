"""The entropy coder of coder.py in numpy: its definition, and what a CPU runs. A loop over symbols, not streams.

What a step costs is mostly the calls of numpy, so all of them write to buffers that are already there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmcache.errors import KernelArgumentError
from lmcache.kernels.entropy.tables import CODABLE, MAX_ALPHABET, PROB_BITS, SLOTS, FrequencyTables

_LOW = np.uint32(1 << 16)  # the least state between symbols, and the first
_MASK = np.uint32(SLOTS - 1)
_PROB, _WORD, _FULL = np.uint32(PROB_BITS), np.uint32(16), np.uint32(32 - PROB_BITS)
_LOW_HALF = 0 if np.little_endian else 1
_BLOCK = 1 << 17  # symbols whose entries are looked up together

_Symbols = np.ndarray[Any, np.dtype[np.uint8]]
_Words = np.ndarray[Any, np.dtype[np.uint16]]
_States = np.ndarray[Any, np.dtype[np.uint32]]
_Tables = np.ndarray[Any, np.dtype[np.int32]]
_Flags = np.ndarray[Any, np.dtype[np.bool_]]


def rans_encode_numpy(symbols: _Symbols, tables: FrequencyTables, table_of: _Tables) -> tuple[_Words, _Words]:
    """The definition: (words, lengths) of `symbols` `[S, N]`; `table_of` `[S, P]`.

    Raises KernelArgumentError for a symbol that has no slot.
    """
    num_streams, num_symbols = symbols.shape
    emitted = np.empty((2 + num_symbols, num_streams), dtype=np.uint16)  # low word of the state before each step
    emits = np.ones((2 + num_symbols, num_streams), dtype=np.bool_)
    state = np.full(num_streams, _LOW, dtype=np.uint32)
    low = state.view(np.uint16)[_LOW_HALF::2]
    temp = np.empty_like(state)
    block = max(1, _BLOCK // max(1, num_streams))
    for first in range((num_symbols - 1) // block * block, -1, -block):
        freqs, rests, starts = _looked_up(symbols, tables, table_of, first, min(first + block, num_symbols))
        for i in range(len(freqs) - 1, -1, -1):
            emitted[2 + first + i] = low
            full = emits[2 + first + i]
            np.right_shift(state, _FULL, out=temp)
            np.greater_equal(temp, freqs[i], out=full)
            np.copyto(temp, full)
            np.multiply(temp, _WORD, out=temp)
            np.right_shift(state, temp, out=state)
            np.floor_divide(state, freqs[i], out=temp)
            np.multiply(temp, rests[i], out=temp)
            np.add(state, temp, out=state)
            np.add(state, starts[i], out=state)
    emitted[0], emitted[1] = state >> _WORD, low
    return emitted.T[emits.T], emits.sum(0, dtype=np.uint16)


def rans_decode_numpy(
    words: _Words, lengths: _Words, tables: FrequencyTables, table_of: _Tables, num_symbols: int
) -> tuple[_Symbols, _Flags]:
    """The inverse of rans_encode_numpy: (symbols by step, `[N, S]`; whether each stream is intact, `[S]`)."""
    ends = lengths.cumsum(dtype=np.int64)
    at = ends - lengths  # the next word of each stream
    words = np.append(words, np.zeros(1, np.uint16))  # stands for every word that is not there
    entries = tables.decode_entries.numpy().view(np.uint32).ravel()
    first_slots = table_of.T.astype(np.int64) * SLOTS  # [P, S]
    by_step = np.empty((num_symbols, len(lengths)), dtype=np.uint8)
    state = words.take(at, mode="clip").astype(np.uint32) << _WORD | words.take(at + 1, mode="clip")
    at += 2
    slot, freq, low = np.empty_like(at), np.empty_like(state), np.empty(len(lengths), dtype=np.bool_)
    for i in range(num_symbols):
        np.bitwise_and(state, _MASK, out=freq)
        np.add(first_slots[i % len(first_slots)], freq, out=slot)
        entry = entries.take(slot)
        np.copyto(by_step[i], entry, casting="unsafe")
        np.right_shift(entry, 8, out=freq)
        np.bitwise_and(freq, _MASK, out=freq)
        np.right_shift(state, _PROB, out=state)
        np.multiply(freq, state, out=freq)
        np.add(state, freq, out=state)  # f * (state >> 12): the table holds f - 1
        np.right_shift(entry, 20, out=entry)
        np.add(state, entry, out=state)
        np.less(state, _LOW, out=low)
        takes = low.nonzero()[0]
        taken = at.take(takes)
        state[takes] = state.take(takes) << _WORD | words.take(taken, mode="clip")
        at[takes] = taken + 1
    return by_step, (state == _LOW) & (at == ends) & (ends < len(words))


def _looked_up(
    symbols: _Symbols, tables: FrequencyTables, table_of: _Tables, first: int, stop: int
) -> tuple[_States, _States, _States]:
    """Of symbols first .. stop of every stream, by step, `[stop - first, S]`: f, 4096 - f, start."""
    which = np.arange(first, stop) % table_of.shape[1]
    by_step = np.ascontiguousarray(symbols[:, first:stop].T)
    entry = tables.encode_entries.numpy().take(table_of.T[which] * np.int64(MAX_ALPHABET) + by_step)
    if not np.bitwise_and.reduce(entry, axis=None) & CODABLE:
        step, stream = (int(n[0]) for n in np.nonzero(entry & CODABLE == 0))
        raise KernelArgumentError(
            f"symbol {first + step} of stream {stream} is {by_step[step, stream]}, for which its table, "
            f"{table_of[stream, which[step]]}, has no slot"
        )
    high = (entry >> 32).astype(np.uint32)
    rests = high & _MASK
    return SLOTS - rests, rests, high >> _PROB & _MASK
