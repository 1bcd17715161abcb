"""Keys move to other positions as if they had been turned there at once, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from paged_layouts import RED_ZONE, random_bytes

from lmcache.errors import KernelArgumentError
from lmcache.kernels.rotary import ops as rotary
from lmcache.kernels.rotary.ops import shift_rotary, shift_rotary_torch
from lmcache.kernels.rotary.tables import RopeFrequencies, RotaryTable, rope_frequencies

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
INTEGERS = {2: torch.int16, 4: torch.int32}
POSITIONS = 5000


def plain(width: int, theta: float = 1e4) -> RopeFrequencies:
    return rope_frequencies({"rope_theta": theta}, width)


@dataclasses.dataclass(frozen=True)
class Case:
    """L layers of T tokens [H, D], of which `width` elements from `start` turn; `order` of the memory, and its gaps."""

    L: int = 2
    T: int = 37
    H: int = 2
    D: int = 32
    width: int = 32
    start: int = 0
    order: str = "LTHD"
    gap: int = 0  # elements that belong to nobody after each head
    interleaved: bool = False

    def buffer(self, dtype: torch.dtype, seed: int | None, device: torch.device) -> torch.Tensor:
        """Random numbers, or all bits set, with red zones."""
        sizes = self.L * self.T * self.H * (self.D + self.gap) + 2 * RED_ZONE
        if seed is None:
            return torch.full((sizes,), -1, dtype=INTEGERS[dtype.itemsize]).view(dtype).to(device)
        return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)

    def rows(self, buffer: torch.Tensor) -> torch.Tensor:
        """[L, T, H, D]"""
        strides, step = {}, 1
        for dim in reversed(self.order):
            strides[dim] = step
            step *= self.D + self.gap if dim == "D" else getattr(self, dim)
        return buffer.as_strided((self.L, self.T, self.H, self.D), [strides[d] for d in "LTHD"], RED_ZONE)


def some_positions(n: int, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Old and new; some are equal, some are negative."""
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.randint(0, POSITIONS, (2, n), generator=generator)
    new[::5] = old[::5]
    old[3::7] = -1
    new[4::11] = -5
    return old.to(device), new.to(device)


def turned(x: torch.Tensor, angles: torch.Tensor, case: Case) -> torch.Tensor:
    """float64 [.., T, H, D], turned by angles [T, width / 2], pair by pair."""
    x = x.double().clone()
    part = x[..., case.start : case.start + case.width]
    low, high = (part[..., ::2], part[..., 1::2]) if case.interleaved else part.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, width / 2]
    new = low * cos - high * sin, high * cos + low * sin
    low[...], high[...] = new
    return x


def assert_close(got: torch.Tensor, want: torch.Tensor, case: Case) -> None:
    """Within half a unit of the last place of the dtype, and 1e-6 of the longest pair for the arithmetic in fp32."""
    half = torch.finfo(got.dtype).eps / 2
    slack = 1e-6 * want.abs().max() if want.numel() else 0
    worst = ((got.double().cpu() - want).abs() - half * want.abs() - slack).max() if want.numel() else 0
    assert worst <= 0, f"{case}: {worst} too far"


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTEGERS[x.element_size()]).cpu()


def check(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_place: bool,
    op: Callable[..., None] = shift_rotary,
    frequencies: RopeFrequencies | None = None,
) -> None:
    frequencies = frequencies or plain(case.width)
    table = RotaryTable.from_frequencies(frequencies, POSITIONS, device=device)
    buffer = case.buffer(dtype, 1, device)
    keys = case.rows(buffer)
    before, keys_before = buffer.clone(), keys.cpu().clone()
    out_buffer = buffer if in_place else case.buffer(dtype, None, device)
    out_before = out_buffer.cpu().clone()
    old, new = some_positions(case.T, device)
    out = None if in_place else case.rows(out_buffer)
    op(keys, old, new, table, interleaved=case.interleaved, rotary_start=case.start, out=out)

    old, new = old.cpu(), new.cpu()
    live = (old >= 0) & (new >= 0)
    got = case.rows(out_buffer).cpu()
    want = turned(keys_before, (new - old).double()[:, None] * frequencies.inverse, case)
    assert_close(got[:, live], want[:, live], case)
    same = live & (old == new)
    assert torch.equal(bits(got[:, same]), bits(keys_before[:, same]))
    fixed = [*range(case.start), *range(case.start + case.width, case.D)]
    assert torch.equal(bits(got[:, live][..., fixed]), bits(keys_before[:, live][..., fixed]))
    # What is skipped and the red zones hold what they held.
    case.rows(out_before)[:, live] = got[:, live]
    assert torch.equal(bits(out_buffer), bits(out_before))
    if not in_place:
        assert torch.equal(bits(buffer), bits(before))


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "out"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, interleaved: bool, in_place: bool, device: torch.device) -> None:
    check(Case(D=64, width=64, interleaved=interleaved), dtype, device, in_place=in_place)


@pytest.mark.parametrize("tokens", [0, 1, 63, 100])
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
def test_any_number_of_tokens(tokens: int, interleaved: bool, device: torch.device) -> None:
    check(Case(T=tokens, L=1, interleaved=interleaved), BF16, device, in_place=tokens % 2 == 1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize(("dim", "width", "start"), [(80, 80, 0), (80, 32, 0), (48, 20, 5), (2, 2, 0), (7, 6, 1)])
def test_odd_sizes_and_partial_ropes(dim: int, width: int, start: int, interleaved: bool, device: torch.device) -> None:
    case = Case(D=dim, width=width, start=start, H=3, T=19, interleaved=interleaved)
    check(case, BF16 if interleaved else FP32, device, in_place=False)


@pytest.mark.parametrize(("gap", "interleaved"), [(0, False), (3, True), (32, False)])
@pytest.mark.parametrize("order", ["LTHD", "LHTD", "TLHD", "THLD", "HTLD"])
def test_any_strides(order: str, gap: int, interleaved: bool, device: torch.device) -> None:
    check(Case(order=order, gap=gap, H=3, interleaved=interleaved), BF16, device, in_place=gap == 32)


def test_many_layers_and_heads(device: torch.device) -> None:
    check(Case(L=5, H=7, T=9), BF16, device, in_place=True)


def test_one_layer_may_come_without_its_dimension(device: torch.device) -> None:
    case = Case(L=1)
    table = RotaryTable.from_frequencies(plain(32), POSITIONS, device=device)
    old, new = some_positions(case.T, device)
    keys = case.rows(case.buffer(BF16, 1, device)).clone()
    single = keys[0].clone()
    shift_rotary(keys, old, new, table)
    shift_rotary(single, old, new, table)
    assert torch.equal(bits(single), bits(keys[0]))


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition(dtype: torch.dtype, interleaved: bool, device: torch.device) -> None:
    for in_place in (True, False):
        case = Case(D=48, width=20, start=8, interleaved=interleaved)
        check(case, dtype, device, in_place=in_place, op=shift_rotary_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moving_is_turning_anew_even_far_away(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(L=1, T=50, D=64, width=64)
    frequencies = plain(64, 5e5)
    table = RotaryTable.from_frequencies(frequencies, 131_072, device=device)
    old = torch.linspace(0, 131_071, 50).long()
    new = old.flip(0)
    x = torch.randn(1, 50, 2, 64, generator=torch.Generator().manual_seed(3))
    keys = turned(x, old.double()[:, None] * frequencies.inverse, case).to(dtype).to(device)
    shift_rotary(keys, old.to(device), new.to(device), table)
    want = turned(x, new.double()[:, None] * frequencies.inverse, case)
    # Two roundings to the dtype, that before the move anywhere in the pair: its length is below 2 |largest|.
    error = (keys.cpu().double() - want).abs().max()
    assert error <= 1.5 * torch.finfo(dtype).eps * want.abs().max()


def test_there_and_back_again(device: torch.device) -> None:
    table = RotaryTable.from_frequencies(plain(32), POSITIONS, device=device)
    x = torch.randn(2, 37, 2, 32, generator=torch.Generator().manual_seed(4)).to(device)
    old, new = some_positions(37, device)
    keys = x.clone()
    shift_rotary(keys, old, new, table)
    assert not torch.allclose(keys, x, atol=0.1)
    shift_rotary(keys, new, old, table)
    torch.testing.assert_close(keys, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_positions_keep_every_bit(dtype: torch.dtype, interleaved: bool, device: torch.device) -> None:
    table = RotaryTable.from_frequencies(plain(32), POSITIONS, device=device)
    keys = random_bytes(2 * 40 * 2 * 32 * dtype.itemsize).view(dtype).view(2, 40, 2, 32).to(device)
    before, out = keys.clone(), torch.zeros_like(keys)
    where = torch.arange(40, device=device) * 100 + 7
    shift_rotary(keys, where, where, table, interleaved=interleaved, out=out)
    shift_rotary(keys, where, where, table, interleaved=interleaved)
    assert torch.equal(bits(keys), bits(before))
    assert torch.equal(bits(out), bits(before))


def test_a_factor_on_all_keys_is_kept_as_it_is(device: torch.device) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 512}
    frequencies = rope_frequencies(rope, 32)
    assert frequencies.attention_factor == pytest.approx(1.2079, abs=1e-4)
    case = Case(L=1, T=20)
    x = frequencies.attention_factor * torch.randn(1, 20, 2, 32, generator=torch.Generator().manual_seed(6))
    old, new = torch.arange(20) * 3, torch.arange(20) * 200
    keys = turned(x, old.double()[:, None] * frequencies.inverse, case).float().to(device)
    table = RotaryTable.from_frequencies(frequencies, 4000, device=device)
    shift_rotary(keys, old.to(device), new.to(device), table)
    want = turned(x, new.double()[:, None] * frequencies.inverse, case)
    torch.testing.assert_close(keys.cpu().double(), want, rtol=0, atol=3e-6)


# What runs, what is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 3, 2, 16, dtype=torch.float64)}, "float64; it must be one of"),
        ({"keys": torch.zeros(3, 16)}, "must be"),
        ({"keys": torch.zeros(2, 3, 2, 32)[..., ::2]}, "last must be 1"),
        ({"out": torch.zeros(2, 3, 2, 17)}, "it must be as keys"),
        ({"out": torch.zeros(2, 3, 2, 16, dtype=BF16)}, "it must be as keys"),
        ({"out": torch.zeros(2, 3, 2, 16, device="meta")}, "it must be as keys"),
        ({"old_positions": torch.zeros(3, dtype=torch.int32)}, "dense int64"),
        ({"new_positions": torch.zeros(4, dtype=torch.int64)}, r"dense int64 \[3\]"),
        ({"new_positions": torch.zeros(6, dtype=torch.int64)[::2]}, "dense int64"),
        ({"new_positions": torch.zeros(3, dtype=torch.int64, device="meta")}, "must be on cpu"),
        ({"old_positions": torch.tensor([0, 50, 1])}, "holds 50; the table has 50"),
        ({"new_positions": torch.tensor([0, 77, 1])}, "holds 77; the table has 50"),
        ({"rotary_start": 9}, "16 elements"),
        ({"rotary_start": -1}, "rotary_start=-1"),
        ({"table": RotaryTable.from_frequencies(plain(8), 50, device="meta")}, "table is on meta"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "keys": torch.zeros(2, 3, 2, 16),
        "old_positions": torch.arange(3),
        "new_positions": torch.arange(3),
        "table": RotaryTable.from_frequencies(plain(8), 50),
    }
    with pytest.raises(KernelArgumentError, match=message):
        shift_rotary(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({}, "missing: \\['rope_theta'\\]"),
        ({"rope_theta": 1e4, "rope_type": "magic"}, "it must be one of default, linear"),
        ({"rope_theta": 1e4, "type": "linear"}, "missing: \\['factor'\\]"),
        ({"rope_theta": 1e4, "type": "linear", "factor": 0}, "above 0"),
        ({"rope_theta": 1e4, "mrope_section": [1, 2]}, "unknown: \\['mrope_section'\\]"),
        ({"rope_theta": 1e4, "type": "dynamic", "factor": 2.0}, "needs max_positions"),
        (
            {"rope_theta": 1e4, "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "needs max_positions",
        ),
        (
            {"rope_theta": 1e4, "type": "su", "short_factor": [1.0], "long_factor": [1.0]}
            | {"original_max_position_embeddings": 10},
            "16 pairs",
        ),
    ],
)
def test_a_rope_that_is_not_understood_is_refused(rope: dict[str, object], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        rope_frequencies(rope, 32)


def test_tables_of_another_shape_are_refused() -> None:
    with pytest.raises(KernelArgumentError, match="dense float32"):
        RotaryTable(torch.zeros(5, 2, 4, dtype=torch.float64))
    with pytest.raises(KernelArgumentError, match="float64 or"):
        RotaryTable.from_frequencies(plain(8), 5, angles=torch.bfloat16)


@pytest.mark.interpret
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize(
    "case",
    [
        Case(T=20, D=128, width=64, order="TLHD"),
        Case(T=20, D=7, width=6, order="HLTD", gap=1),
        Case(T=20, D=24, width=8, start=8),
    ],
)
def test_keys_cross_memory_once(case: Case, interleaved: bool) -> None:
    # The sanitizer also sees that nothing else is touched, and that the alignment promised to the compiler is true.
    from lmcache.kernels.testing.sanitizer import sanitized

    keys, out = (case.rows(case.buffer(BF16, seed, torch.device("cpu"))) for seed in (1, None))
    old, table = torch.arange(case.T), RotaryTable.from_frequencies(plain(case.width), 100)
    new = old + 50
    with sanitized(keys, out, old, new, table.cos_sin) as watched:
        shift_rotary(keys, old, new, table, interleaved=interleaved, rotary_start=case.start, out=out)
    payload = keys.numel() * 2
    assert watched.stores.bytes == payload
    assert payload <= watched.loads.bytes <= payload + case.T * (2 * 8 + 4 * 4 * case.width // 2)


@pytest.mark.interpret
def test_interpret_mode_really_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "shift_rotary_torch", None)
    check(Case(L=1, T=5), BF16, torch.device("cpu"), in_place=True)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements() -> None:
    tokens = 2**31 // (8 * 128) + 16
    if torch.cuda.mem_get_info()[0] < tokens * 8 * 128 * 2 + 2**31:
        pytest.skip("not enough GPU memory")
    keys = torch.zeros(1, tokens, 8, 128, dtype=BF16, device="cuda")
    keys[0, -1] = 1
    table = RotaryTable.from_frequencies(plain(128), 100, device="cuda")
    old = torch.full((tokens,), 3, device="cuda")
    want = keys[:, -1:].clone()
    shift_rotary(want, old[-1:], old[-1:] + 60, table)
    shift_rotary(keys, old, old + 60, table)
    assert torch.equal(keys[:, -1:], want)
    keys[:, -1:] = 0
    assert not keys.view(torch.uint8).any()


def test_the_oracle_sees_a_wrong_angle(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = turned
    monkeypatch.setitem(globals(), "turned", lambda x, angles, case: real(x, angles * 1.001, case))
    with pytest.raises(AssertionError, match="too far"):
        check(Case(), BF16, device, in_place=True)
