"""What the manager and its tiers make of a key that stands in a batch twice, and of calls after close()."""

from __future__ import annotations

from pathlib import Path

import pytest
from managers import NBYTES, Open, contents, keys, open_manager, settle, store
from scripted import ScriptedBackend

from lmcache.errors import ClosedError
from lmcache.storage.backends.blackhole import BlackholeBackend, BlackholeConfig
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.testing import make_key

__all__ = ["open_manager"]


def test_a_key_may_stand_twice_in_what_the_manager_is_asked_for(tmp_path: Path, open_manager: Open) -> None:
    manager = open_manager(DiskBackend(DiskConfig(path=tmp_path)))
    store(manager, 1, 2, 1)
    assert manager.flush(10)
    twice = keys(1, 2, 1)
    for _ in ("from memory", "from disk"):
        assert manager.contains(twice) == 3
        assert manager.sizes(twice) == [NBYTES] * 3
        with manager.acquire(twice, [NBYTES] * 3) as lease:
            assert lease.wait(10)
            held = lease.share()
            assert [bytes(buffer.view) for buffer in held] == [contents(1), contents(2), contents(1)]
            manager.pool.release_all(held)
        assert manager.remove(twice, tier="memory") == 2
    assert manager.copy(twice, "disk", "memory") == 3
    assert manager.move(twice, "memory", "disk") == 3
    assert manager.remove(twice) == 2
    assert manager.contains(twice) == 0


def test_a_closed_manager_finds_and_keeps_nothing_and_removes_nothing_silently(
    tmp_path: Path, open_manager: Open
) -> None:
    manager = open_manager(DiskBackend(DiskConfig(path=tmp_path)))
    store(manager, 1)
    assert manager.flush(10)
    buffer = manager.allocate(NBYTES)
    assert buffer is not None
    manager.close()
    told: list[bool] = []
    manager.put(make_key(2), buffer, on_written=told.append)
    assert (told, manager.allocate(NBYTES)) == ([False], None)
    assert (manager.contains(keys(1)), manager.sizes(keys(1)), manager.flush(0)) == (0, [], True)
    for call in (
        lambda: manager.acquire(keys(1), [NBYTES]),
        lambda: manager.prefetch(keys(1), [NBYTES]),
        lambda: manager.remove(keys(1)),
        lambda: manager.clear(),
        lambda: manager.copy(keys(1), "disk", "memory"),
        lambda: manager.move(keys(1), "disk", "memory"),
    ):
        with pytest.raises(ClosedError, match="the storage manager is closed"):
            call()
    manager.thaw()
    assert manager.allocate(NBYTES) is None
    assert manager.stats()["chunks"] == 0
    assert manager.health().frozen
    manager.close()
    assert DiskBackend(DiskConfig(path=tmp_path)).contains(keys(1)) == 1, "what the disk had is there still"


def test_a_closed_tier_finds_and_takes_nothing(open_manager: Open) -> None:
    manager = open_manager(ScriptedBackend())
    store(manager, 1)
    assert manager.flush(10)
    (tier,) = manager._tiers
    buffer = manager.allocate(NBYTES)
    assert buffer is not None
    manager.close()
    assert tier.ask(lambda: 1, 0, 1.0) == 0
    assert tier.transfer(lambda: 1, 0, 1.0, lambda _: None) == 0
    assert tier.read(lambda: None, 1.0) is None
    assert tier.remove(keys(1), 1.0) == 0
    assert not tier.writes.put(make_key(2), buffer)
    settle(lambda: manager.pool.used_bytes == 0, "a buffer leaked")


def test_a_closed_blackhole_says_so() -> None:
    hole = BlackholeBackend(BlackholeConfig())
    assert (hole.contains(keys(1)), hole.put([], []), hole.keys()) == (0, 0, [])
    hole.close()
    hole.close()
    for call in (
        lambda: hole.contains(keys(1)),
        lambda: hole.get(keys(1), []),
        lambda: hole.put(keys(1), []),
        lambda: hole.remove(keys(1)),
        lambda: hole.clear(),
        lambda: hole.keys(),
    ):
        with pytest.raises(ClosedError):
            call()
