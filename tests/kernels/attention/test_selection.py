"""Exactly the highest scores are selected, in order, ties by index, the same way every time."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_outputs

from lmcache.errors import KernelArgumentError
from lmcache.kernels.attention import select as selection
from lmcache.kernels.attention.select import select_tokens, select_tokens_torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = torch.inf, torch.nan


def oracle(scores: torch.Tensor, count: int, include: torch.Tensor | None) -> list[int]:
    """In plain Python: sort by (included, not NaN, score) downwards, then by index."""
    values = scores.float().tolist()
    first = [False] * len(values) if include is None else include.tolist()

    def rank(i: int) -> tuple[bool, bool, float, int]:
        nan = values[i] != values[i]
        return (not first[i], not first[i] and nan, 0.0 if first[i] or nan else -values[i], i)

    return sorted(sorted(range(len(values)), key=rank)[:count])


def check(scores: torch.Tensor, count: int, device: torch.device, include: torch.Tensor | None = None) -> None:
    given, mask = scores.to(device), None if include is None else include.to(device)
    before = given.clone()
    with poisoned_outputs():
        got = select_tokens(given, count, include=mask)
    assert (got.dtype, got.shape, got.device.type) == (torch.int64, (count,), device.type)
    assert got.tolist() == oracle(scores, count, include)
    assert torch.equal(given.view(torch.uint8), before.view(torch.uint8))


def strange(n: int, dtype: torch.dtype = FP32, seed: int = 0) -> torch.Tensor:
    """Many ties, both zeros, infinities, NaNs of both signs, subnormals, and large numbers."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator).mul(3).round(decimals=1)
    odd = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1e-40, -1e-40, 3e38, -3e38, 1.0, -1.0])
    where = torch.rand(n, generator=generator) < 0.5
    scores[where] = odd[torch.randint(0, len(odd), (int(where.sum()),), generator=generator)]
    return scores.to(dtype)


def some_mask(n: int, share: float, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture(params=["one_program", "radix"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few scores too, in blocks of 64, so that there are many of them."""
    if request.param == "radix":
        monkeypatch.setattr(selection, "_ONE_PROGRAM", 0)
        monkeypatch.setattr(selection, "_BLOCK", 64)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("n", [0, 1, 63, 64, 100, 300])
def test_any_count_of_any_number(n: int, device: torch.device) -> None:
    for count in sorted({0, min(1, n), n // 7, max(0, n - 1), n}):
        check(strange(n, seed=n), count, device)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_every_dtype_and_a_mask(dtype: torch.dtype, device: torch.device) -> None:
    scores = strange(200, dtype)
    for share in (0.0, 0.05, 1.0):
        check(scores, 40, device, some_mask(200, share))


@pytest.mark.usefixtures("either_way")
def test_included_tokens_come_first_even_if_there_are_too_many(device: torch.device) -> None:
    scores = torch.full((150,), INF)
    scores[::2] = NAN
    mask = some_mask(150, 0.5)
    assert mask.sum() > 30
    check(scores, 30, device, mask)
    assert (
        select_tokens(scores.to(device), 30, include=mask.to(device)).tolist() == mask.nonzero().flatten()[:30].tolist()
    )


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -INF, INF, NAN])
def test_equal_scores_go_to_the_lower_index(value: float, device: torch.device) -> None:
    scores = torch.full((140,), value)
    if value == 0:
        scores[::3] = -scores[::3]
    assert select_tokens(scores.to(device), 70).tolist() == list(range(70))


@pytest.mark.usefixtures("either_way")
def test_neighbouring_numbers_are_told_apart(device: torch.device) -> None:
    # All bits of the image count: these differ in the last ones, around every power of two and around zero.
    bits = torch.cat([torch.arange(-4, 5, dtype=torch.int32) + (e << 23) for e in (1, 50, 127, 128, 200)])
    values = torch.cat([bits.view(FP32), -bits.view(FP32), torch.tensor([1e-45, -1e-45, 0.0])])
    scores = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))]
    for count in range(1, len(scores), 14):
        check(scores, count, device)


@pytest.mark.parametrize("n", [8191, 8192, 8193, 20_000])
def test_where_one_program_ends_and_several_begin(n: int, device: torch.device) -> None:
    check(strange(n), n // 6, device, some_mask(n, 0.01))
    check(torch.randn(n, generator=torch.Generator().manual_seed(n)), n // 5, device)


def test_ties_across_many_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ONE_PROGRAM", 0)
    monkeypatch.setattr(selection, "_BLOCK", 32)
    monkeypatch.setattr(selection, "_BLOCK_B", 4)
    scores = torch.full((450,), 0.25)
    scores[5::50] = 1.0
    for count in (9, 13, 300):
        check(scores, count, device)


@pytest.mark.usefixtures("either_way")
def test_the_definition(device: torch.device) -> None:
    scores, mask = strange(250), some_mask(250, 0.05)
    for include in (None, mask):
        got = select_tokens_torch(scores.to(device), 77, include=None if include is None else include.to(device))
        assert got.tolist() == oracle(scores, 77, include)


def test_a_million_scores(device: torch.device) -> None:
    if selection.runs_kernel(device) and device.type == "cpu":
        pytest.skip("too many for the interpreter")
    scores, mask = strange(1_000_003), some_mask(1_000_003, 0.001)
    check(scores, 150_001, device, mask)


@pytest.mark.gpu
def test_it_is_the_same_every_time() -> None:
    scores = strange(300_000).cuda()
    first = select_tokens(scores, 50_000)
    assert all(torch.equal(select_tokens(scores, 50_000), first) for _ in range(50))


@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    scores = [strange(n).cuda() for n in (5000, 100_000)]
    for x in scores:
        select_tokens(x, 100)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in scores:
            select_tokens(x, 100, include=x > 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("scores", "count", "include", "message"),
    [
        (torch.zeros(5, dtype=torch.float64), 1, None, "float64"),
        (torch.zeros(5, 1), 1, None, "shape"),
        (torch.zeros(10)[::2], 1, None, "strides"),
        (torch.zeros(5), 6, None, "count is 6; it must be 0 .. 5"),
        (torch.zeros(5), -1, None, "count is -1"),
        (torch.zeros(5), 1, torch.zeros(5), "dense bool"),
        (torch.zeros(5), 1, torch.zeros(6, dtype=torch.bool), "dense bool"),
        (torch.zeros(5), 1, torch.zeros(10, dtype=torch.bool)[::2], "dense bool"),
        (torch.zeros(5), 1, torch.zeros(5, dtype=torch.bool, device="meta"), "must be on cpu"),
    ],
)
def test_wrong_arguments_are_refused(
    scores: torch.Tensor, count: int, include: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        select_tokens(scores, count, include=include)


@pytest.mark.interpret
@pytest.mark.usefixtures("either_way")
def test_nothing_is_read_or_written_beside_and_no_program_races() -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    scores, mask = strange(200), some_mask(200, 0.05)
    with sanitized():
        assert select_tokens(scores, 60, include=mask).tolist() == oracle(scores, 60, mask)


@pytest.mark.interpret
@pytest.mark.usefixtures("either_way")
def test_interpret_mode_really_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_select_host", None)
    check(strange(100), 20, torch.device("cpu"))


def test_the_oracle_sees_a_wrong_tie(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = select_tokens
    monkeypatch.setitem(globals(), "select_tokens", lambda x, n, include: 99 - real(x.flip(0), n).flip(0))
    with pytest.raises(AssertionError):
        check(torch.ones(100), 20, device)
