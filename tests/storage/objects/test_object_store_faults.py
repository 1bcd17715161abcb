"""Object stores when networks and servers fail: a miss or a StorageError in time, and no wrong byte ever."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore", reason="obstore is not installed")

from object_places import CHUNK, QUICK, Opened, opened, options, pool, seaweed

from lmcache.errors import ClosedError, StorageError
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import BackendTests, make_key, take
from lmcache.testing.objects import SeaweedFS
from lmcache.testing.processes import free_port, wait_until
from lmcache.testing.proxy import FaultyProxy

__all__ = ["opened", "options", "pool", "seaweed"]
put, get = BackendTests.put, BackendTests.get
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(seaweed.port)
    yield proxy
    proxy.close()


def every_operation_fails(backend: StorageBackend, pool: PinnedPool, within_s: float) -> None:
    """Each raises StorageError in time; no buffer is kept."""
    buffers = [take(pool, CHUNK) for _ in range(3)]
    keys = [make_key(n) for n in range(3)]
    operations: list[Callable[[], object]] = [
        lambda: backend.sizes(keys),
        lambda: backend.get(keys, buffers),
        lambda: backend.put([make_key(n) for n in range(10, 13)], buffers),
        lambda: backend.remove(keys),
        lambda: backend.clear(),
    ]
    try:
        for operation in operations:
            begun = time.monotonic()
            with pytest.raises(StorageError):
                operation()
            assert time.monotonic() - begun < within_s
    finally:
        for buffer in buffers:
            buffer.release()


def test_a_refused_connection_is_an_error_and_not_one_at_start(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    backend = opened({**options, **QUICK, "endpoint": f"http://127.0.0.1:{free_port()}"})
    assert "cannot be reached now" in caplog.text
    every_operation_fails(backend, pool, within_s=3)


def test_a_server_that_hangs_is_an_error_in_time_and_answers_again(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, proxy: FaultyProxy
) -> None:
    backend = opened({**options, **QUICK, "retries": 0, "endpoint": proxy.endpoint})
    data = put(backend, pool, make_key(1), CHUNK, seed=1)
    proxy.hang = True
    every_operation_fails(backend, pool, within_s=4)
    proxy.hang = False
    assert get(backend, pool, make_key(1), CHUNK) == data


def test_an_answer_that_is_too_slow_is_an_error(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, proxy: FaultyProxy
) -> None:
    backend = opened({**options, **QUICK, "retries": 0, "endpoint": proxy.endpoint})
    data = put(backend, pool, make_key(1), 4 << 20, seed=1)
    proxy.slow_s = 0.1
    buffer = take(pool, 4 << 20)
    begun = time.monotonic()
    with pytest.raises(StorageError):
        backend.get([make_key(1)], [buffer])
    assert time.monotonic() - begun < 5
    buffer.release()
    proxy.slow_s = 0
    assert get(backend, pool, make_key(1), 4 << 20) == data


def test_a_reset_midway_is_an_error_or_is_made_good_by_a_retry(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, proxy: FaultyProxy
) -> None:
    backend = opened({**options, **QUICK, "endpoint": proxy.endpoint})
    data = put(backend, pool, make_key(1), 1 << 20, seed=1)
    proxy.reset_after = 500_000
    with contextlib.suppress(StorageError):
        assert get(backend, pool, make_key(1), 1 << 20) in (None, data)
    proxy.reset_after = None
    assert get(backend, pool, make_key(1), 1 << 20) == data


@pytest.mark.parametrize("place", [1500, 5000, 500_000])
def test_a_bit_that_the_network_flips_is_a_miss(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, proxy: FaultyProxy, place: int
) -> None:
    backend = opened({**options, **QUICK, "endpoint": proxy.endpoint})
    put(backend, pool, make_key(1), 1 << 20, seed=1)
    proxy.flip_after = place
    assert get(backend, pool, make_key(1), 1 << 20) is None


def test_a_server_that_is_killed_and_comes_back_keeps_what_it_acknowledged(
    tmp_path: Path, pool: PinnedPool, opened: Opened, seaweed: SeaweedFS
) -> None:
    server = SeaweedFS(tmp_path)
    try:
        backend = opened(server.options("x", **QUICK))
        data = put(backend, pool, make_key(1), CHUNK, seed=1)
        server.kill()
        every_operation_fails(backend, pool, within_s=3)
        server.start()
        assert get(backend, pool, make_key(1), CHUNK) == data
    finally:
        server.kill()


def test_closing_during_transfers_ends_them(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, proxy: FaultyProxy
) -> None:
    backend = opened({**options, **QUICK, "retries": 0, "concurrency": 1, "endpoint": proxy.endpoint})
    buffers = [take(pool, CHUNK) for _ in range(4)]
    keys = [make_key(n) for n in range(4)]
    assert backend.put(keys, buffers) == 4
    proxy.hang = True
    outcome: list[object] = []

    def read() -> None:
        try:
            outcome.append(backend.get(keys, buffers))
        except StorageError as error:
            outcome.append(error)

    thread = threading.Thread(target=read)
    begun, seen = time.monotonic(), proxy.requests
    thread.start()
    wait_until(lambda: proxy.requests > seen, 5)
    backend.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert time.monotonic() - begun < 4
    assert isinstance(outcome[0], StorageError)
    with pytest.raises(ClosedError, match="closed"):
        backend.get(keys, buffers)
    for buffer in buffers:
        buffer.release()


ENDING = """
import sys, threading, time
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import make_key, take
url, endpoint = sys.argv[1:]
backend = build_backend({"type": "remote", "url": url, "endpoint": endpoint, "allow_http": True, "retries": 0,
    "access_key": "x", "secret_key": "x", "region": "x", "timeout_s": 0.5}, "test")
pool = PinnedPool(1 << 20)
buffers = [take(pool, 4096) for _ in range(4)]
threading.Thread(target=backend.get, args=([make_key(n) for n in range(4)], buffers), daemon=True).start()
while not backend._transfers._queue.running: time.sleep(0.001)
print("ends")
"""


def test_a_process_that_ends_during_transfers_ends_well() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", ENDING, "s3://bucket/x", endpoint],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.stdout == "ends\n", done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]
