"""/metrics for Prometheus and /health for probes, over HTTP."""

from __future__ import annotations

import http.server
import json
import logging
import socket
import threading
from collections.abc import Callable
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lmcache.errors import ConfigError
from lmcache.server.server import Server

logger = logging.getLogger(__name__)

THREADS: Final = 8
TIMEOUT_S: Final = 5.0


class StatusPages(http.server.ThreadingHTTPServer):
    """Serves until ``close``. At most ``THREADS`` requests at a time; further ones are turned away."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, server: Server, host: str, port: int) -> None:
        self.chunk_server = server
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._slots = threading.BoundedSemaphore(THREADS)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
        self._thread = threading.Thread(target=self.serve_forever, name="lmcache-http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asks for a page and goes away is nobody's concern."""
        logger.debug("a page could not be served", exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: StatusPages
    server_version = "lmcache"
    sys_version = ""
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {"/metrics": self._metrics, "/health": self._health}
        page = pages.get(self.path.partition("?")[0])
        status, kind, body = page() if page else (404, "text/plain", b"try /metrics or /health\n")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds: not a line each."""

    def _metrics(self) -> tuple[int, str, bytes]:
        self.server.chunk_server.stats()
        return 200, CONTENT_TYPE_LATEST, generate_latest()

    def _health(self) -> tuple[int, str, bytes]:
        healthy = self.server.chunk_server.healthy
        body = {"status": "ok" if healthy else "stopping", **self.server.chunk_server.stats()}
        return 200 if healthy else 503, "application/json", json.dumps(body).encode()
