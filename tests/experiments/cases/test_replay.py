"""The replay of traces: mistakes are noticed before anything is replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.cases.replay import experiment as replay
from experiments.framework.report import Results
from lmcache.config import build
from lmcache.errors import ConfigError


def config(tmp_path: Path, **options: Any) -> replay.Config:
    base = {"experiment": "replay", "name": "test", "results": tmp_path, "policies": ["lru"], "trace": "chat"}
    return build(replay.Config, {**base, **options}, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": "agent"}, "trace: 'agent' is neither a file nor one of mooncake, chat, agents"),
        ({"policies": ["lru", "lur"]}, "unknown eviction policy 'lur'; known: "),
    ],
)
def test_a_mistake_is_noticed_before_the_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(replay, "replay", lambda *_: pytest.fail("it has begun"))
    wrong = config(tmp_path, **options)
    with pytest.raises(ConfigError, match=message):
        replay.run(wrong, Results(wrong))


def test_a_cache_has_a_block_at_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sizes\.1: .*greater than or equal to 1"):
        config(tmp_path, sizes=[4, 0])
