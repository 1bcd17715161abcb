"""What the compiler makes of the copies' kernel: wide accesses, no spills, few registers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from paged_layouts import Layout, Shape, paged

from lmcache.kernels.copy import kernel

# The warning of triton 3.9 is about floating-point arithmetic, and a copy has none.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets.toml").read_text())["copy_rows"]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16 = torch.bfloat16
# One specialisation of the kernel each: what a model's KV cache leads to, and the worst that can be asked.
CASES = {
    "pages": Layout("LBHNC", Shape(B=4, H=8, N=16, C=256), BF16),
    "tokens_NHC": Layout("LBNHC", Shape(B=4, H=8, N=16, C=256), BF16),
    "tokens_HNC": Layout("LBHNC", Shape(B=4, H=8, N=16, C=256), BF16),
    "tokens_cross_layer": Layout("BLHNC", Shape(B=4, H=8, N=16, C=256), BF16),
    "tokens_MLA": Layout("LBHNC", Shape(B=4, H=1, N=16, C=576), BF16),
    "tokens_fp8": Layout("LBNHC", Shape(B=4, H=8, N=16, C=128), torch.float8_e4m3fn),
    "ragged": Layout("LBHNC", Shape(B=4, H=3, N=5, C=7), torch.uint8),
}
WAYS: dict[str, dict[str, int]] = {
    "gather": {"scatter": False},
    "scatter": {"scatter": True},
    "to_host": {"scatter": False, "zeros": True, "programs": 32},
}
# Narrower accesses than these read the ids and the pointer table only, at most one a thread and strip.
WIDE = {
    "sm": (r"LDG\.E\.128(\..*)?", r"STG\.E\.128(\..*)?", r"STG?\.E(?!\.128).*"),
    "gfx": (
        r"(global|buffer|flat)_load_dwordx4",
        r"(global|buffer|flat)_store_dwordx4",
        r"(global|buffer|flat)_store_(?!dwordx4).*",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_keeps_its_budget(target: str, case: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    layout, aligned = CASES[case], case != "ragged"
    recorder = aot.Recorder(kernel.copy_rows.jitted)
    monkeypatch.setattr(kernel, "copy_rows", recorder)
    plane = paged(layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    units = plane.page_units if case == "pages" else plane.token_units
    n = 4 if case == "pages" else 64
    chunk = torch.zeros(2, n, units.unit_bytes, dtype=torch.uint8)
    kernel.launch_copy(plane, units, torch.arange(n), chunk, 0, **WAYS[way])
    assert recorder.options["ALIGN"] == (16 if aligned else 1)
    assert recorder.grid[0] <= WAYS[way].get("programs", recorder.grid[0])

    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS["aligned" if aligned else "ragged"][target]
    assert compiled.local == 0, "spills"
    assert compiled.shared <= budget["shared"]
    assert compiled.registers <= budget["registers"]
    loads, stores, narrow_stores = WIDE[target.rstrip("0123456789_")]
    if aligned:
        assert compiled.count(loads) >= budget["wide_accesses"], compiled.opcodes
        assert compiled.count(stores) == compiled.count(loads), compiled.opcodes
        assert compiled.count(narrow_stores) == 0, compiled.opcodes
