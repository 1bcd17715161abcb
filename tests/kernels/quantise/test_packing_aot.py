"""What the compiler makes of packing: no spills, wide accesses to the pages, tensor cores for the rotation."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels import PagedLayers
from lmcache.kernels.quantise import packing
from lmcache.kernels.quantise.scheme import Scheme, SideLayout

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_packing.toml").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SCHEMES = {
    "fp8": Scheme(8, fp8=True),
    "int8": Scheme(8),
    "int4_channel": Scheme(4, "channel", group=64),
    "int3_token": Scheme(3),
    "int2_channel": Scheme(2, "channel", group=32),
    "rotated4": Scheme(4, rotate=True),
}
WIDE = {
    "pack": {"sm": r"LDG\.E\.128(\..*)?", "gfx": r"(global|buffer)_load_dwordx[24]"},
    "unpack": {"sm": r"STG\.E\.128(\..*)?", "gfx": r"(global|buffer)_store_dwordx[24]"},
}
MATRIX = {"sm_80": r"HMMA.*", "sm_90": r"HG?MMA.*", "sm_100": r"(HMMA|UTC.*MMA).*", "gfx942": r"v_mfma.*"}


@pytest.mark.parametrize("way", ["pack", "unpack"])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_keeps_its_budget(target: str, name: str, way: str) -> None:
    from lmcache.kernels.testing import aot

    scheme = SCHEMES[name]
    recorder = aot.Recorder(getattr(packing, f"_{way}_tile").jitted)
    # vLLM's [B, H, N, 2D] with the heads of a token together; the keys.
    cache = torch.zeros(4, 16, 8, 256, dtype=torch.bfloat16).transpose(1, 2)
    pages = PagedLayers([cache[..., :128]] * 2)
    layout = SideLayout(scheme, 64, 8, 128)
    packed = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    packing._launch(recorder, pages, torch.arange(64), layout, packed, 0)
    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS[way]["rotated" if scheme.rotate else "plain"][target]
    assert compiled.local == 0, "spills"
    assert compiled.registers <= budget["registers"]
    assert compiled.shared <= budget["shared"]
    assert compiled.count(WIDE[way][target.rstrip("0123456789_")]) >= (2 if scheme.rotate else 8), compiled.opcodes
    if scheme.rotate:
        assert compiled.count(MATRIX[target]) > 0, compiled.opcodes


@pytest.mark.parametrize("way", ["pack", "unpack"])
@pytest.mark.parametrize("width", [256, 576])
@pytest.mark.parametrize("name", ["fp8", "int4_token"])
def test_wide_heads_do_not_spill(name: str, width: int, way: str) -> None:
    """576: the latent of MLA."""
    from lmcache.kernels.testing import aot

    scheme = {**SCHEMES, "int4_token": Scheme(4)}[name]
    recorder = aot.Recorder(getattr(packing, f"_{way}_tile").jitted)
    pages = PagedLayers([torch.zeros(4, 1, 16, width, dtype=torch.bfloat16)] * 2)
    layout = SideLayout(scheme, 64, 1, width)
    packed = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    packing._launch(recorder, pages, torch.arange(64), layout, packed, 0)
    assert aot.compile_for("sm_90", recorder).local == 0


def test_a_rotation_that_no_gpu_has_room_for_is_refused() -> None:
    """Its matrix would take 2 MiB of shared memory."""
    scheme = Scheme(4, rotate=True)
    pages, layout = PagedLayers([torch.zeros(4, 1, 16, 576)]), SideLayout(scheme, 64, 1, 576)
    packed = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
    with pytest.raises(KernelArgumentError, match="heads of 576 elements; the kernel can rotate those of at most 256"):
        packing._launch(packing._pack_tile, pages, torch.arange(64), layout, packed, 0)
