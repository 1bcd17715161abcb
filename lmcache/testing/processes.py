"""What every server that is started here needs: free ports, and waiting until it serves."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # where the package lies: a checkout, or site-packages
START_S = 20.0


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free, as are those 10,000 above them, where some servers listen too.

    All are below those that the system gives to clients.
    """
    found: list[int] = []
    for port in range(11_000 + time.monotonic_ns() % 9_000, 22_700):
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            for probe, number in ((one, port), (two, port + 10_000)):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", number))
            found.append(port)
            if len(found) == count:
                return found
    raise OSError("no free port")


def free_port() -> int:
    return free_ports(1)[0]


def listens(port: int) -> bool:
    """Whether something accepts connections at this port of 127.0.0.1."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def wait_until(true: Callable[[], object], timeout_s: float = START_S) -> None:
    """Poll ``true()`` until it holds; for what only the server knows. TimeoutError when it does not come to hold."""
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("it did not come to hold")
        time.sleep(0.02)


def environment(**more: str) -> dict[str, str]:
    """Of a child that imports this very package."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}
