"""What the compiler makes of deviation and selection: wide loads where there is much to read, no spills."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from lmcache.kernels.attention import deviation
from lmcache.kernels.attention import select as selection

# The warning of triton 3.9 is that a product and a sum may become one instruction, which the tolerance allows for.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_blend_ops.toml").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE_LOAD = {"sm": r"LDG\.E\.128(\..*)?", "gfx": r"(global|buffer)_load_dwordx4"}
NARROW_LOAD = {"sm": r"LDG\.E(?!\.128).*", "gfx": r"(global|buffer)_load_(?!dwordx4).*"}
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("case", "heads", "dim", "dtype"),
    [("sum_squares", 8, 128, BF16), ("sum_squares_mla", 1, 576, BF16), ("sum_squares_fp32", 8, 128, FP32)],
)
@pytest.mark.parametrize("target", TARGETS)
def test_deviation_keeps_its_budget(
    target: str, case: str, heads: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache.kernels.testing import aot

    recorder = aot.Recorder(deviation._sum_squares.jitted)
    monkeypatch.setattr(deviation, "_sum_squares", recorder)
    new, old = torch.zeros(2, 64, heads, 2 * dim, dtype=dtype)
    deviation._launch(new[..., :dim], old[..., :dim], new[..., dim:], old[..., dim:], torch.zeros(2, 64))
    assert recorder.options["ALIGN"] == 16

    compiled = aot.compile_for(target, recorder)
    budget, vendor = BUDGETS[case][target], target.rstrip("0123456789_")
    assert compiled.local == 0, "spills"
    assert compiled.shared <= budget["shared"]
    assert compiled.registers <= budget["registers"]
    assert compiled.count(WIDE_LOAD[vendor]) >= budget["wide_loads"], compiled.opcodes
    assert compiled.count(NARROW_LOAD[vendor]) == 0, compiled.opcodes


@pytest.mark.parametrize("kernel", ["select_small", "count_digits", "count_blocks", "write_taken"])
@pytest.mark.parametrize("target", TARGETS)
def test_selection_keeps_its_budget(target: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    kernels = ("select_small", "count_digits", "count_blocks", "write_taken")
    recorders = {name: aot.Recorder(getattr(selection, f"_{name}").jitted) for name in kernels}
    for name, recorder in recorders.items():
        monkeypatch.setattr(selection, f"_{name}", recorder)
    small, large, out = torch.zeros(8192), torch.zeros(100_000), torch.zeros(1000, dtype=torch.int64)
    selection._launch_small(small, small > 0, out)
    selection._launch_large(large, large > 0, out)

    compiled = aot.compile_for(target, recorders[kernel])
    budget = BUDGETS[kernel][target]
    assert compiled.local == 0, "spills"
    assert compiled.shared <= budget["shared"]
    assert compiled.registers <= budget["registers"]
