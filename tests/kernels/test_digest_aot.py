"""What the compiler makes of digests and probes: no spills, few registers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from lmcache.kernels import digest

# The warning of triton 3.9 is about floating-point arithmetic, and there is none here.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_digest.toml").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["_add_mixed", "_compare_words"])
def test_machine_code_keeps_its_budget(target: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache.kernels.testing import aot

    recorder = aot.Recorder(getattr(digest, kernel).jitted)
    monkeypatch.setattr(digest, kernel, recorder)
    monkeypatch.setattr(digest, "runs_kernel", lambda _device: True)
    if kernel == "_add_mixed":
        digest.content_digest(torch.zeros(1 << 20))
    else:
        digest.WordProbe([torch.zeros(64)]).look()
    compiled = aot.compile_for(target, recorder)
    budget = BUDGETS[kernel.lstrip("_")][target]
    print(target, kernel, compiled.registers, compiled.shared, compiled.local)
    assert compiled.local == 0, "spills"
    assert compiled.shared <= budget["shared"]
    assert compiled.registers <= budget["registers"]
