"""The Mooncake remote against a real master, in a network namespace, as its data ports listen on every address."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.storage.registry import build_backend

ROOT = Path(__file__).resolve().parents[3]
INNER = ROOT / "tests/storage/indexed/mooncake_inside.py"


def test_a_url_without_port_and_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected mooncake://host:port"):
        build_backend({"type": "remote", "url": "mooncake://host"}, "test")
    with pytest.raises(ConfigError, match="unknown key segmnt; known: url"):
        build_backend({"type": "remote", "url": "mooncake://host:1", "segmnt": 1}, "test")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ConfigError, match=r"in your clone: pip install -e '\.\[mooncake\]'"):
        build_backend({"type": "remote", "url": "mooncake://127.0.0.1:1"}, "test")


def test_everything_that_needs_a_master() -> None:
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.skip(f"the Mooncake client cannot be imported: {error}")
    probe = subprocess.run(["unshare", "-n", "sh", "-c", "ip link set lo up"], capture_output=True, check=False)
    if shutil.which("unshare") is None or probe.returncode:
        pytest.skip(f"no network namespace can be made here: {probe.stderr.decode().strip()}")
    command = f"ip link set lo up && exec {sys.executable} -m pytest -q -p no:cacheprovider {INNER}"
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", command],
        cwd=ROOT,
        env={**os.environ, "LMCACHE_TEST_NAMESPACE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4000:]
    assert not re.search(r"^SKIPPED (?!.*without a fixture)", done.stdout, re.MULTILINE)
