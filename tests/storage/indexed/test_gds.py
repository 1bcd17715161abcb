"""The GDS tier. Without a GPU only KvikIO's POSIX path runs, beside a libcuda.so.1 of our own that answers errors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.storage.registry import build_backend

ROOT = Path(__file__).resolve().parents[3]


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(ConfigError, match=r"in your clone: pip install -e '\.\[gds\]'"):
        build_backend({"type": "gds", "path": str(tmp_path)}, "test")


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="unknown key pth; known: path, capacity"):
        build_backend({"type": "gds", "pth": "x"}, "test")


def test_everything_that_needs_kvikio(tmp_path: Path) -> None:
    if importlib.util.find_spec("kvikio") is None:
        pytest.skip("KvikIO is not installed: pip install -e '.[gds]'")
    if (gcc := shutil.which("gcc")) is None:
        pytest.skip("no gcc to build a stand-in for libcuda.so.1")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = str(tmp_path / "cufile.log")  # which it would leave in the current folder
    environment = {**os.environ, "PYTHONPATH": path, "LMCACHE_TEST_GDS": "1", "CUFILE_LOGFILE_PATH": log}
    source = ROOT / "tests/storage/indexed/libcuda_stub.c"
    subprocess.run([gcc, "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    environment["LD_LIBRARY_PATH"] = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/storage/indexed/gds_inside.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4000:]
