"""Real servers that are frozen while they are written to."""

from __future__ import annotations

import pytest

pytest.importorskip("obstore", reason="obstore is not installed")

from frozen import FORGET, check_a_removal_holds
from object_places import prefix_of, seaweed
from redis_places import needs_valkey, valkey

from lmcache.storage.flow import owed
from lmcache.testing.objects import SeaweedFS
from lmcache.testing.redis import RedisServer

__all__ = ["seaweed", "valkey"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owed, "PAUSE_S", 0.05)


@needs_valkey
@pytest.mark.parametrize("how", FORGET)
def test_a_removal_holds_over_a_frozen_redis(valkey: RedisServer, how: str, request: pytest.FixtureRequest) -> None:
    options = {"type": "remote", "url": f"redis://127.0.0.1:{valkey.port}", "prefix": f"{prefix_of(request)}:"}
    limits = {"timeout_s": 0.5, "connect_timeout_s": 0.5}
    assert valkey._process is not None
    check_a_removal_holds(valkey._process, {**options, **limits}, FORGET[how], sends="_write")


@pytest.mark.parametrize("how", FORGET)
def test_a_removal_holds_over_a_frozen_object_store(
    seaweed: SeaweedFS, how: str, request: pytest.FixtureRequest
) -> None:
    limits = {"connect_timeout_s": 0.5, "timeout_s": 0.7, "retries": 0, "index_ttl_s": 0}
    assert seaweed._process is not None
    check_a_removal_holds(seaweed._process, seaweed.options(prefix_of(request), **limits), FORGET[how])
