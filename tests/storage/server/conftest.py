"""Servers and clients that are closed and checked for leaks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache.config import build
from lmcache.server.config import ServerConfig
from lmcache.server.server import Server
from lmcache.storage.backends.lm.client import Client, ClientConfig

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def open_server() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(**options: Any) -> Server:
        storage = {"memory": {"capacity": "16MiB"}, **options.pop("storage", {})}
        server = Server(build(ServerConfig, {"port": 0, "drain_timeout_s": 0.2, "storage": storage, **options}, "test"))
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()
        assert server._shared.budget.used == 0
        assert server._shared.store.pool.used_bytes == 0, "a buffer leaked"


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    clients = []

    def open_client(server: Any, scheme: str = "lm", **options: Any) -> Client:
        port = server if isinstance(server, int) else server.port
        clients.append(Client(ClientConfig(url=f"{scheme}://127.0.0.1:{port}", **options)))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()
