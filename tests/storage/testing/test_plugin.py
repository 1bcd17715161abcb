"""A backend in a package of its own: installed, found through its entry point, and held to the conformance suite."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.storage.registry import REMOTE_SCHEMES, build_backend

PLUGIN = Path(__file__).parent / "plugin"
ROOT = Path(__file__).resolve().parents[3]


def from_the_page(source: Path) -> None:
    """The package as somebody has it who copies what docs/storage_plugins.md shows."""
    page = (ROOT / "docs" / "storage_plugins.md").read_text()
    config, backend, suite, machine = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (project,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (source / "lmcache_ramdisk").mkdir(parents=True)
    (source / "lmcache_ramdisk" / "__init__.py").write_text(config + backend)
    (source / "conformance.py").write_text(suite + machine)
    (source / "pyproject.toml").write_text(project)


@pytest.mark.parametrize(
    "make", [lambda source: shutil.copytree(PLUGIN, source), from_the_page], ids=["folder", "page"]
)
def test_an_installed_package_brings_a_backend(tmp_path: Path, make: Callable[[Path], object]) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    make(source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), str(source / "conformance.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_without_the_package_its_name_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown storage backend 'ramdisk'; known: "):
        build_backend({"type": "ramdisk"}, "tiers[0]")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REMOTE_SCHEMES._builtins, "nowhere", "not_installed_anywhere.backend:Backend")
    with pytest.raises(ConfigError, match=r"tiers\[0\]: nowhere needs the package not_installed_anywhere"):
        build_backend({"type": "remote", "url": "nowhere://x"}, "tiers[0]")
