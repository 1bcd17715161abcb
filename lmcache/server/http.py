"""/metrics for Prometheus and /health for probes: a uvicorn server on a thread of its own.

uvicorn has no deadline for a request's head or for an answer that is not read, and its ``limit_concurrency`` refuses
newcomers, so that 32 silent clients would keep every probe out. ``_Connection`` adds both limits.
"""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmcache.server.server import Server, listen

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

CONNECTIONS: Final = 32
REQUEST_S: Final = 5.0


class StatusPages:
    """Serves until ``close``; ConfigError when the address is taken.

    A connection has ``REQUEST_S`` for everything, request and answer, and serves one request. Of more than
    ``CONNECTIONS`` the oldest is cut.
    """

    def __init__(self, server: Server, host: str, port: int) -> None:
        self._server = server
        self._open: dict[_Connection, asyncio.TimerHandle] = {}  # with what cuts it, the oldest first
        sock = listen(host, port)
        self.port = int(sock.getsockname()[1])
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._answer,
                http=type("_Connection", (_Connection,), {"open": self._open}),
                interface="asgi3",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",  # what clients send is no concern of our log
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._uvicorn.run, args=([sock],), name="lmcache-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cut what is open, and let go of the port. Idempotent."""
        self._uvicorn.should_exit = True
        self._thread.join()

    async def _answer(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        assert scope["type"] == "http"
        status, kind, body = await asyncio.to_thread(self._page, scope["path"])
        headers = {b"content-type": kind.encode(), b"content-length": str(len(body)).encode(), b"connection": b"close"}
        await send({"type": "http.response.start", "status": status, "headers": headers.items()})
        await send({"type": "http.response.body", "body": body})

    def _page(self, path: str) -> tuple[int, str, bytes]:
        if path == "/metrics":
            self._server.stats()
            return 200, CONTENT_TYPE_LATEST, generate_latest()
        if path == "/health":
            healthy = self._server.healthy
            body = {"status": "ok" if healthy else "stopping", **self._server.stats()}
            return 200 if healthy else 503, "application/json", json.dumps(body).encode()
        return 404, "text/plain", b"try /metrics or /health\n"


class _Connection(H11Protocol):
    """uvicorn's HTTP connection, with a deadline of its whole life. Runs on the event loop."""

    open: dict[_Connection, asyncio.TimerHandle]  # those of the same StatusPages

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.open) >= CONNECTIONS:
            next(iter(self.open)).cut()
        self.open[self] = self.loop.call_later(REQUEST_S, self.cut)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """uvicorn stops."""
        self.cut()

    def cut(self) -> None:
        self._forget()
        self.transport.abort()

    def _forget(self) -> None:
        if (timer := self.open.pop(self, None)) is not None:
            timer.cancel()
