"""A move that is made for many layers gives what shift_rotary gives."""

from __future__ import annotations

import pytest
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.rotary import shift as rotary_shift
from lmcache.kernels.rotary.ops import shift_rotary_torch
from lmcache.kernels.rotary.shift import RotaryShift
from lmcache.kernels.rotary.tables import RotaryTable, rope_frequencies

TABLE = RotaryTable.from_frequencies(rope_frequencies({"rope_theta": 1e4}, 32), 4096)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def positions(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs that are moved, not moved, and left out."""
    old, new = torch.arange(tokens) + 100, torch.arange(tokens) + 700
    new[tokens // 3 : tokens // 2] = old[tokens // 3 : tokens // 2]
    old[tokens // 2 : tokens // 2 + 5] = -1
    new[-3:] = -1
    return old, new


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim", "start"), [(1, 1, 32, 0), (63, 3, 32, 0), (100, 2, 72, 8)])
def test_it_is_what_shift_rotary_gives(
    tokens: int,
    heads: int,
    dim: int,
    start: int,
    dtype: torch.dtype,
    interleaved: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rotary_shift, "_BLOCK_ELEMENTS", 7 * heads * 32)  # many blocks, the last of them ragged
    keys = torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    old, new = (each.to(device) for each in positions(tokens))
    table = TABLE.to(device)
    want = keys.clone()
    shift_rotary_torch(want, old, new, table, interleaved=interleaved, rotary_start=start)
    moved = keys.clone()
    RotaryShift(old, new, table, interleaved=interleaved, rotary_start=start).apply(moved)
    # Sums may be rounded once or twice, which turns a few roundings to the keys' dtype.
    torch.testing.assert_close(moved, want, rtol=torch.finfo(dtype).eps, atol=1e-6)
    still = (old < 0) | (new < 0) | (old == new)
    assert torch.equal(moved[still], keys[still])
    outside = [i for i in range(dim) if not start <= i < start + 32]
    assert torch.equal(moved[..., outside], keys[..., outside])
    assert tokens < 10 or not torch.equal(moved[~still], keys[~still])


def test_rows_that_stay_keep_even_a_nan() -> None:
    keys = torch.full((4, 1, 32), float("nan"))
    keys[2] = 1
    RotaryShift(torch.tensor([-1, 5, 3, 7]), torch.tensor([9, 5, 4, -1]), TABLE).apply(keys)
    assert keys.isnan().all(-1).flatten().tolist() == [True, True, False, True]


def test_views_with_strides_are_moved_in_place() -> None:
    both = torch.randn(50, 2, 3, 32)
    old, new = positions(50)
    want = both[:, 0].clone()
    shift_rotary_torch(want, old, new, TABLE)
    values = both[:, 1].clone()
    RotaryShift(old, new, TABLE).apply(both[:, 0])
    torch.testing.assert_close(both[:, 0], want, rtol=1e-6, atol=1e-6)
    assert torch.equal(both[:, 1], values)


def test_nothing_is_moved_nowhere() -> None:
    RotaryShift(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), TABLE).apply(
        torch.zeros(0, 1, 32)
    )


def test_what_cannot_be_is_refused() -> None:
    two = torch.arange(2)
    with pytest.raises(KernelArgumentError, match="new_positions holds 4096; the table has 4096"):
        RotaryShift(two, two + 4095, TABLE)
    with pytest.raises(KernelArgumentError, match=r"old_positions is torch\.int32"):
        RotaryShift(two.int(), two, TABLE)
    with pytest.raises(KernelArgumentError, match=r"new_positions is torch.int64 \(3,\)"):
        RotaryShift(two, torch.arange(3), TABLE)
    shift = RotaryShift(two, two + 1, TABLE)
    for shape in ((3, 1, 32), (2, 32), (2, 1, 31)):
        with pytest.raises(KernelArgumentError, match=r"they must be \[2, H, D\]"):
            shift.apply(torch.zeros(shape))
    with pytest.raises(KernelArgumentError, match=r"keys are torch\.int32"):
        shift.apply(torch.zeros(2, 1, 32, dtype=torch.int32))
