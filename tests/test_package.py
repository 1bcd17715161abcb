"""The import scheme: three top-level folders that are importable only as lmcache.kernels, .storage, .blend."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import lmcache, lmcache.kernels, lmcache.storage, lmcache.blend; print(lmcache.kernels.__name__)"


def python(code: str, cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_all_four_import_from_the_repository_root() -> None:
    done = python(f"import sys; sys.path.insert(0, '.'); {IMPORTS}; print(lmcache.kernels.__file__)", ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "lmcache.kernels"
    assert str(ROOT) in done.stdout


def test_all_four_import_from_an_installed_wheel(tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as b; print(b.build_wheel(r'{tmp_path}'))"
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(source)], check=True)
    # The working tree, not the last commit, is what is tested.
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, files):
        target = source / name
        if (ROOT / name).is_symlink() or not (ROOT / name).is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)],
        check=True,
        capture_output=True,
    )
    # -S -s would hide the dependencies as well, so the site folder goes first and __file__ tells what was found.
    code = f"import sys; sys.path.insert(0, r'{site}'); {IMPORTS}"
    code += "; print(lmcache.__file__, lmcache.storage.__file__, lmcache.kernels.__file__, lmcache.blend.__file__)"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(site)) == 4
    names = {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")}
    assert names == {"lmcache", "bin"}, "nothing but lmcache may be installed at the top level"


@pytest.mark.parametrize("name", ["triton_kernels", "storage", "blend"])
def test_the_folders_do_not_import_under_their_own_names(name: str) -> None:
    done = python(f"import sys; sys.path.insert(0, '.'); import {name}", ROOT)
    assert done.returncode != 0
    assert "ModuleNotFoundError: import lmcache." in done.stderr


@pytest.mark.serial
def test_import_is_light_and_fast() -> None:
    code = "import sys, lmcache; assert not {'torch', 'vllm', 'triton', 'numpy', 'pydantic'} & set(sys.modules)"
    best = min(_seconds(code) for _ in range(3))
    floor = min(_seconds("pass") for _ in range(3))
    assert best - floor < 0.3, f"import lmcache took {best - floor:.2f} s"


@pytest.mark.serial
def test_help_is_fast() -> None:
    code = "import sys; sys.argv = ['lmcache', '--help']; from lmcache.cli import main; main()"
    best = min(_seconds(code) for _ in range(3))
    assert best < 0.5, f"lmcache --help took {best:.2f} s"


def _seconds(code: str) -> float:
    start = time.perf_counter()
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start
