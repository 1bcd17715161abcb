"""What the compiler makes of moving keys: 16-byte accesses, angles in registers, no spills."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache.kernels.rotary import ops as rotary
from lmcache.kernels.rotary.tables import RotaryTable, rope_frequencies

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
    return RotaryTable.from_frequencies(rope_frequencies({"rope_theta": 1e4}, width), 128)


def launch(
    heads: int = 8,
    content: int = 128,
    *,
    width: int = 128,
    start: int = 0,
    interleaved: bool = False,
    dtype: torch.dtype = BF16,
) -> None:
    """In place where all elements turn."""
    keys = torch.zeros(4, TOKENS, heads, content, dtype=dtype)
    out, positions = keys if width == content else torch.zeros_like(keys), torch.arange(TOKENS)
    rotary._launch(keys, out, positions, positions, table(width), start, interleaved)


CASES: dict[str, dict[str, Any]] = {
    "keys_neox": {},
    "keys_gptj": {"interleaved": True},
    "keys_fp32": {"dtype": torch.float32},
    "partial": {"content": 256},
    "partial_mla": {"heads": 1, "content": 576, "width": 64, "start": 512, "interleaved": True},
    "ragged": {"heads": 3, "content": 7, "width": 6, "start": 1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_keeps_its_budget(target: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    recorder = aot.Recorder(rotary._shift_rows.jitted)
    monkeypatch.setattr(rotary, "_shift_rows", recorder)
    monkeypatch.setattr(rotary, "_NUM_WARPS", 2 if target.startswith("gfx") else 4)
    launch(**CASES[case])
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
