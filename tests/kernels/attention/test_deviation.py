"""The deviation of a token is the squared distance of its new from its old KV, whatever its memory looks like."""

from __future__ import annotations

import pytest
import torch
from poison import poisoned_outputs

from lmcache.errors import KernelArgumentError
from lmcache.kernels.attention import deviation
from lmcache.kernels.attention.deviation import kv_deviation, kv_deviation_torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
Sides = list[torch.Tensor]  # k_new, k_old, v_new, v_old


def sides(
    tokens: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, v_dim: int | None = None
) -> Sides:
    generator = torch.Generator().manual_seed(tokens + dim)
    dims = (dim, dim, v_dim or dim, v_dim or dim)
    new = [torch.randn(tokens, heads, d, generator=generator) for d in dims]
    # Some tokens have hardly changed, some not at all.
    for i in (1, 3):
        new[i][::3] = new[i - 1][::3] * 1.01
        new[i][1::3] = new[i - 1][1::3]
    return [x.to(dtype).to(device) for x in new]


def check(given: Sides) -> None:
    """Against float64. The differences are exact or rounded once, each sum rounds at most once an element."""
    with poisoned_outputs():
        got = kv_deviation(*given)
    for new, old, values in zip(given[::2], given[1::2], got, strict=True):
        assert (values.dtype, values.shape) == (FP32, new.shape[:1])
        want = (new.double() - old.double()).square().sum((1, 2))
        torch.testing.assert_close(values.double(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (2, 64), (1, 576), (3, 80), (1, 1), (5, 7), (33, 96)])
def test_every_dtype_and_size_of_head(heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(sides(5, heads, dim, dtype, device))


def test_nothing_around_the_tokens_is_read(device: torch.device) -> None:
    given = sides(21, 3, 40, BF16, device)
    memories = [torch.full((40, 5, 64), torch.nan, dtype=BF16, device=device) for _ in given]
    for memory, side in zip(memories, given, strict=True):
        memory[9:30, 1:4, 8:48] = side
    check([memory[9:30, 1:4, 8:48] for memory in memories])


@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 100, 257])
def test_any_number_of_tokens(tokens: int, device: torch.device) -> None:
    check(sides(tokens, 2, 64, BF16, device))


@pytest.mark.parametrize("gap", [0, 3, 16])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_halves_of_a_wider_tensor(dtype: torch.dtype, gap: int, device: torch.device) -> None:
    given = sides(21, 3, 48, dtype, device)
    joined = [torch.full((21, 3, 2 * 48 + gap), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    for i, whole in enumerate(joined):  # i = 0: new, 1: old
        whole[..., :48], whole[..., 48 : 2 * 48] = given[i], given[2 + i]
    check([joined[0][..., :48], joined[1][..., :48], joined[0][..., 48 : 2 * 48], joined[1][..., 48 : 2 * 48]])


def test_heads_outside_tokens_and_every_other_token(device: torch.device) -> None:
    given = sides(40, 4, 32, BF16, device)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    check([by_head[0], given[1], by_head[2][:], given[3]])
    check([x[::2] for x in by_head])
    check([x[1:, 1:] for x in given])


def test_values_may_have_other_heads_than_keys(device: torch.device) -> None:
    check(sides(9, 4, 192, BF16, device, v_dim=128))


def test_the_definition_is_close_to_the_kernel(device: torch.device) -> None:
    given = sides(30, 8, 128, BF16, device)
    for got, want in zip(kv_deviation(*given), kv_deviation_torch(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


def test_no_change_is_zero_and_the_same_again_is_the_same(device: torch.device) -> None:
    given = sides(30, 8, 128, BF16, device)
    first, second = kv_deviation(*given), kv_deviation(*given)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    same = kv_deviation(given[0], given[0].clone(), given[2], given[2].clone())
    assert not same[0].any()
    assert not same[1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token(bad: float, device: torch.device) -> None:
    given = sides(20, 2, 64, BF16, device)
    given[0][7, 1, 63] = bad
    k_dev, v_dev = kv_deviation(*given)
    assert not k_dev[7].isfinite()
    assert k_dev.isfinite().sum() == 19
    assert v_dev.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 2, 8, dtype=torch.float64)}, "k_new is torch.float64"),
        ({1: torch.zeros(3, 2, 8, dtype=BF16)}, "k_old is torch.bfloat16"),
        ({3: torch.zeros(3, 2, 8, device="meta")}, "v_old is torch.float32 on meta"),
        ({0: torch.zeros(3, 16)}, r"\[T, H, D\]"),
        ({0: torch.zeros(3, 0, 8)}, "not 0"),
        ({2: torch.zeros(3, 2, 16)[..., ::2]}, "last must be 1"),
        ({1: torch.zeros(4, 2, 8)}, "k_old has shape"),
        ({3: torch.zeros(3, 2, 9)}, "v_old has shape"),
        ({2: torch.zeros(4, 2, 8), 3: torch.zeros(4, 2, 8)}, "v_new has 4 tokens and k_new 3"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[int, torch.Tensor], message: str) -> None:
    given = [change.get(i, torch.zeros(3, 2, 8)) for i in range(4)]
    with pytest.raises(KernelArgumentError, match=message):
        kv_deviation(*given)


@pytest.mark.interpret
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(10, 8, 128), (7, 3, 80), (9, 1, 5)])
def test_each_byte_is_read_once_and_none_beside(tokens: int, heads: int, dim: int) -> None:
    # The sanitizer also sees that the alignment promised to the compiler is true.
    from lmcache.kernels.testing.sanitizer import sanitized

    joined = [torch.randn(tokens, heads, 2 * dim).to(BF16) for _ in range(2)]
    halves = [whole[..., part] for part in (slice(dim), slice(dim, None)) for whole in joined]
    with sanitized(*halves) as watched:
        kv_deviation(*halves)
    assert watched.loads.bytes == 4 * tokens * heads * dim * 2
    assert watched.stores.bytes == 2 * tokens * 4


@pytest.mark.interpret
def test_interpret_mode_really_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deviation, "_squared_distance", None)
    check(sides(5, 2, 32, BF16, torch.device("cpu")))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements() -> None:
    tokens = 2**31 // 1024 + 16
    if torch.cuda.mem_get_info()[0] < tokens * 2048 + 2**31:
        pytest.skip("not enough GPU memory")
    new = torch.zeros(tokens, 8, 128, dtype=BF16, device="cuda")
    new[-1, 7, 127] = 3
    k_dev, _ = kv_deviation(new, torch.zeros_like(new[:1]).expand_as(new), new[:, :1, :8], new[:, :1, :8])
    assert k_dev[-1] == 9
    assert k_dev.count_nonzero() == 1


def test_the_oracle_sees_a_missing_element(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kv_deviation
    monkeypatch.setitem(globals(), "kv_deviation", lambda *given: real(*[x[:, :, :-1] for x in given]))
    with pytest.raises(AssertionError):
        check(sides(5, 8, 128, BF16, device))


def test_the_poison_sees_what_is_not_written_and_what_is_beside(device: torch.device) -> None:
    with poisoned_outputs():
        assert torch.empty(2, 3, dtype=BF16, device=device).isnan().all()
        assert (torch.empty((4,), dtype=torch.int64, device=device) == -1).all()
    for place in (-1, 12):
        with pytest.raises(AssertionError, match="an output"), poisoned_outputs():
            torch.empty(3, device=device).view(torch.uint8).as_strided((1,), (1,), 256 + place).zero_()
