"""Managers for tests: opened over scripted tiers, closed at the end, after which nothing may be held."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted import WAIT_S, Gate, ScriptedBackend

from lmcache.config import load_config
from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import make_key

NBYTES = 16 << 10
Open = Callable[..., StorageManager]


@pytest.fixture
def open_manager() -> Iterator[Open]:
    opened: list[tuple[StorageManager, tuple[StorageBackend, ...]]] = []

    def do(*tiers: StorageBackend, chunks: int = 32, **options: object) -> StorageManager:
        values: dict[str, object] = {
            "memory.capacity": chunks * NBYTES,
            "memory.huge_pages": False,
            "close_timeout_s": 2,
            **{name.replace("__", "."): value for name, value in options.items()},
        }
        manager = StorageManager(load_config(overrides=values), tiers=tiers)
        opened.append((manager, tiers))
        return manager

    yield do
    for manager, tiers in opened:
        for tier in tiers:
            if isinstance(tier, ScriptedBackend):
                open_gates(tier)
        manager.close()
        settle(lambda m=manager: m.pool.used_bytes == 0, "a buffer leaked")  # type: ignore[misc]


def open_gates(tier: ScriptedBackend) -> None:
    for fault in tier.before.values():
        if isinstance(fault, Gate):
            fault.open()
    tier.before.clear()


def settle(condition: Callable[[], bool], what: str) -> None:
    """Wait for a thread of the manager to get somewhere."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)


def keys(*numbers: int, **where: Any) -> list[ChunkKey]:
    return [make_key(number, **where) for number in numbers]


def contents(number: int) -> bytes:
    return random.Random(number).randbytes(NBYTES)


def store(manager: StorageManager, *numbers: int, **where: Any) -> None:
    for number in numbers:
        buffer = manager.allocate(NBYTES)
        assert buffer is not None
        buffer.view[:] = contents(number)
        manager.put(make_key(number, **where), buffer)


def plant(tier: ScriptedBackend, *numbers: int, **where: Any) -> None:
    for number in numbers:
        tier.plant(make_key(number, **where), contents(number))


def acquire(manager: StorageManager, *numbers: int, tenant: str = "", **options: object) -> Lease:
    """A lease that is done."""
    lease = manager.acquire(keys(*numbers, tenant=tenant), [NBYTES] * len(numbers), **options)  # type: ignore[arg-type]
    assert lease.wait(WAIT_S)
    return lease


def read(manager: StorageManager, *numbers: int, **options: object) -> int:
    """How many come, and that they are right."""
    with acquire(manager, *numbers, **options) as lease:
        for number, buffer in zip(numbers, lease.buffers, strict=False):
            assert bytes(buffer.view) == contents(number), f"chunk {number} is wrong"
        return lease.ready


def in_memory(manager: StorageManager, *numbers: int, **where: Any) -> list[int]:
    return [number for number in numbers if make_key(number, **where) in manager._memory]
