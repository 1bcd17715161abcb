"""One mode a process, because TRITON_INTERPRET counts only before triton is imported.

LMCACHE_KERNEL_MODE=cpu (default)  the host copies and the torch definitions against loops in numpy
                   interpret       the same tests through the Triton kernels, under the interpreter
                   aot             compile for GPUs that are not here, and look at the machine code
                   gpu             the same tests through compiled kernels; so does `pytest -m gpu`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MODES = ("cpu", "interpret", "aot", "gpu")
sys.path[:0] = [str(HERE), str(HERE / "copy"), str(HERE / "attention")]


def _mode(config: pytest.Config) -> str:
    given = os.environ.get("LMCACHE_KERNEL_MODE", "gpu" if config.option.markexpr == "gpu" else "cpu")
    if given not in MODES:
        raise pytest.UsageError(f"LMCACHE_KERNEL_MODE is {given!r}; it must be one of {', '.join(MODES)}")
    return given


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpret: needs LMCACHE_KERNEL_MODE=interpret")
    config.addinivalue_line("markers", "aot: needs LMCACHE_KERNEL_MODE=aot")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    os.environ.pop("TRITON_INTERPRET", None)
    if _mode(config) == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
        from lmcache.kernels.testing import interpreter  # only now, because it imports triton

        interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test without a mark of its own runs in every mode but aot; in gpu mode it carries the gpu mark."""
    mode = _mode(config)
    for item in items:
        if HERE not in item.path.parents:
            continue
        wanted = [name for name in ("interpret", "aot", "gpu") if item.get_closest_marker(name)]
        if mode == "gpu" and not wanted:
            item.add_marker("gpu")
        if wanted not in ([], [mode]) or (mode == "aot" and not wanted):
            item.add_marker(pytest.mark.skip(reason=f"not in mode {mode}"))
        elif mode == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if _mode(request.config) == "gpu" else "cpu")
