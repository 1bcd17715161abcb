"""Random work over a server with memory and disk, with restarts, damage and broken connections, against a dict."""

from __future__ import annotations

import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from server_harness import data, get, put

from lmcache.config import build
from lmcache.server.config import ServerConfig
from lmcache.server.server import Server
from lmcache.storage.backends.lm.client import Client, ClientConfig
from lmcache.storage.testing import make_key

NUMBERS = st.integers(0, 7)


class ServerMachine(RuleBasedStateMachine):
    """Every acknowledged put is durable, and the disk has room for all: what is not damaged or removed is there."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.held: set[int] = set()
        self.damaged: set[int] = set()
        self.open()

    def open(self) -> None:
        tiers = [{"type": "disk", "path": self.folder.name}]
        # Memory for three chunks beside what is under way, so that chunks come back from the disk.
        storage = {"memory": {"capacity": "1MiB"}, "tiers": tiers}
        self.server = Server(build(ServerConfig, {"port": 0, "durable": True, "storage": storage}, "test"))
        self.server.start()
        self.client = Client(ClientConfig(url=f"lm://127.0.0.1:{self.server.port}"))

    @rule(n=NUMBERS)
    def put(self, n: int) -> None:
        assert put(self.client, n) == 1
        self.held.add(n)

    @rule(n=NUMBERS)
    def get(self, n: int) -> None:
        got = get(self.client, n)
        if n in self.damaged:
            assert got in ([], [data(n)]), "from memory a miss, from the disk what was put"
            if not got:
                self.held.discard(n)
            self.damaged.discard(n)
        else:
            assert got == ([data(n)] if n in self.held else [])

    @rule(n=NUMBERS)
    def remove(self, n: int) -> None:
        assert self.client.remove([make_key(n)]) == (n in self.held)
        self.held.discard(n)
        self.damaged.discard(n)

    @rule()
    def clear(self) -> None:
        self.client.clear()
        self.held.clear()
        self.damaged.clear()

    @rule(n=NUMBERS)
    def damage(self, n: int) -> None:
        buffer = self.server._shared.store._memory._buffers.get(make_key(n))
        if buffer is not None and n not in self.damaged:
            buffer.view[n] ^= 0x40
            self.damaged.add(n)

    @rule()
    def break_connections(self) -> None:
        with self.server._lock:
            connections = list(self.server._connections)
        for connection in connections:
            connection.abort()

    @rule()
    def restart(self) -> None:
        self.close()
        self.damaged.clear()
        self.open()

    @invariant()
    def sizes_agree(self) -> None:
        for n in range(8):
            assert bool(self.client.sizes([make_key(n)])) == (n in self.held)

    def close(self) -> None:
        self.client.close()
        self.server.stop()
        assert self.server._shared.budget.used == 0
        assert self.server._shared.store.pool.used_bytes == 0

    def teardown(self) -> None:
        self.close()
        self.folder.cleanup()


ServerMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestServerMachine = ServerMachine.TestCase
