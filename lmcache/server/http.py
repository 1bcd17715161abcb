"""/metrics for Prometheus and /health for probes, over HTTP."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lmcache.errors import ConfigError
from lmcache.server.server import Server

logger = logging.getLogger(__name__)

CONNECTIONS: Final = 32
REQUEST_S: Final = 5.0
POLL_S: Final = 0.25


class StatusPages(http.server.ThreadingHTTPServer):
    """Serves until ``close``. A connection has ``REQUEST_S`` for everything, request and answer.

    At most ``CONNECTIONS`` at a time: one more takes the place of the oldest, so that clients that say or read little
    keep nobody out. Each serves one request.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, server: Server, host: str, port: int) -> None:
        self.chunk_server = server
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # since when, the oldest first
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL_S,), name="lmcache-http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        self._cut(before=math.inf, most=0)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self._cut(before=time.monotonic() - REQUEST_S, most=CONNECTIONS - 1)
        with self._lock:
            self._open[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be had; the caller closes the connection
            self._forget(request)
            raise

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._forget(request)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        self._forget(request)  # before it is closed, when another socket may get its number
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Every ``POLL_S``."""
        self._cut(before=time.monotonic() - REQUEST_S, most=CONNECTIONS)

    def _forget(self, request: object) -> None:
        with self._lock:
            self._open.pop(request, None)  # type: ignore[call-overload]

    def _cut(self, before: float, most: int) -> None:
        """End connections that are older than ``before``, and the oldest of more than ``most``; their threads end."""
        with self._lock:
            too_many = len(self._open) - most
            for number, (request, since) in enumerate(list(self._open.items())):
                if number >= too_many and since > before:
                    break
                del self._open[request]
                with contextlib.suppress(OSError):  # it has gone
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asks for a page and goes away is nobody's concern."""
        logger.debug("a page could not be served", exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: StatusPages
    server_version = "lmcache"
    sys_version = ""
    timeout = REQUEST_S  # of each wait, should the deadline of the whole come late

    def do_GET(self) -> None:
        self.wfile.write(self._page())

    def do_HEAD(self) -> None:
        self._page()

    def _page(self) -> bytes:
        """Sends the head of the answer, returns its body."""
        pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {"/metrics": self._metrics, "/health": self._health}
        page = pages.get(self.path.partition("?")[0])
        status, kind, body = page() if page else (404, "text/plain", b"try /metrics or /health\n")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds: not a line each."""

    def _metrics(self) -> tuple[int, str, bytes]:
        self.server.chunk_server.stats()
        return 200, CONTENT_TYPE_LATEST, generate_latest()

    def _health(self) -> tuple[int, str, bytes]:
        healthy = self.server.chunk_server.healthy
        body = {"status": "ok" if healthy else "stopping", **self.server.chunk_server.stats()}
        return 200 if healthy else 503, "application/json", json.dumps(body).encode()
