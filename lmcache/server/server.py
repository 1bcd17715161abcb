"""The standalone store: listens, gives every client a thread, and stops in good order.

A thread a client, blocking in the kernel: measured against an event loop and asyncio in docs/storage/server.md.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from typing import Final

from lmcache import metrics
from lmcache.errors import ConfigError
from lmcache.server.config import ServerConfig, TlsConfig
from lmcache.server.connection import Connection, Shared
from lmcache.server.limits import Budget, Complaints
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.channel import Channel, TlsChannel
from lmcache.storage.backends.lm.client import naming, read_token
from lmcache.storage.manager import StorageManager

logger = logging.getLogger(__name__)

BACKLOG: Final = 128
_PAUSE_S: Final = 0.1  # when no connection can be accepted


class Server:
    """A StorageManager behind a port. ``start`` it, ``stop`` it; ConfigError or OSError when it cannot work."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        token = read_token(config.token_file)
        self._tls = None if config.tls is None else _tls_context(config.tls)
        self._listener = listen(config.host, config.port)
        self.port = int(self._listener.getsockname()[1])
        try:
            store = StorageManager(config.storage)
        except BaseException:
            self._listener.close()
            raise
        budget = Budget(min(config.in_flight, store.pool.capacity // 4))
        self._shared = Shared(config, token, store, budget, Complaints())
        self._connections: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name="lmcache-accept", daemon=True)

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return self._accepting.is_alive() and not self._stopping.is_set()

    def stats(self) -> dict[str, int]:
        """Connections, bytes in flight, and what the StorageManager holds; sets the gauges of the metrics, too."""
        with self._lock:
            connections = len(self._connections)
        metrics.SERVER_CONNECTIONS.set(connections)
        metrics.SERVER_IN_FLIGHT_BYTES.set(self._shared.budget.used)
        own = {"connections": connections, "in_flight_bytes": self._shared.budget.used}
        return {**own, **self._shared.store.stats()}

    def start(self) -> None:
        self._accepting.start()

    def stop(self) -> bool:
        """Finish requests under way within ``drain_timeout_s``, write what is queued, let go of everything. Idempotent.

        Returns whether every request could be finished.
        """
        if self._stopping.is_set():
            return True
        self._stopping.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        except OSError:
            logger.debug("the listener was closed already")
        if self._accepting.ident is not None:
            self._accepting.join()
        self._listener.close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            connection.drain()
        _join(connections, self.config.drain_timeout_s)
        unfinished = [connection for connection, thread in connections.items() if thread.is_alive()]
        if unfinished:
            logger.warning("%d clients were not done within %s s", len(unfinished), self.config.drain_timeout_s)
        for connection in unfinished:
            connection.abort()
        _join(connections, 1.0)
        self._shared.store.close()
        return not unfinished

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._stopping.is_set():
                    # Out of files, for example: what is connected goes on, and this is tried again.
                    self._shared.complaints.add("accept", "?", error)
                    self._stopping.wait(_PAUSE_S)
                continue
            try:
                self._welcome(sock, f"{address[0]}:{address[1]}")
            except (OSError, RuntimeError) as error:
                self._shared.complaints.add("accept", str(address[0]), error)
                sock.close()

    def _welcome(self, sock: socket.socket, peer: str) -> None:
        with self._lock:
            full = len(self._connections) >= self.config.max_connections
        if full:
            self._shared.complaints.add("full", peer, f"{self.config.max_connections} connections are open")
            if self._tls is None:
                # The send buffer of a new socket has room for these few bytes, so this does not wait for the client.
                sock.setblocking(False)
                sock.send(protocol.encode_frame(protocol.Failed("busy", "too many connections")))
            sock.close()
            return
        connection = Connection(self._shared, peer, lambda: self._open(sock))
        thread = threading.Thread(target=self._run, args=(connection,), name=f"lmcache-client-{peer}", daemon=True)
        with self._lock:
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                del self._connections[connection]
            raise

    def _open(self, sock: socket.socket) -> Channel:
        try:
            if self._tls is None:
                return Channel(sock)
            sock.settimeout(self.config.login_timeout_s)
            return TlsChannel(self._tls.wrap_socket(sock, server_side=True))
        except OSError:
            sock.close()
            raise

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                del self._connections[connection]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any that is free. ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error


def _tls_context(config: TlsConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with naming(cert_file=config.cert_file, key_file=config.key_file):
        context.load_cert_chain(config.cert_file.expanduser(), config.key_file and config.key_file.expanduser())
    if config.client_ca_file is not None:
        with naming(client_ca_file=config.client_ca_file):
            context.load_verify_locations(config.client_ca_file.expanduser())
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _join(connections: dict[Connection, threading.Thread], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for thread in connections.values():
        thread.join(max(0.0, deadline - time.monotonic()))
