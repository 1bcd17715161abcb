"""The names that extensions build on, and the package of docs/extending.md, installed and run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmcache.extend

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
NAMES = [
    "AttentionProblem",
    "BlendError",
    "BlendModel",
    "Buffer",
    "ChunkKey",
    "ClosedError",
    "Codec",
    "CodecConfig",
    "Config",
    "ConfigError",
    "CorruptChunkError",
    "EvictionPolicy",
    "GivenKV",
    "HEADER_BYTES",
    "KVShape",
    "KernelArgumentError",
    "LayerAttention",
    "Packed",
    "Place",
    "PlaneCodec",
    "Prompt",
    "Provider",
    "QuantisedCodec",
    "RatioConfig",
    "ReusedKV",
    "Rope",
    "Scheme",
    "Segment",
    "SelectorConfig",
    "Side",
    "StorageBackend",
    "StorageError",
    "TokenSelector",
    "build_backend",
    "build_codec",
    "build_selector",
    "check_chunk",
    "encode_header",
    "highest",
]
# Group: the registry that reads it.
GROUPS = {
    "lmcache.storage_backends": "lmcache.storage.registry:STORAGE_BACKENDS",
    "lmcache.remote_schemes": "lmcache.storage.registry:REMOTE_SCHEMES",
    "lmcache.eviction_policies": "lmcache.storage.registry:EVICTION_POLICIES",
    "lmcache.codecs": "lmcache.kernels.codecs.base:CODECS",
    "lmcache.token_selectors": "lmcache.blend.selectors:TOKEN_SELECTORS",
    "lmcache.blend_models": "lmcache.blend.models:BLEND_MODELS",
    "lmcache.attention_providers": "lmcache.kernels.attention.sparse_prefill:PROVIDERS",
}


def test_these_names_stay() -> None:
    assert dir(lmcache.extend) == NAMES
    for name in NAMES:
        assert getattr(lmcache.extend, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        lmcache.extend.Nothing  # noqa: B018


def test_a_type_checker_sees_what_is_loaded() -> None:
    source = Path(lmcache.extend.__file__).read_text()
    declared = re.findall(r"^    from (\S+) import (\w+) as \2$", source, re.MULTILINE)
    assert {name: module for module, name in declared} == lmcache.extend._HOME


def test_importing_it_loads_nothing() -> None:
    code = "import sys, lmcache.extend; assert not {'torch', 'pydantic', 'triton', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_group_is_read_by_its_registry(tmp_path: Path) -> None:
    info = tmp_path / "lmcache_all-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lmcache-all\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\nmine = json:loads\n" for group in GROUPS))
    checks = "".join(
        f"from {module} import {name}; assert {name}.get('mine') is json.loads, {group!r}\n"
        for group, (module, name) in ((group, target.split(":")) for group, target in GROUPS.items())
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", f"import json\n{checks}"], env=environment, check=True, timeout=120)
    assert all(f"`{group}`" in PAGE for group in GROUPS)


def test_the_package_of_the_page_works_once_it_is_installed(tmp_path: Path) -> None:
    """Slow: pip installs the package, and its own tests run in another process."""
    source, site = tmp_path / "source", tmp_path / "site"
    files = dict(
        re.findall(r"^`((?:lmcache_mine/|test_mine|pyproject)[\w./]*)`:\n\n```\w+\n(.*?)```", PAGE, re.M | re.S)
    )
    assert len(files) == 7
    for name, text in {**files, "lmcache_mine/__init__.py": ""}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), str(source / "test_mine.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
