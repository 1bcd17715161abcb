"""A clear that nobody waits for: nothing old is read any more, nothing new is lost, also after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from managers import NBYTES, WAIT_S, Open, in_memory, keys, open_manager, plant, settle, store
from scripted import Gate, ScriptedBackend, raising

from lmcache.config import load_config
from lmcache.errors import StorageError
from lmcache.storage import manager as manager_module
from lmcache.storage.flow.owed_files import FOLDER, OwedFiles
from lmcache.storage.manager import StorageManager
from lmcache.storage.registry import place_of
from lmcache.storage.selection import Selection
from lmcache.storage.testing import make_key

__all__ = ["open_manager"]

FORMAT = make_key(0).fingerprint
OTHER = make_key(0, format=1).fingerprint


def read(manager: StorageManager, *numbers: int, **where: int) -> int:
    wanted = keys(*numbers, **where)
    with manager.acquire(wanted, [NBYTES] * len(wanted)) as lease:
        assert lease.wait(WAIT_S)
        return lease.ready


def test_a_clear_returns_at_once_while_the_tier_hangs_and_nothing_old_is_read(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    store(manager, 0, 1)
    store(manager, 0, format=1)
    assert manager.flush(WAIT_S)
    gate = tier.before["clear"] = Gate()
    assert manager.clear(FORMAT, wait=False) == 2
    tier.await_call("clear")
    assert manager.health().tiers[0].owes_clear
    assert read(manager, 0, 1) == 0, "it is still in the tier, and counts as gone"
    assert manager.contains(keys(0)) == 0
    assert manager.sizes(keys(0)) == []
    assert manager.copy(keys(0), "scripted", "memory", 0.1) == 0
    manager.clear(OTHER, tier="memory")
    assert read(manager, 0, format=1) == 1, "what was not cleared is read meanwhile"
    gate.open()
    settle(lambda: not manager.health().tiers[0].owes_clear, "never finished")
    assert tier.holds() == {make_key(0, format=1)}


def test_what_is_put_after_a_clear_is_written_behind_it(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    store(manager, 0, 1)
    assert manager.flush(WAIT_S)
    gate = tier.before["clear"] = Gate()
    manager.clear(FORMAT, wait=False)
    tier.await_call("clear")
    store(manager, 1, 2)
    assert tier.calls.count("put") <= 2
    assert in_memory(manager, 0, 1, 2) == [1, 2]
    gate.open()
    assert manager.flush(WAIT_S)
    assert tier.holds() == set(keys(1, 2))
    manager.clear(tier="memory")
    assert read(manager, 1, 2) == 2


def test_a_second_clear_before_the_first_has_ended_takes_what_was_put_between_them(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    gate = tier.before["clear"] = Gate()
    manager.clear(FORMAT, wait=False)
    tier.await_call("clear")
    store(manager, 0)
    manager.clear(FORMAT, wait=False)
    store(manager, 1)
    gate.open()
    assert manager.flush(WAIT_S)
    assert tier.holds() == set(keys(1))
    assert tier.calls.count("clear") == 1


def test_a_write_under_way_is_undone_by_a_clear_in_the_background(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    gate = tier.before["put"] = Gate()
    store(manager, 0)
    tier.await_call("put")
    manager.clear(FORMAT, wait=False)
    gate.open()
    settle(lambda: not manager.health().tiers[0].owes_clear, "never finished")
    assert not tier.chunks


def test_a_clear_that_fails_is_tried_again_and_sheds_what_it_would_delete(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__cooldown_s=0.01)
    store(manager, 0)
    assert manager.flush(WAIT_S)
    failing = [True]
    tier.before["clear"] = lambda: raising(StorageError("refused"))() if failing[0] else None
    manager.clear(FORMAT, wait=False)
    settle(lambda: manager.stats()["pending_write_bytes"] == 0 and "clear" in tier.calls, "never tried")
    settle(lambda: manager._tiers[0].writes._holds == 0, "writes are held back for ever")
    store(manager, 1)
    assert manager.flush(WAIT_S)
    assert read(manager, 0) == 0
    failing[0] = False
    settle(lambda: not manager.health().tiers[0].owes_clear, "never tried again")
    assert not tier.chunks
    store(manager, 2)
    assert manager.flush(WAIT_S)
    assert tier.holds() == set(keys(2))


Restart = Any


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Restart]:
    """Opens managers whose one tier, known by its options, is a given backend; nobody closes the earlier ones well."""
    opened: list[tuple[StorageManager, ScriptedBackend]] = []

    def start(tier: ScriptedBackend, **place: Any) -> StorageManager:
        monkeypatch.setattr(manager_module, "build_tiers", lambda tiers: [tier])
        values: dict[str, Any] = {
            "memory.capacity": 32 * NBYTES,
            "memory.huge_pages": False,
            "close_timeout_s": 1,
            "read_timeout_s": 2,
            "state": str(tmp_path / "state"),
            "tiers": [{"type": "scripted", **(place or {"url": "redis://u:secret@here:1/0"})}],
        }
        opened.append((StorageManager(load_config(overrides=values)), tier))
        return opened[-1][0]

    yield start
    for manager, tier in opened:
        for fault in tier.before.values():
            if isinstance(fault, Gate):
                fault.open()
        tier.before.clear()
        manager.close()


def kept(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("where", ["remote", "local"])
def test_an_owed_clear_survives_a_restart(restart: Restart, tmp_path: Path, where: str) -> None:
    place = {"path": str(tmp_path / "chunks")} if where == "local" else {}
    dead, tier = ScriptedBackend(), ScriptedBackend()
    manager = restart(dead, **place)
    for number in range(2):
        plant(dead, number)
        plant(tier, number)
    plant(tier, 0, format=1)
    dead.before["clear"] = Gate()
    manager.clear(FORMAT, wait=False)
    dead.await_call("clear")
    (name,) = kept(tmp_path)
    assert "secret" not in name
    assert (tmp_path / "chunks" / FOLDER).is_dir() == (where == "local")
    refused = [True]
    tier.before["clear"] = lambda: raising(StorageError("not yet"))() if refused[0] else None
    again = restart(tier, **place)
    assert again.health().tiers[0].owes_clear
    assert read(again, 0, 1) == 0, "what should be gone is not read after a restart"
    assert read(again, 0, format=1) == 1
    refused[0] = False
    settle(lambda: not again.health().tiers[0].owes_clear, "never done")
    assert tier.holds() == {make_key(0, format=1)}
    settle(lambda: name not in kept(tmp_path), "its file stays")
    third = ScriptedBackend()
    plant(third, 0)
    assert read(restart(third, **place), 0) == 1, "what was done is owed no more"


def test_a_clear_that_ended_leaves_no_file(restart: Restart, tmp_path: Path) -> None:
    manager = restart(ScriptedBackend())
    manager.clear(FORMAT)
    manager.clear(FORMAT, tenant="t", wait=False)
    settle(lambda: not manager.health().tiers[0].owes_clear, "never finished")
    assert kept(tmp_path) == []


def test_another_place_does_not_owe_it(restart: Restart) -> None:
    first, second = ScriptedBackend(), ScriptedBackend()
    plant(second, 0)
    manager = restart(first, url="redis://here:1")
    first.before["clear"] = Gate()
    manager.clear(FORMAT, wait=False)
    first.await_call("clear")
    assert read(restart(second, url="redis://there:1"), 0) == 1


def test_a_name_that_cannot_be_read_stands_for_everything(tmp_path: Path) -> None:
    files = OwedFiles([tmp_path], "a place")
    files.add(Selection(FORMAT, b"t" * 16))
    (path,) = tmp_path.iterdir()
    assert OwedFiles([tmp_path], "a place").load() == [Selection(FORMAT, b"t" * 16)]
    assert OwedFiles([tmp_path], "another").load() == []
    path.rename(path.with_name(path.name.split(".")[0] + ".damaged"))
    assert OwedFiles([tmp_path], "a place").load() == [Selection()]


def test_a_folder_that_cannot_be_written_is_said_once_and_the_next_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    OwedFiles([tmp_path / "file" / "x", tmp_path / "good"], "p").add(Selection())
    assert len(list((tmp_path / "good").iterdir())) == 1
    files = OwedFiles([tmp_path / "file" / "x"], "p")
    files.add(Selection())
    files.add(Selection(FORMAT))
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "an owed clear cannot be kept, and ends with this process"
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"type": "remote", "url": "redis://a:b@h:1/0"}, {"type": "remote", "url": "redis://c:d@h:1/0"}, True),
        ({"type": "remote", "url": "redis://h:1/0"}, {"type": "remote", "url": "redis://h:1/1"}, False),
        ({"type": "disk", "path": "/x", "capacity": "1GiB"}, {"type": "disk", "path": "/x", "capacity": 5}, True),
        ({"type": "disk", "path": "/x"}, {"type": "disk", "path": "/y"}, False),
        ({"type": "zstd", "inner": {"type": "disk", "path": "/x"}}, {"type": "disk", "path": "/x"}, True),
        ({"type": "ours", "rack": 1}, {"type": "ours", "rack": 2}, False),
    ],
)
def test_a_place_is_known_by_where_it_is(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert (place_of(one)[0] == place_of(other)[0]) == same
