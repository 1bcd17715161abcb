"""What the compiler makes of sparse_prefill: matrix instructions, wide accesses, no spills."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_worlds import World

from lmcache.kernels.attention import split_kv
from lmcache.kernels.attention import triton_provider as sparse_prefill_triton
from lmcache.kernels.attention.sparse_prefill import sparse_prefill

# The warning of triton 3.9 asks for a choice that its users make, not its tests.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_sparse_prefill.toml").read_text())
ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "gfx942": "amd"}
LLAMA = World(prompts=((300, 1000),), heads=(32, 8), size=128, v_size=128, page=16)
# Each a specialisation of the kernel that a model leads to.
CASES: dict[str, tuple[World, dict[str, Any]]] = {
    "paged": (LLAMA, {}),
    "packed": (dataclasses.replace(LLAMA, page=0), {}),
    "some": (dataclasses.replace(LLAMA, prompts=((16, 1000),)), {}),
    "few": (dataclasses.replace(LLAMA, prompts=((4, 1000), (2, 500))), {"num_splits": 8}),
    "few_256": (World(((4, 1000),), (16, 8), 256, 256, page=16), {"num_splits": 8}),
    "gemma": (World(((300, 1000),), (16, 8), 256, 256, page=16), {"window": 512, "soft_cap": 50.0}),
    "deepseek": (World(((300, 1000),), (16, 16), 192, 128), {}),
    "phi": (World(((300, 1000),), (32, 32), 80, 80, torch.float16), {"window": 512}),
    "fp32": (dataclasses.replace(LLAMA, dtype=torch.float32), {}),
    "fp32_256": (World(((300, 1000),), (16, 8), 256, 256, torch.float32), {}),
}
WIDE = {
    "sm": (r"(LDGSTS|LDG)\.E\.(.*\.)?128(\..*)?", r"STG\.E\.128(\..*)?"),
    "gfx": (r"(global|buffer)_load_dwordx4", r"(global|buffer)_store_dword.*"),
}


@pytest.mark.parametrize(("case", "target"), [(case, target) for case in CASES for target in BUDGETS[case]])
def test_machine_code_keeps_its_budget(case: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    recorder = aot.Recorder(sparse_prefill_triton.attend_tiles.jitted)
    monkeypatch.setattr(sparse_prefill_triton, "attend_tiles", recorder)
    monkeypatch.setattr(sparse_prefill_triton, "runs_kernel", lambda device: True)
    monkeypatch.setattr(sparse_prefill_triton, "_architecture", lambda device: ARCHITECTURES[target])
    monkeypatch.setattr(sparse_prefill_triton, "merge_splits", lambda *args: None)
    world, options = CASES[case]
    batch = world.build(torch.device("cpu"))
    sparse_prefill(batch.q, batch.kv, batch.positions, batch.cu_q, **options)

    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS[case][target]
    assert compiled.local <= aot.allowed_local(budget), "spills"
    assert compiled.registers <= budget["registers"]
    assert compiled.shared <= budget["shared"]
    loads, stores = WIDE[target.rstrip("0123456789_")]
    assert compiled.count(loads) >= budget["wide_loads"], compiled.opcodes
    assert compiled.count(stores) >= 1, compiled.opcodes
    if world.dtype != torch.float32:
        assert compiled.count(budget["matrix"]) >= budget["matrices"], compiled.opcodes


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_machine_code_of_the_merge(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    recorder = aot.Recorder(split_kv._merge_rows.jitted)
    monkeypatch.setattr(split_kv, "_merge_rows", recorder)
    parts, out = torch.zeros(8, 6, 32, 128), torch.zeros(6, 32, 128, dtype=torch.bfloat16)
    split_kv._merge_triton(parts, parts[..., 0].contiguous(), out, torch.zeros(6, 32))
    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS["merge"][target]
    assert compiled.local == 0, "spills"
    assert compiled.registers <= budget["registers"]
    assert compiled.shared <= budget["shared"]
    assert compiled.count(WIDE[target.rstrip("0123456789_")][0]) >= budget["wide_loads"], compiled.opcodes
