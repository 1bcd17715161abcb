"""A removal holds: also when the tier cannot be reached, and when a write that was given up lands late."""

from __future__ import annotations

import pytest
from frozen import FORGET
from managers import Open, in_memory, keys, open_manager, plant, read, settle, store
from scripted import WAIT_S, Gate, ScriptedBackend, raising

from lmcache.errors import StorageError
from lmcache.storage.flow import owed
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import make_key

__all__ = ["open_manager"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owed, "PAUSE_S", 0.05)


def owes(manager: StorageManager) -> int:
    return manager.health().tiers[0].owed_removals


def test_a_removal_that_fails_is_tried_again_and_a_miss_meanwhile(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=100)
    plant(tier, 1, 2)
    tier.before["remove"] = raising(StorageError("refused"))
    assert manager.remove(keys(1)) == 0
    assert owes(manager) == 1
    assert read(manager, 1) == 0
    assert manager.contains(keys(1)) == 0
    assert manager.sizes(keys(1)) == []
    assert manager.copy(keys(1), "scripted", "memory") == 0
    assert read(manager, 2, 1) == 1, "the others are served"
    store(manager, 1)
    assert manager.flush(WAIT_S)
    assert make_key(1) in tier.chunks, "the new one is not taken: it could be the old one"
    assert in_memory(manager, 1) == [1]
    manager.remove(keys(1), tier="memory")
    del tier.before["remove"]
    settle(lambda: not owes(manager), "never tried again")
    assert tier.holds() == set(keys(2))
    store(manager, 1)
    assert manager.flush(WAIT_S)
    assert make_key(1) in tier.chunks


def test_an_undo_that_fails_is_tried_again(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=100, read_timeout_s=0.4)
    gate = tier.before["put"] = Gate()
    tier.before["remove"] = raising(StorageError("refused"))
    store(manager, 1)
    tier.await_call("put")
    manager.remove(keys(1))
    gate.open()
    assert manager.flush(WAIT_S)
    assert make_key(1) in tier.chunks
    assert read(manager, 1) == 0
    del tier.before["remove"]
    settle(lambda: not owes(manager), "never tried again")
    assert not tier.chunks


@pytest.mark.parametrize("how", FORGET)
def test_a_write_that_lands_after_it_failed_does_not_outlive_the_removal(open_manager: Open, how: str) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=100, read_timeout_s=0.5, retry__attempts=1)
    tier.before["put"] = raising(StorageError("no answer"))
    store(manager, 1)
    assert manager.flush(WAIT_S)
    FORGET[how](manager)
    assert tier.calls.count(how) == 1
    plant(tier, 1)  # what was on its way
    assert read(manager, 1) == 0
    settle(lambda: not owes(manager), "never removed again")
    assert tier.calls.count(how) == 2
    assert not tier.chunks


@pytest.mark.parametrize("how", FORGET)
def test_what_is_being_written_when_it_is_removed_is_a_miss_until_it_is_undone(open_manager: Open, how: str) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=100, read_timeout_s=0.3)
    gate = tier.before["put"] = Gate()
    store(manager, 1)
    tier.await_call("put")
    FORGET[how](manager)
    plant(tier, 1)  # visible, while its writer has not returned
    assert read(manager, 1) == 0
    gate.open()
    settle(lambda: not owes(manager), "never settled")
    assert not tier.chunks


def test_the_memory_for_what_is_owed_is_bounded(open_manager: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owed, "MOST_KEYS", 10)
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=1000)
    plant(tier, *range(40))
    tier.before["remove"] = tier.before["clear"] = raising(StorageError("refused"))
    for number in range(20):
        manager.remove(keys(number))
    assert owes(manager) <= 10
    assert read(manager, 3) == 0
    assert read(manager, 30) == 0, "more than was asked, which is a miss"
    tier.before.clear()
    settle(lambda: not owes(manager), "never tried again")
    assert not tier.holds() & set(keys(*range(20)))


def test_what_is_owed_is_tried_once_more_at_the_end(open_manager: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owed, "PAUSE_S", 60.0)
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=100)
    plant(tier, 1)
    tier.before["remove"] = raising(StorageError("refused"))
    manager.remove(keys(1))
    tier.before.clear()
    manager.close()
    assert not tier.chunks
