"""Entry points of third parties: a broken one is named, and none takes the name of a built-in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.registry import Registry

GROUP = "lmcache.test_things"


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    info = tmp_path / "lmcache_things-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lmcache-things\nVersion: 1.0\n")
    entries = "good = things_of_theirs:Good\nodd = things_of_theirs:Odd\nlone = things_alone:Lone\njson = json:loads\n"
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}")
    (tmp_path / "things_of_theirs.py").write_text("class Good: ...\n")
    (tmp_path / "things_alone.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("things_of_theirs", "things_alone"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return Registry("thing", {"json": "json:dumps"}, GROUP)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd", r"thing 'odd': the package lmcache-things names 'things_of_theirs:Odd', .*AttributeError: .*Odd"),
        ("lone", r"thing 'lone': the package lmcache-things names 'things_alone:Lone', .*not_installed_anywhere"),
        ("none", "unknown thing 'none'; known: good, json, lone, odd"),
    ],
)
def test_an_entry_that_cannot_be_loaded_names_its_package(things: Registry[object], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        things.get(name)


def test_a_builtin_keeps_its_name_which_is_said_once(
    things: Registry[object], caplog: pytest.LogCaptureFixture
) -> None:
    import json

    assert things.get("json") is things.get("json") is json.dumps
    assert [record.getMessage() for record in caplog.records] == [
        "thing 'json' of the package lmcache-things is not used: a built-in has that name"
    ]
