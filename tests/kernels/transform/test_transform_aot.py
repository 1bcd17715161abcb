"""What the compiler makes of transform coding: no spills, tensor cores, wide accesses to pages and symbols."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache.kernels import PagedLayers
from lmcache.kernels.transform import ops as transform
from lmcache.kernels.transform.ops import Symbols, Transform

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_transform.toml").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MATRIX = {"sm": r"HMMA\.1688\.F32\.TF32", "gfx": r"v_mfma_f32_\d+x\d+x\d+_xf32"}
LOADS = {"sm": r"(LDG|LDGSTS)\.E(\.\w+)*\.128", "gfx": r"(global|buffer)_load_dwordx[24]"}
STORES = {
    "pack": {"sm": r"STG\.E\.128", "gfx": r"(global|buffer)_store_dword(x[24])?"},
    "unpack": {"sm": r"STG\.E\.128", "gfx": r"(global|buffer)_store_dwordx[24]"},
}
NARROW = {"sm": r"(LDG|STG)\.E\.[US](8|16)", "gfx": r"(global|buffer)_(load|store)_[us]?(byte|short).*"}


def recorded(way: str, kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What packing or unpacking 256 tokens of 2 layers of 8 heads would launch."""
    from lmcache.kernels.testing import aot

    name = f"_{way}_symbols"
    recorder = aot.Recorder(getattr(transform, name).jitted)
    monkeypatch.setattr(transform, name, recorder)
    monkeypatch.setattr(transform, "runs_kernel", lambda device: True)
    # vLLM's [B, H, N, 2D] with the heads of a token together; the keys.
    cache = torch.zeros(16, 16, 8, 2 * width, dtype=torch.bfloat16).transpose(1, 2)
    pages = PagedLayers([cache[..., :width]] * 2)
    wide, narrow = (0, width) if kind == "delta" else (width, 0)
    shapes = ((width,), (width,), (wide, wide), (wide, wide), (narrow,), (narrow,), (narrow,))
    given = Transform(*(torch.zeros(2, 8, *shape) for shape in shapes))
    symbols = Symbols.empty(2, 8, 256, width, delta=kind == "delta", device=torch.device("cpu"))
    getattr(transform, f"{way}_symbols")(pages, torch.arange(256), given, symbols)
    return recorder


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", ["klt", "delta"])
@pytest.mark.parametrize("way", ["pack", "unpack"])
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_keeps_its_budget(
    target: str, way: str, kind: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache.kernels.testing import aot

    recorder, vendor = recorded(way, kind, width, monkeypatch), re.sub(r"_?\d.*", "", target)
    options = recorder.options
    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS[way][kind][vendor]
    assert compiled.local <= aot.allowed_local(budget), "spills"
    assert compiled.registers <= budget["registers"]
    assert compiled.shared <= budget["shared"]
    tokens = options["BLOCK_T"] * (2 if kind == "klt" else 1)
    elements = tokens * options["BLOCK_D"] / (options["num_warps"] * (64 if vendor == "gfx" else 32))
    assert sum(compiled.opcodes.values()) / elements <= budget["instructions"]
    if kind == "klt":
        assert compiled.count(MATRIX[vendor]) > 0, compiled.opcodes
    assert compiled.count(LOADS[vendor]) > 0, compiled.opcodes
    assert compiled.count(STORES[way][vendor]) > 0, compiled.opcodes
    # Of an element nothing is moved alone: what is narrow are exponents, slots' flags and the anchors of a group.
    assert compiled.count(NARROW[vendor]) <= 8, compiled.opcodes
