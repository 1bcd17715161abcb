"""What the compiler makes of moving keys: 16-byte accesses, angles in registers, no spills."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from paged_layouts import Layout, Shape, paged

from lmcache.kernels.rotary import ops as rotary
from lmcache.kernels.rotary.tables import RotaryTable

# The warning of triton 3.9 is that a product and a sum may become one instruction, which the tolerance allows for.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_rotary.toml").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16 = torch.bfloat16
TOKENS = 64
WIDE = {
    "sm": (r"LDG\.E\.128(\..*)?", r"STG\.E\.128(\..*)?", r"STG\.E(?!\.128).*"),
    "gfx": (r"(global|buffer)_load_dwordx4", r"(global|buffer)_store_dwordx4", r"(global|buffer)_store_(?!dwordx4).*"),
}


def table(width: int) -> RotaryTable:
    return RotaryTable.from_parameters({"rope_theta": 1e4}, 128, head_dim=width)


def launch_keys(dtype: torch.dtype, interleaved: bool) -> None:
    keys, positions = torch.zeros(4, TOKENS, 8, 128, dtype=dtype), torch.arange(TOKENS)
    turn = rotary._Turn(*[table(128)] * 2, 0, interleaved)
    rotary._launch(keys, keys, None, positions, positions, turn)


def launch_pages(shape: Shape, width: int, start: int, interleaved: bool, dtype: torch.dtype = BF16) -> None:
    layout = Layout("LBNHC", shape, dtype)
    plane = paged(layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    slots = torch.arange(TOKENS)
    chunk = torch.zeros(shape.L, TOKENS, shape.H, shape.C, dtype=dtype)
    turn = rotary._Turn(*[table(width)] * 2, start, interleaved)
    rotary._launch(chunk, plane.layers[0], (plane, slots, 0), slots, slots, turn)


CASES = {
    "keys_neox": lambda: launch_keys(BF16, False),
    "keys_gptj": lambda: launch_keys(BF16, True),
    "keys_fp32": lambda: launch_keys(torch.float32, False),
    "pages": lambda: launch_pages(Shape(B=4, H=8, N=16, C=256), 128, 0, False),
    "pages_mla": lambda: launch_pages(Shape(B=4, H=1, N=16, C=576), 64, 512, True),
    "ragged": lambda: launch_pages(Shape(B=16, H=3, N=5, C=7), 6, 1, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_keeps_its_budget(target: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    recorder = aot.Recorder(rotary._shift_rows.jitted)
    monkeypatch.setattr(rotary, "_shift_rows", recorder)
    monkeypatch.setattr(rotary, "_NUM_WARPS", 2 if target.startswith("gfx") else 4)
    CASES[case]()
    aligns = recorder.options["SOURCE_ALIGN"], recorder.options["TARGET_ALIGN"]
    assert aligns == ((2, 2) if case == "ragged" else (16, 16))

    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS[case][target]
    assert compiled.local == 0, "spills"
    assert compiled.shared <= budget["shared"]
    assert compiled.registers <= budget["registers"]
    if case != "ragged":
        loads, stores, narrow_stores = WIDE[target.rstrip("0123456789_")]
        assert compiled.count(loads) >= budget["wide_loads"], compiled.opcodes
        assert compiled.count(stores) == budget["wide_stores"], compiled.opcodes
        assert compiled.count(narrow_stores) == 0, compiled.opcodes
