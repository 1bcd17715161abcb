"""The lm:// backend over real processes: memory, memory and disk, acknowledged when on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lmcache.storage.backends.lm.backend import LMServerBackend
from lmcache.storage.backends.lm.client import ClientConfig
from lmcache.storage.base import StorageBackend
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests
from lmcache.testing.server import ServerProcess


@pytest.fixture(scope="class")
def process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = str(tmp_path_factory.mktemp("kv"))
    overrides = [override.replace("FOLDER", folder) for override in request.cls.overrides]
    process = ServerProcess("storage.memory.capacity=64MiB", *overrides)
    yield process
    status, said = process.terminate()
    assert status == 0, said
    assert "Traceback" not in said


class OverAProcess(BackendTests):
    durable = False
    selects_tenants = True
    overrides: tuple[str, ...] = ()

    @pytest.fixture
    def open_backend(self, process: ServerProcess) -> Callable[[], StorageBackend]:
        url = f"lm://127.0.0.1:{process.port}"
        before = LMServerBackend(ClientConfig(url=url))
        before.clear()
        before.close()
        return lambda: build_backend({"type": "remote", "url": url}, "test")


class TestMemoryServer(OverAProcess):
    durable = True  # the server keeps what a client put when that client goes


class TestDiskServer(OverAProcess):
    durable = True
    overrides = ("storage.tiers=[{type: disk, path: FOLDER}]",)


class TestDurableServer(OverAProcess):
    durable = True
    overrides = ("storage.tiers=[{type: disk, path: FOLDER}]", "durable=true")
