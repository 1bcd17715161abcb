"""What vLLM's configuration says about loading, storing and who else runs: obeyed under every name of the connector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from test_scheduler import request, step
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lmcache.connector.scheduler.half import SchedulerHalf
from lmcache.connector.vllm import LMCacheConnector
from lmcache.errors import ConfigError
from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl

Start = Callable[..., SchedulerHalf]


@pytest.fixture(params=["LMCacheConnector", "LMCacheConnectorV1"])
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """The scheduler half that vLLM gets; nobody answers its lookups."""
    monkeypatch.setattr("lmcache.connector.identity.format.check_supported", lambda config: None)
    monkeypatch.setattr("lmcache.connector.identity.format.block_unit", lambda config: 16)
    monkeypatch.setattr("lmcache.connector.identity.format.block_tokens", lambda config: [16])
    monkeypatch.setattr("lmcache.connector.vllm.why_inert", lambda *configs: None)
    monkeypatch.setattr("lmcache.connector.vllm.why_no_multimodal", lambda config: None)
    cache = SimpleNamespace(kv_cache_groups=[None])
    started: list[SchedulerHalf] = []

    def do(role: str, backend: str = "mp", **extra: Any) -> SchedulerHalf:
        workers = 2 if backend == "external_launcher" else 1
        config: Any = SimpleNamespace(
            kv_transfer_config=KVTransferConfig(
                kv_connector=request.param, kv_role=role, kv_connector_extra_config=extra
            ),
            parallel_config=SimpleNamespace(
                tensor_parallel_size=workers, pipeline_parallel_size=1, distributed_executor_backend=backend
            ),
            lora_config=None,
            instance_id="roles",
        )
        if request.param == "LMCacheConnector":
            scheduler = LMCacheConnector(config, KVConnectorRole.SCHEDULER, cache)._scheduler  # type: ignore[arg-type]
            assert scheduler is not None
        else:
            parent: Any = SimpleNamespace(_kv_cache_config=cache)
            scheduler = LMCacheConnectorV1Impl(config, KVConnectorRole.SCHEDULER, parent)._scheduler
        started.append(scheduler)
        return scheduler

    yield do
    for scheduler in started:
        scheduler.shutdown()


@pytest.mark.parametrize(
    ("role", "asks", "stores"), [("kv_producer", False, True), ("kv_consumer", True, False), ("kv_both", True, True)]
)
def test_a_producer_promises_nothing_and_a_consumer_stores_nothing(
    start: Start, role: str, asks: bool, stores: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        scheduler = start(role)
    live = request()
    assert scheduler.get_num_new_matched_tokens(live, 0) == ((None if asks else 0), False)
    meta = scheduler.build_connector_meta(step({"r": 100}, new={"r": 0}))
    assert bool(meta.stores) is stores
    assert (f"kv_role is {role}, so nothing is" in caplog.text) is not (asks and stores)


def test_options_of_vllm_that_change_nothing_here_are_said(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    start("kv_both", use_layerwise=False)
    assert "changes nothing" not in caplog.text
    start("kv_both", use_layerwise=True, **{"memory.capacity": "1GiB"})
    assert "use_layerwise in kv_connector_extra_config changes nothing here" in caplog.text


def test_ranks_that_schedule_for_themselves_are_refused(start: Start) -> None:
    with pytest.raises(ConfigError, match="external_launcher"):
        start("kv_both", backend="external_launcher")
