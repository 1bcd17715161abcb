"""The corrected interpreter (interpreter.py) calculates as a GPU does, so that what the other tests prove is true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from lmcache.kernels.launch import LazyKernel, lazy_jit

if TYPE_CHECKING:
    import triton.language as tl

pytestmark = pytest.mark.interpret

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
CODES = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
EVERY_BF16 = CODES.view(BF16)
EVERY_FP16 = CODES.view(FP16)
RANDOM_FP32 = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int().view(FP32)


def launch(kernel: LazyKernel, *args: object, **constexprs: object) -> None:
    kernel.launch((1,), CPU, *args, **constexprs)


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Bit for bit, but any NaN is as good as another."""
    assert got.dtype == wanted.dtype
    if not wanted.dtype.is_floating_point:
        assert torch.equal(got, wanted)
        return
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.element_size()]
    nan = wanted.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    assert torch.equal(got.view(integer)[~nan], wanted.view(integer)[~nan])


@lazy_jit()
def _cast(source: tl.tensor, target: tl.tensor, N: tl.constexpr, ROUNDING: tl.constexpr) -> None:
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def cast(source: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    target = torch.full(source.shape, 1, dtype=torch.uint8).to(dtype)
    launch(_cast, source, target, N=source.numel(), ROUNDING=rounding)
    return target


def nearest_fp8(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By looking for the nearest of all finite values; of two equally near, the one with the even code."""
    codes = torch.arange(128, dtype=torch.uint8)
    table = codes.view(dtype).double()
    codes, table = codes[table.isfinite()], table[table.isfinite()].contiguous()
    size = values.double().abs().nan_to_num(0, table[-1].item()).clamp(max=table[-1].item())
    above = torch.searchsorted(table, size).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    far_above, far_below = table[above] - size, size - table[below]
    pick_above = (far_above < far_below) | ((far_above == far_below) & (codes[above] % 2 == 0))
    code = torch.where(pick_above, codes[above], codes[below]) | (values.signbit().to(torch.uint8) << 7)
    return torch.where(values.isnan(), torch.tensor(0x7F, dtype=torch.uint8), code).view(dtype)


def test_fp32_to_bf16_rounds_to_nearest_even() -> None:
    bits = RANDOM_FP32.numpy().view(np.uint32).astype(np.uint64)
    wanted = torch.from_numpy(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.int16)).view(BF16)
    wanted = torch.where(RANDOM_FP32.isnan(), torch.tensor(torch.nan, dtype=BF16), wanted)
    assert_same(cast(RANDOM_FP32, BF16), wanted)
    assert_same(RANDOM_FP32.to(BF16), wanted)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_every_bf16_widens_and_narrows(dtype: torch.dtype) -> None:
    assert_same(cast(EVERY_BF16, dtype), EVERY_BF16.to(dtype))
    assert_same(cast(EVERY_FP16, BF16), EVERY_FP16.to(BF16))
    assert_same(cast(cast(EVERY_BF16, FP32), BF16), EVERY_BF16)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("source", [EVERY_BF16, EVERY_FP16, RANDOM_FP32], ids=lambda t: str(t.dtype))
def test_fp8_is_the_nearest_code_and_saturates(source: torch.Tensor, dtype: torch.dtype) -> None:
    assert_same(cast(source, dtype), nearest_fp8(source, dtype))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_fp8_widens(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    for wide in (BF16, FP16, FP32):
        assert_same(cast(codes, wide), codes.to(wide))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rounding_toward_zero(dtype: torch.dtype) -> None:
    values = RANDOM_FP32[RANDOM_FP32.abs() < 6e4][: 2**14]
    cut = cast(values, dtype, "rtz")
    next_code = torch.where(cut == 0, torch.tensor(0, dtype=torch.int16), cut.abs().view(torch.int16)) + 1
    assert bool((cut.float().abs() <= values.abs()).all())
    assert bool((next_code.view(dtype).float() > values.abs()).all())


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_to_and_from_bf16(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    numbers = torch.randint(max(limits.min, -(2**40)), min(limits.max, 2**40), (1024,), dtype=dtype)
    assert_same(cast(numbers, BF16), numbers.to(BF16))
    small = (random(1024, dtype=FP32) * 20).abs().to(BF16)
    assert_same(cast(small, dtype), small.to(dtype))


@lazy_jit()
def _operate(a: tl.tensor, b: tl.tensor, floats: tl.tensor, bits: tl.tensor, scale, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(floats + i, x + y)
    tl.store(floats + N + i, x - y)
    tl.store(floats + 2 * N + i, x * y)
    tl.store(floats + 3 * N + i, (x / y).to(floats.dtype.element_ty))
    tl.store(floats + 4 * N + i, tl.where(x > y, x, y))
    tl.store(floats + 5 * N + i, tl.maximum(x, y))
    tl.store(floats + 6 * N + i, tl.minimum(x, y))
    tl.store(floats + 7 * N + i, tl.abs(x))
    tl.store(floats + 8 * N + i, x * 1.5 + tl.full((N,), 0.3, floats.dtype.element_ty))
    tl.store(bits + i, x < y)
    tl.store(bits + N + i, x <= y)
    tl.store(bits + 2 * N + i, x == y)
    tl.store(bits + 3 * N + i, x != y)
    tl.store(bits + 4 * N + i, x > 0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_operators_are_those_of_torch(dtype: torch.dtype) -> None:
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(2))
    x = EVERY_BF16 if dtype == BF16 else EVERY_FP16 if dtype == FP16 else RANDOM_FP32
    y = x[order].clone()
    y[:5000] = x[:5000]
    n = len(x)
    floats, bits = torch.zeros(9, n, dtype=dtype), torch.zeros(5, n, dtype=torch.bool)
    launch(_operate, x, y, floats, bits, 1.5, N=n)
    # torch.fmax gives NaN for a signalling NaN and a number; PTX gives the number.
    p, q = torch.where(x.isnan(), y, x), torch.where(y.isnan(), x, y)
    wanted = [x + y, x - y, x * y, x / y, torch.where(x > y, x, y), p.maximum(q), p.minimum(q), x.abs()]
    wanted += [x * 1.5 + torch.tensor(0.3, dtype=dtype)]
    for row, (got, want) in enumerate(zip(floats, wanted, strict=True)):
        if row in (5, 6):  # of two zeros either may be taken
            assert bool(((got == want) | (got.isnan() & want.isnan())).all())
        else:
            assert_same(got, want)
    for got, want in zip(bits, [x < y, x <= y, x == y, x != y, x > 0], strict=True):
        assert torch.equal(got, want)


@lazy_jit()
def _mathematics(a: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    x = tl.load(a + i)
    tl.store(out + i, tl.fma(x, x, x))
    tl.store(out + N + i, tl.clamp(x, -0.5, 0.5))
    tl.store(out + 2 * N + i, -x)
    tl.store(out + 3 * N + i, tl.exp(x.to(tl.float32)))
    tl.store(out + 4 * N + i, tl.sqrt(tl.abs(x).to(tl.float32)))


def test_mathematics_rounds_once() -> None:
    x = random(4096)
    x[7] = torch.nan
    out = torch.zeros(5, 4096, dtype=BF16)
    launch(_mathematics, x, out, N=4096)
    clamped = x.clamp(-0.5, 0.5)
    clamped[7] = -0.5
    wide = x.double()
    wanted = [(wide * wide + wide).to(BF16), clamped, -x, wide.exp().to(BF16), wide.abs().sqrt().to(BF16)]
    for got, want in zip(out, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-8, atol=0, equal_nan=True)
    assert_same(out[1], clamped)
    assert_same(out[2], -x)


@lazy_jit()
def _dot(a: tl.tensor, b: tl.tensor, out: tl.tensor, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr) -> None:
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(a + m[:, None] * K + k[None, :])  # [M, K]
    y = tl.load(b + k[:, None] * N + n[None, :])  # [K, N]
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y).to(out.dtype.element_ty))


@pytest.mark.parametrize("result", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_dot(dtype: torch.dtype, result: torch.dtype) -> None:
    a, b = random(32, 64, dtype=dtype), random(64, 16, dtype=dtype, seed=2)
    out = torch.full((32, 16), torch.nan, dtype=result)
    launch(_dot, a, b, out, M=32, K=64, N=16)
    # fp32 sums of 64 products of about 1, then one rounding
    tolerance = 1e-5 if result == FP32 else 2**-8
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=tolerance, atol=1e-5)


@lazy_jit()
def _reduce(
    a: tl.tensor, floats: tl.tensor, index: tl.tensor, scan: tl.tensor, M: tl.constexpr, N: tl.constexpr
) -> None:
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(a + m[:, None] * N + n[None, :])  # [M, N]
    tl.store(floats + m, tl.sum(x, axis=1))
    tl.store(floats + M + m, tl.max(x, axis=1))
    tl.store(floats + 2 * M + m, tl.min(x, axis=1))
    tl.store(index + m, tl.argmax(x, axis=1))
    tl.store(index + M + m, tl.argmin(x, axis=1))
    tl.store(scan + m[:, None] * N + n[None, :], tl.cumsum(x, axis=1))
    tl.store(floats + 3 * M, tl.sum(x))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_reductions_and_scans(dtype: torch.dtype) -> None:
    x = random(8, 64, dtype=dtype)
    floats = torch.full((4, 8), torch.nan, dtype=dtype)
    index, scan = torch.full((2, 8), -1, dtype=torch.int32), torch.full((8, 64), torch.nan, dtype=dtype)
    launch(_reduce, x, floats, index, scan, M=8, N=64)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(floats[0].double(), x.double().sum(1), **tolerance)
    torch.testing.assert_close(floats[3, 0].double(), x.double().sum(), **tolerance)
    torch.testing.assert_close(scan.double(), x.double().cumsum(1), **tolerance)
    assert_same(floats[1], x.amax(1))
    assert_same(floats[2], x.amin(1))
    assert torch.equal(x.gather(1, index[0].long()[:, None])[:, 0], x.amax(1))
    assert torch.equal(x.gather(1, index[1].long()[:, None])[:, 0], x.amin(1))
    if dtype == BF16:  # summed in fp32 and rounded once
        assert_same(floats[0], x.float().sum(1).to(BF16))


@lazy_jit()
def _sort(a: tl.tensor, out: tl.tensor, best: tl.tensor, N: tl.constexpr, K: tl.constexpr) -> None:
    x = tl.load(a + tl.arange(0, N))
    tl.store(out + tl.arange(0, N), tl.sort(x))
    tl.store(best + tl.arange(0, K), tl.topk(x, K))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_sort_and_topk(dtype: torch.dtype) -> None:
    x = random(64, dtype=dtype)
    out, best = torch.zeros_like(x), torch.zeros(8, dtype=dtype)
    launch(_sort, x, out, best, N=64, K=8)
    assert_same(out, x.sort().values)
    assert_same(best, x.sort(descending=True).values[:8])


@lazy_jit()
def _logic(a: tl.tensor, b: tl.tensor, out: tl.tensor, N: tl.constexpr, ON: tl.constexpr) -> None:
    i = tl.arange(0, N)
    x, y = tl.load(a + i) > 0, tl.load(b + i) > 0
    tl.store(out + i, x and y)
    tl.store(out + N + i, x or y)
    tl.store(out + 2 * N + i, not x)
    tl.store(out + 3 * N + i, (x and y) or not y)
    if ON and not (N == 0 or N == 1):
        tl.store(out + 4 * N + i, ON and x)


def test_boolean_operators_are_elementwise() -> None:
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    out = torch.zeros(5, 4, dtype=torch.bool)
    launch(_logic, a, b, out, N=4, ON=True)
    x, y = a > 0, b > 0
    assert torch.equal(out, torch.stack([x & y, x | y, ~x, (x & y) | ~y, x]))


@lazy_jit()
def _chained(a: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    x = tl.load(a + tl.arange(0, N))
    tl.store(out + tl.arange(0, N), 0 < x < 3)


def test_chained_comparisons_are_refused() -> None:
    with pytest.raises(SyntaxError, match="0 < x < 3"):
        launch(_chained, torch.arange(4), torch.zeros(4, dtype=torch.bool), N=4)


@lazy_jit()
def _assert_small(a: tl.tensor, limit, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.device_assert(tl.load(a + i) < limit, "too large", mask=i < N - 1)


def test_a_device_assertion_sees_one_bad_lane_and_no_masked_one() -> None:
    from triton.runtime.errors import InterpreterError

    launch(_assert_small, torch.tensor([0, 1, 2, 9]), 3, N=4)
    with pytest.raises(InterpreterError, match="too large"):
        launch(_assert_small, torch.tensor([0, 9, 2, 1]), 3, N=4)


@lazy_jit()
def _wrap(a: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    i = tl.arange(0, N)
    x = tl.load(a + i)
    tl.store(out + i, x * 747796405 + 2891336453)
    tl.store(out + N + i, ~x)


def test_unsigned_integers_wrap_around() -> None:
    x = torch.tensor([1, 2**31 + 5, 2**32 - 1, 77], dtype=torch.uint32)
    out = torch.zeros(2, 4, dtype=torch.uint32)
    launch(_wrap, x, out, N=4)
    numbers = [int(v) for v in x]
    assert out[0].tolist() == [(v * 747796405 + 2891336453) % 2**32 for v in numbers]
    assert out[1].tolist() == [2**32 - 1 - v for v in numbers]


@lazy_jit()
def _infinite(a: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    x = tl.load(a + tl.arange(0, N))
    tl.store(out + tl.arange(0, N), tl.exp(x * x) - tl.exp(x * x))


def test_numpy_does_not_warn_about_infinities() -> None:
    out = torch.zeros(4)
    launch(_infinite, torch.tensor([1e3, 1e30, 0.0, -1e3]), out, N=4)
    assert out.isnan().tolist() == [True, True, False, True]
