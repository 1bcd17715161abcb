"""The server as a service: signals, the word to systemd, the order of starting and stopping."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading

from lmcache.config import service_manager_socket
from lmcache.server.config import ServerConfig
from lmcache.server.http import StatusPages
from lmcache.server.server import Server

logger = logging.getLogger(__name__)


def run(config: ServerConfig) -> bool:
    """Serve until SIGTERM or SIGINT, on the main thread; whether everything could be finished. ConfigError."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    server = Server(config)
    pages = None
    try:
        if config.http_port is not None:
            pages = StatusPages(server, config.http_host, config.http_port)
        server.start()
        logger.info("listening on %s:%d%s", config.host, server.port, " over TLS" if config.tls else "")
        if pages is not None:
            logger.info("metrics and health on %s:%d", config.http_host, pages.port)
        notify("READY=1")
        told.wait()
        notify("STOPPING=1")
        logger.info("stopping")
    finally:
        finished = server.stop()
        if pages is not None:
            pages.close()
    logger.info("stopped")
    return finished


def notify(state: str) -> None:
    """Tell systemd, where it wants to know."""
    if address := service_manager_socket():
        if address.startswith("@"):
            address = "\0" + address[1:]  # in the abstract namespace
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.send(state.encode())
