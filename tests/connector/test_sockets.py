"""Where scheduler and workers meet: the same place for both, nobody else's, and never too long for a socket."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from lmcache.connector.lookup import sockets
from lmcache.connector.lookup.sockets import bind, meeting_name, socket_path
from lmcache.errors import ConfigError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What TMPDIR names."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def listener() -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    yield socket
    context.destroy(linger=0)


def engine(engine_id: str = "e", instance_id: str = "1") -> Any:
    return SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id=engine_id), instance_id=instance_id)


def file_of(address: str) -> Path:
    return Path(address.removeprefix("ipc://"))


def test_the_halves_of_a_connector_meet_and_two_connectors_of_one_engine_do_not() -> None:
    config = engine("children")
    workers = [meeting_name(config, "WORKER") for _ in range(3)]
    schedulers = [meeting_name(config, "SCHEDULER") for _ in range(3)]
    assert workers == schedulers
    assert len(set(workers)) == 3


@pytest.mark.parametrize("other", [engine("a", "2"), engine("b", "1")])
def test_engines_of_one_id_or_one_start_do_not_meet(other: Any) -> None:
    assert meeting_name(engine("a", "1"), "WORKER") != meeting_name(other, "WORKER")


@pytest.mark.parametrize("name", ["e", "x" * 500, "a/../../b", "\N{SNOWMAN}" * 60])
def test_any_name_makes_a_short_file(temporary: Path, name: str) -> None:
    file = file_of(socket_path(name, 3))
    assert file.parent == temporary / f"lmcache-{os.getuid()}"
    assert len(file.name) < 20
    assert file != file_of(socket_path(name, 2))
    assert file != file_of(socket_path(name + "'", 3))


def folder_of(nbytes: int, below: Path) -> Path:
    folder = below / ("t" * (nbytes - len(str(below)) - 1))
    folder.mkdir()
    assert len(str(folder)) == nbytes
    return folder


def test_a_temporary_folder_of_60_characters_will_do(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, listener: zmq.Socket[bytes]
) -> None:
    folder = folder_of(60, Path("/tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    try:
        address = socket_path("0d8e1b6e-29f3-4a39-9d0e-0d86b7a4c5ff_dp0", 0)
        assert file_of(address).parent.parent == folder
        bind(listener, address)
        assert stat.S_ISSOCK(file_of(address).stat().st_mode)
        file_of(address).unlink()
    finally:
        (folder / f"lmcache-{os.getuid()}").rmdir()
        folder.rmdir()


def test_a_longer_folder_is_passed_over_and_the_next_one_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, absent, last = "/" + "x" * 90, tmp_path / "absent", tmp_path / "last"
    last.mkdir()
    monkeypatch.setattr(sockets, "socket_folders", lambda: [long, str(absent), str(last)])
    assert file_of(socket_path("e", 0)).parent.parent == last


def test_no_folder_at_all_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "socket_folders", lambda: ["/" + "x" * 90, str(tmp_path / "absent")])
    with pytest.raises(ConfigError, match=r"longer than \d+ bytes; .*absent: No such file.*: set TMPDIR to a folder"):
        socket_path("e", 0)


def test_the_folders_are_the_users_own_settings_then_the_systems(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert sockets.socket_folders() == [str(temporary), "/run/user/7", "/tmp"]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert sockets.socket_folders() == [str(temporary), "/tmp"]


def test_the_folder_must_be_private(temporary: Path) -> None:
    folder = file_of(socket_path("e", 0)).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="mode 0700"):
        socket_path("e", 0)


def test_a_link_in_its_place_is_refused(temporary: Path) -> None:
    # In /tmp another user can put one there that leads to a private folder of this user's.
    folder, elsewhere = temporary / f"lmcache-{os.getuid()}", temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match=str(folder)):
        socket_path("e", 0)


def test_an_address_is_not_taken_away_from_whoever_listens(tmp_path: Path, listener: zmq.Socket[bytes]) -> None:
    address = f"ipc://{tmp_path}/s"
    bind(listener, address)
    second = listener.context.socket(zmq.ROUTER)
    with pytest.raises(ConfigError, match=r"another worker listens .* own engine_id"):
        bind(second, address)
    second.close()
    with listener.context.socket(zmq.DEALER) as client:
        client.connect(address)
        client.send(b"still here")
        assert listener.poll(10_000)
        assert listener.recv_multipart()[1] == b"still here"


def test_what_a_killed_worker_left_is_taken_over_and_removed(tmp_path: Path, listener: zmq.Socket[bytes]) -> None:
    def leave(name: str, age_s: float) -> Path:
        path = tmp_path / name
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
        return path

    same, old, young = leave("s", 0), leave("old", 3600), leave("young", 0)
    live = tmp_path / "live"
    file = tmp_path / "file"
    file.touch()
    os.utime(file, (0, 0))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(live))
        server.listen()
        os.utime(live, (0, 0))
        bind(listener, f"ipc://{same}")
        assert not old.exists()
        assert young.exists(), "its owner may be about to listen"
        assert live.exists()
        assert file.exists(), "not a socket"
        assert sockets._is_served(same)


def test_an_address_that_cannot_be_is_an_error_that_says_what_to_do(listener: zmq.Socket[bytes]) -> None:
    with pytest.raises(ConfigError, match=r"no socket can be opened at /proc/self/s .*set TMPDIR"):
        bind(listener, "ipc:///proc/self/s")
