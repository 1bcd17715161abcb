"""One mode a process, because TRITON_INTERPRET counts only before triton is imported.

LMCACHE_KERNEL_MODE=cpu (default)  the host copies and the torch definitions against loops in numpy
                   interpret       the same tests through the Triton kernels, under the interpreter
                   aot             test_*_aot.py alone: compile for GPUs that are not here, and look at the machine code
                   gpu             the tests of cpu through compiled kernels; so does `pytest -m gpu`

The interpreter takes 140 us an operation and a compilation a second, so interpret and aot run a part of each grid of
parameters that has every pair of values (pairwise.py); cpu and gpu run it all. What is of host code and formats is
marked `host` and not run again by interpret. A test of another mode is not collected, or deselected.
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

from pairwise import covering  # noqa: E402  (only now, because its folder has just been added)


def _mode(config: pytest.Config) -> str:
    given = os.environ.get("LMCACHE_KERNEL_MODE", "gpu" if config.option.markexpr == "gpu" else "cpu")
    if given not in MODES:
        raise pytest.UsageError(f"LMCACHE_KERNEL_MODE is {given!r}; it must be one of {', '.join(MODES)}")
    return given


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpret: needs LMCACHE_KERNEL_MODE=interpret")
    config.addinivalue_line("markers", "aot: needs LMCACHE_KERNEL_MODE=aot")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "host: of host code and formats; interpret would only repeat cpu")
    config.addinivalue_line("markers", "every_case: runs the whole grid of its parameters in every mode")
    os.environ.pop("TRITON_INTERPRET", None)
    if _mode(config) == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
        from lmcache.kernels.testing import interpreter  # only now, because it imports triton

        interpreter.install()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that this mode runs nothing of are not even imported."""
    if HERE not in collection_path.parents or not collection_path.name.startswith("test_"):
        return None
    return True if collection_path.stem.endswith("_aot") != (_mode(config) == "aot") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test without a mark of its own runs in every mode but aot; in gpu mode it carries the gpu mark."""
    mode = _mode(config)
    ours = [item for item in items if HERE in item.path.parents]
    kept = [item for item in ours if _belongs(item, mode)]
    if mode in ("interpret", "aot"):
        kept = [item for cases in _by_test(kept) for item in _covering(cases)]
    if mode == "gpu":
        for item in kept:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))
    dropped = set(ours) - set(kept)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=[item for item in ours if item in dropped])


def _belongs(item: pytest.Item, mode: str) -> bool:
    wanted = [name for name in ("interpret", "aot", "gpu") if item.get_closest_marker(name)]
    if mode == "aot" or wanted:
        return wanted == [mode]
    return mode != "interpret" or not item.get_closest_marker("host")


def _by_test(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """The cases of each test function, in their order."""
    tests: dict[tuple[object, object], list[pytest.Item]] = {}
    for item in items:
        tests.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    return list(tests.values())


def _covering(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Some of the cases of a test, with every pair of its parameters' values."""
    if len(cases) == 1 or cases[0].get_closest_marker("every_case"):
        return cases
    return [cases[i] for i in covering([item.callspec._idlist for item in cases])]  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if _mode(request.config) == "gpu" else "cpu")
