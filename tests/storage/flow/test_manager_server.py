"""What the server asks of the manager: sizes, counted removal that reaches queued writes, acknowledged writes."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest

from lmcache.config import Config, LMCacheConfig
from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import make_key

SIZE = 8192
WAIT_S = 20.0


class Gated(StorageBackend):
    """A dict whose puts wait until they are let through."""

    name: ClassVar[str] = "gated"
    Config = Config

    def __init__(self, config: Any = None) -> None:
        self.data: dict[ChunkKey, bytes] = {}
        self.gate, self.reached = threading.Event(), threading.Event()
        self.capacity, self.fails = 100, False

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        return [len(self.data[key]) for key in itertools.takewhile(self.data.__contains__, keys)]

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        return 0

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        self.reached.set()
        assert self.gate.wait(WAIT_S)
        if self.fails:
            raise StorageError("broken")
        for key, buffer in zip(keys, buffers, strict=True):
            if len(self.data) < self.capacity:
                self.data[key] = bytes(buffer.view)
        return sum(key in self.data for key in keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return sum(self.data.pop(key, None) is not None for key in keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self.remove(list(self.data))

    def close(self) -> None:
        self.gate.set()


@pytest.fixture
def tier() -> Gated:
    return Gated()


@pytest.fixture
def manager(tier: Gated) -> Iterator[StorageManager]:
    config = LMCacheConfig(memory={"capacity": 64 * SIZE}, close_timeout_s=1)  # type: ignore[arg-type]
    manager = StorageManager(config, tiers=[tier])
    yield manager
    tier.gate.set()
    manager.close()
    # A write that was under way when the manager was closed lets go of its chunk on its own thread.
    for thread in threading.enumerate():
        if "gated" in thread.name:
            thread.join(WAIT_S)
    assert manager.pool.used_bytes == 0


def put(manager: StorageManager, n: int, written: queue.Queue[tuple[int, bool]] | None = None) -> None:
    buffer = manager.allocate(SIZE)
    assert buffer is not None
    manager.put(make_key(n), buffer, on_written=None if written is None else lambda held: written.put((n, held)))


def keys(*numbers: int) -> list[ChunkKey]:
    return [make_key(n) for n in numbers]


def test_sizes_go_over_the_tiers(manager: StorageManager, tier: Gated) -> None:
    tier.data = {make_key(0): bytes(7), make_key(2): bytes(9)}
    put(manager, 1)
    assert manager.sizes(keys(0, 1, 2, 3, 0)) == [7, SIZE, 9]
    assert manager.sizes([]) == []


def test_removal_counts_and_reaches_what_is_queued_and_what_is_being_written(
    manager: StorageManager, tier: Gated
) -> None:
    put(manager, 0)
    assert tier.reached.wait(WAIT_S)
    put(manager, 1)
    put(manager, 2)
    assert manager.remove(keys(0, 1, 9)) == 2
    tier.gate.set()
    assert manager.flush(WAIT_S)
    assert set(tier.data) == {make_key(2)}
    assert manager.remove(keys(0, 1)) == 0
    put(manager, 0)
    assert manager.flush(WAIT_S)
    assert set(tier.data) == {make_key(0), make_key(2)}, "what is put again stays"


def test_a_write_is_reported_once_when_the_tier_has_it(manager: StorageManager, tier: Gated) -> None:
    written: queue.Queue[tuple[int, bool]] = queue.Queue()
    put(manager, 0, written)
    assert tier.reached.wait(WAIT_S)
    assert written.empty()
    tier.gate.set()
    assert written.get(timeout=WAIT_S) == (0, True)
    put(manager, 0, written)
    assert written.get(timeout=WAIT_S) == (0, True), "what is held already counts"
    assert manager.flush(WAIT_S)
    assert written.empty()


def test_writes_of_a_batch_are_reported_one_by_one(manager: StorageManager, tier: Gated) -> None:
    written: queue.Queue[tuple[int, bool]] = queue.Queue()
    tier.capacity = 2
    put(manager, 0, written)
    assert tier.reached.wait(WAIT_S)
    for n in (1, 2, 3):
        put(manager, n, written)
    tier.gate.set()
    assert {written.get(timeout=WAIT_S) for _ in range(4)} == {(0, True), (1, False), (2, False), (3, False)}, (
        "a batch that was held in part counts as not held"
    )


@pytest.mark.parametrize("how", ["fails", "cleared", "removed", "closed"])
def test_a_write_that_will_not_be_is_reported_too(manager: StorageManager, tier: Gated, how: str) -> None:
    written: queue.Queue[tuple[int, bool]] = queue.Queue()
    put(manager, 0)
    assert tier.reached.wait(WAIT_S)
    put(manager, 1, written)
    tier.fails = how == "fails"
    if how == "removed":
        manager.remove(keys(1))
    elif how == "cleared":
        threading.Timer(0.05, tier.gate.set).start()
        manager.clear()
    elif how == "closed":
        manager.close()
    tier.gate.set()
    assert written.get(timeout=WAIT_S) == (1, False)


def test_without_a_lower_tier_nothing_is_written() -> None:
    written: queue.Queue[tuple[int, bool]] = queue.Queue()
    manager = StorageManager(LMCacheConfig(memory={"capacity": 64 * SIZE}))  # type: ignore[arg-type]
    put(manager, 0, written)
    assert written.get(timeout=WAIT_S) == (0, False)
    assert manager.contains(keys(0)) == 1
    manager.close()
