"""In a child by fork, what the parent opened is a clear error or a miss, at once; the parent goes on undisturbed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from managers import NBYTES, Open, acquire, keys, open_manager, plant, read, store
from object_places import prefix_of, seaweed
from redis_places import needs_valkey, valkey
from scripted import WAIT_S, Gate, ScriptedBackend

from lmcache.errors import ClosedError
from lmcache.storage.backends import fs as shared_folder
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key, take

__all__ = ["open_manager", "seaweed", "valkey"]


def in_a_child(work: Callable[[], object], within_s: float = WAIT_S) -> str:
    """What ``work`` returned or raised in a child by fork, as text; the child ends as Python does, atexit included."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, which is the subject
        pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}" if isinstance(error, ClosedError) else traceback.format_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], within_s)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        assert ready, "the child hangs"
        return os.read(reading, 1 << 16).decode()
    finally:
        os.close(reading)
        os.waitpid(pid, 0)


def refusal(what: str) -> str:
    return f"ClosedError: {what} was opened by process {os.getpid()}, not this one: open one in the child"


def test_what_a_manager_is_asked_in_a_child_is_refused_at_once(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    plant(tier, 1)
    store(manager, 0)
    assert manager.flush(WAIT_S)
    asked: dict[str, Callable[[], object]] = {
        "acquire": lambda: manager.acquire(keys(1), [NBYTES]),
        "prefetch": lambda: manager.prefetch(keys(1), [NBYTES]),
        "contains": lambda: manager.contains(keys(1)),
        "sizes": lambda: manager.sizes(keys(1)),
        "allocate": lambda: manager.allocate(NBYTES),
        "remove": lambda: manager.remove(keys(1)),
        "clear": lambda: manager.clear(),
        "copy": lambda: manager.copy(keys(1), "scripted", "memory"),
        "flush": lambda: manager.flush(1),
    }
    for name, ask in asked.items():
        assert in_a_child(ask) == refusal("this storage"), name
    assert in_a_child(manager.close) == "None"
    assert not tier.closed
    assert read(manager, 1) == 1, "the parent goes on"
    store(manager, 2)
    assert manager.flush(WAIT_S)


def test_locks_that_a_thread_of_the_parent_holds_do_not_hold_up_the_child(open_manager: Open) -> None:
    manager = open_manager(ScriptedBackend())
    store(manager, 0)
    assert manager.flush(WAIT_S)
    lease = acquire(manager, 0)
    locks = [manager._lock, manager._memory._lock, manager.pool._lock, lease._changed, manager._deadlines._changed]
    with contextlib.ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)  # type: ignore[arg-type]
        assert in_a_child(lambda: manager.acquire(keys(0), [NBYTES])) == refusal("this storage")
        assert in_a_child(lambda: (lease.close(), manager.close())) == "(None, None)"
        assert in_a_child(lambda: manager.pool.allocate(NBYTES)) == refusal("this pool")
        assert in_a_child(manager.pool.close) == "None"
    assert bytes(lease.buffers[0].view)
    lease.close()


def test_a_lease_that_is_being_read_is_not_waited_for_in_a_child(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    plant(tier, 0)
    gate = tier.before["get"] = Gate()
    lease = manager.acquire(keys(0), [NBYTES])
    tier.await_call("get")
    assert in_a_child(lease.wait) == refusal("the storage of this lease")
    gate.open()
    assert lease.wait(WAIT_S)
    assert lease.ready == 1
    lease.close()


@pytest.fixture(params=["disk", "fs", pytest.param("redis", marks=needs_valkey), "s3", "nixl", "lm"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        if request.param == "disk":
            yield {"type": "disk", "path": str(tmp_path)}
        elif request.param == "fs":
            yield {"type": "remote", "url": f"fs://{tmp_path}"}
        elif request.param == "redis":
            port = request.getfixturevalue("valkey").port
            yield {"type": "remote", "url": f"redis://127.0.0.1:{port}", "prefix": f"{prefix_of(request)}:"}
        elif request.param == "s3":
            yield request.getfixturevalue("seaweed").options(prefix_of(request), index_ttl_s=0)
        elif request.param == "nixl":
            pytest.importorskip("nixl", reason="nixl is not installed")
            yield {"type": "nixl", "path": str(tmp_path)}
        else:
            from lmcache.config import build
            from lmcache.server.config import ServerConfig
            from lmcache.server.server import Server

            storage = {"memory": {"capacity": "16MiB", "huge_pages": False}}
            server = Server(build(ServerConfig, {"port": 0, "drain_timeout_s": 0.2, "storage": storage}, "test"))
            stack.callback(server.stop)
            server.start()
            yield {"type": "remote", "url": f"lm://127.0.0.1:{server.port}"}


def test_a_backend_is_refused_to_a_child_and_serves_the_parent(options: dict[str, Any]) -> None:
    pool = PinnedPool(4 << 20, huge_pages=False)
    with contextlib.closing(build_backend(options, "test")) as backend:
        data = {n: BackendTests.put(backend, pool, make_key(n), NBYTES, seed=n) for n in range(3)}
        into = [take(pool, NBYTES) for _ in range(3)]

        def use() -> list[str]:
            return [refused(backend, call) for call in calls]

        calls: list[Callable[[StorageBackend], object]] = [
            lambda tier: tier.get(keys(0, 1, 2), into),
            lambda tier: tier.put(keys(7, 8), into[:2]),
            lambda tier: tier.sizes(keys(0, 1)),
            lambda tier: tier.remove(keys(0)),
            lambda tier: tier.clear(),
        ]
        if options.get("url", "").startswith("fs:"):
            assert in_a_child(lambda: backend.get(keys(0, 1, 2), into)) == "3", "it has no threads, and no lock"
        else:
            assert in_a_child(use) == str([""] * len(calls))
        assert in_a_child(backend.close) == "None"
        assert all(BackendTests.get(backend, pool, make_key(n), NBYTES) == data[n] for n in data)
        for buffer in into:
            buffer.release()
        own = in_a_child(lambda: opened_anew(options))
        assert "start it by spawn" in own if options.get("url", "").startswith("s3:") else own == "16384"
    pool.close()


def refused(backend: StorageBackend, call: Callable[[StorageBackend], object]) -> str:
    try:
        return f"not refused: {call(backend)}"
    except ClosedError as error:
        return "" if f"was opened by process {os.getppid()}" in str(error) else str(error)


def opened_anew(options: dict[str, Any]) -> int:
    with contextlib.closing(build_backend(options, "test")) as backend:
        return backend.sizes(keys(1))[0]


def test_busy_connections_are_not_cut_by_a_child(options: dict[str, Any]) -> None:
    """Its close would shut down sockets that are the parent's too."""
    pool = PinnedPool(4 << 20, huge_pages=False)
    stop = threading.Event()
    with contextlib.closing(build_backend(options, "test")) as backend:
        BackendTests.put(backend, pool, make_key(0), NBYTES, seed=0)
        errors: list[BaseException] = []

        def work() -> None:
            buffer = take(pool, NBYTES)
            try:
                while not stop.is_set():
                    assert backend.get(keys(0), [buffer]) == 1
            except BaseException as error:
                errors.append(error)
            finally:
                buffer.release()

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(5):
            assert in_a_child(backend.close) == "None"
        stop.set()
        thread.join(WAIT_S)
        assert errors == []
    pool.close()


def test_temporary_files_of_a_child_have_names_of_their_own() -> None:
    mine = shared_folder._temporary_name()
    its = in_a_child(shared_folder._temporary_name)
    assert its.rpartition("-")[0] != mine.rpartition("-")[0]
