"""The replay of traces: a small one from the command to the figure; mistakes are noticed before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.cases.replay import experiment as replay
from experiments.framework.report import Results
from experiments.run import run
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


def test_a_small_trace_is_replayed_tabled_judged_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    asked = [[0, 1, 2], [3, 4], [0, 1, 2], [3, 4], [0, 1, 5]]
    trace.write_text("".join(json.dumps({"hash_ids": blocks}) + "\n" for blocks in asked))
    options = [f"trace={trace}", "sizes=[2,5]", "policies=[lru,reuse]", "judge.known={lru: {5: 0.538}}"]
    assert run("replay", [*options, f"results={tmp_path / 'results'}", "judge.margin=-1"]) == 0
    (folder,) = (tmp_path / "results").iterdir()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {(row["policy"], row["blocks"]) for row in rows} == {
        (policy, blocks) for policy in ("lru", "reuse", "belady") for blocks in (2, 5)
    }
    # Room for all but the last block: 3 of the third request, 2 of the fourth, 2 of the last, of 13 blocks.
    assert {row["hit_ratio"] for row in rows if row["blocks"] == 5} == {7 / 13}
    assert json.loads((folder / "summary.json").read_text())["infinite"] == 7 / 13
    assert (folder / "eviction.png").read_bytes().startswith(b"\x89PNG")
    assert "| 5 | 0.5385 | 0.5385 | 0.5385 |" in capsys.readouterr().out
