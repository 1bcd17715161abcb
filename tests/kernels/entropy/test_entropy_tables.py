"""Frequency tables of the entropy coder: the best 12-bit frequencies, exact reciprocals, sizes and advice."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.entropy.tables import FrequencyTables, entropy_bits, quantise_counts

pytestmark = pytest.mark.host


def greedy(counts: list[float]) -> list[int]:
    """The best frequencies, one slot at a time."""
    freqs = [1] * len(counts)
    heap = [(-c, i) for i, c in enumerate(counts)]
    heapq.heapify(heap)
    for _ in range(4096 - len(counts)):
        _, i = heapq.heappop(heap)
        freqs[i] += 1
        heapq.heappush(heap, (-counts[i] * math.log2((freqs[i] + 1) / freqs[i]), i))
    return freqs


@pytest.mark.parametrize("alphabet", [1, 2, 3, 16, 100, 256])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "sparse", "equal", "huge", "none"])
def test_quantised_counts_are_the_best_there_are(kind: str, alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    counts = {
        "uniform": lambda: rng.integers(0, 1000, (3, alphabet)),
        "skewed": lambda: (1e9 * rng.random((3, alphabet)) ** 20).astype(np.int64),
        "sparse": lambda: rng.integers(0, 1000, (3, alphabet)) * (rng.random((3, alphabet)) < 0.1),
        "equal": lambda: np.full((3, alphabet), 7),
        "huge": lambda: rng.integers(0, 2**50, (3, alphabet)),
        "none": lambda: np.zeros((3, alphabet), np.int64),
    }[kind]()
    freqs = quantise_counts(torch.from_numpy(counts))
    assert freqs.dtype == torch.int32
    assert freqs.shape == counts.shape
    assert bool((freqs >= 1).all())
    assert freqs.sum(1).tolist() == [4096] * 3
    best = torch.tensor([greedy(row) for row in counts.astype(float).tolist()])
    bits, least = (entropy_bits(torch.from_numpy(counts), f) for f in (freqs, best))
    torch.testing.assert_close(bits, least, rtol=1e-12, atol=0.0)
    if kind == "none":
        assert int(freqs.max() - freqs.min()) <= 1


def test_entropy_of_counts() -> None:
    counts = torch.tensor([[4, 4, 8, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    assert entropy_bits(counts).tolist() == [24.0, 0.0, 0.0]
    assert entropy_bits(counts, torch.tensor([[1024, 1024, 2048, 0]]).expand(3, 4)).tolist() == [24.0, 10.0, 0.0]
    assert entropy_bits(counts, torch.tensor([[4096, 0, 0, 0]]).expand(3, 4)).tolist() == [math.inf, 0.0, 0.0]


def test_every_reciprocal_is_right_or_one_too_small() -> None:
    freqs = torch.stack([torch.arange(1, 4096), 4096 - torch.arange(1, 4096)], 1)
    entries = FrequencyTables(freqs).encode_entries[:, :2].flatten().numpy()
    f = freqs.flatten().numpy().astype(np.uint64)[:, None]
    np.testing.assert_array_equal(4096 - (entries >> 32 & 4095), f[:, 0])
    quotient = np.random.default_rng(0).integers(1, 1 << 20, 200, dtype=np.uint64)
    quotient[:3] = 1, 16, (1 << 20) - 1
    for state in (quotient * f, quotient * f + f // 2, quotient * f + f - 1):  # [8190, 200], all below f << 20
        short = state // f - (state * (entries & 0xFFFFFFFF).astype(np.uint64)[:, None] >> np.uint64(32))
        assert short.max() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FrequencyTables(torch.full((2, 4), 1023)), "4092 .. 4092"),
        (lambda: FrequencyTables(torch.tensor([[4097, -1]])), "least entry -1"),
        (lambda: FrequencyTables(torch.full((2, 4), 1024.0)), "integer"),
        (lambda: FrequencyTables(torch.full((4096,), 1)), r"\[K, A\]"),
        (lambda: quantise_counts(torch.ones(1, 257)), "A <= 256"),
        (lambda: quantise_counts(torch.ones(0, 4)), "K tables"),
        (lambda: quantise_counts(torch.tensor([[1.0, math.nan]])), "not finite"),
        (lambda: quantise_counts(torch.tensor([[1, -1]])), "negative"),
        (lambda: entropy_bits(torch.ones(1, 4), torch.ones(1, 5)), "that of counts"),
    ],
)
def test_wrong_tables_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        make()
