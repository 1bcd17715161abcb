"""What the compiler makes of copies to and from an address: wide accesses, no spills, few registers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from paged_layouts import Layout, Shape, paged

from lmcache.kernels.copy import host
from lmcache.kernels.copy.host import HostTransfer

# The warning of triton 3.9 is about floating-point arithmetic, and a copy has none.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_host.toml").read_text())["copy_rows_at"]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16 = torch.bfloat16
CASES = {
    "tokens_NHC": Layout("LBNHC", Shape(B=4, H=8, N=16, C=256), BF16),
    "tokens_HNC": Layout("LBHNC", Shape(B=4, H=8, N=16, C=256), BF16),
    "tokens_MLA": Layout("LBHNC", Shape(B=4, H=1, N=16, C=576), BF16),
    "ragged": Layout("LBHNC", Shape(B=4, H=3, N=5, C=7), torch.uint8),
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


@pytest.mark.parametrize("to_host", [True, False], ids=["to_host", "from_host"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_keeps_its_budget(target: str, case: str, to_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    layout, aligned = CASES[case], case != "ragged"
    recorder = aot.Recorder(host._copy_rows_at.jitted)
    monkeypatch.setattr(host, "_copy_rows_at", recorder)
    monkeypatch.setattr(host, "runs_kernel", lambda _device: True)
    plane = paged(layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    chunk = torch.zeros(2, 64, plane.token_bytes, dtype=torch.uint8)
    transfer = HostTransfer(plane.device, direct_bytes=1 << 40)
    (transfer.copy_to_host if to_host else transfer.copy_from_host)(plane, torch.arange(64) % 20, chunk)
    assert recorder.options["ALIGN"] == (16 if aligned else 1)
    assert recorder.grid[0] <= transfer.programs

    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS["aligned" if aligned else "ragged"][target]
    print(target, case, to_host, compiled.registers, compiled.shared, compiled.local)
    assert compiled.local == 0, "spills"
    assert compiled.shared <= budget["shared"]
    assert compiled.registers <= budget["registers"]
    loads, stores, narrow_stores = WIDE[target.rstrip("0123456789_")]
    if aligned:
        assert compiled.count(loads) >= budget["wide_accesses"], compiled.opcodes
        assert compiled.count(stores) == compiled.count(loads), compiled.opcodes
        assert compiled.count(narrow_stores) == 0, compiled.opcodes
