"""A server process that is frozen while it is written to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from frozen import FORGET, check_a_removal_holds

from lmcache.storage.flow import owed
from lmcache.testing.server import ServerProcess


@pytest.fixture(scope="module")
def process() -> Iterator[ServerProcess]:
    process = ServerProcess("storage.memory.capacity=16MiB")
    yield process
    process.kill()


@pytest.mark.parametrize("how", FORGET)
def test_a_removal_holds_over_a_frozen_server(
    process: ServerProcess, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owed, "PAUSE_S", 0.05)
    options = {"type": "remote", "url": f"lm://127.0.0.1:{process.port}", "timeout_s": 0.5}
    check_a_removal_holds(process.process, options, FORGET[how])
