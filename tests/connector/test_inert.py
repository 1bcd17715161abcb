"""Engines with which a promise would be fatal or wrong: real vLLM's pooling models and encoders, and the rule alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import connector
from tiny_models import encoder, prompt, with_tokenizer

from lmcache.connector.inert import Inert, why_inert
from lmcache.connector.metadata import StepMetadata

PROMPT = prompt(1, 700)
TWICE = [{"embed": [PROMPT]}, {"embed": [PROMPT]}]


@pytest.fixture(scope="module")
def engines(
    vllm_many: Callable[..., list[Any]], tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("pooling")
    llama = with_tokenizer(Path(shutil.copytree(tiny_model("llama"), root / "llama")))
    words = [{**each, "task": "token_embed"} for each in TWICE]
    bert = {
        "model": str(encoder(root / "bert")),
        "options": {"max_model_len": 512, "skip_tokenizer_init": False},
        "steps": [{"embed": [PROMPT[:400]]}],
    }
    cases: dict[str, dict[str, Any]] = {
        "MEAN": {"pooler": {"pooling_type": "MEAN"}, "steps": TWICE},
        "CLS": {"pooler": {"pooling_type": "CLS"}, "steps": TWICE},
        "LAST": {"pooler": {"pooling_type": "LAST"}, "steps": [TWICE[0], {"reset": "vllm"}, TWICE[0]]},
        "token_embed": {"pooler": {"task": "token_embed"}, "steps": words},
        "encoder": bert,
        "encoder, vLLM's own name": {**bert, "connector": connector(name="LMCacheConnectorV1")},
    }
    results = vllm_many([{"model": str(llama), "connector": connector(), **case} for case in cases.values()])
    return dict(zip(cases, results, strict=True))


def lived(results: Any) -> Any:
    assert isinstance(results, list), f"the engine died: {results}"
    return results


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_a_pooler_that_needs_every_token_gets_every_token(pooling: str, engines: dict[str, Any]) -> None:
    # A hit kills the engine here: "partial prefill is not supported with MEAN pooling".
    (first,), (second,) = lived(engines[pooling])
    assert first["vector"] == second["vector"]
    assert second["cached"] == 0


def test_a_pooler_that_looks_at_the_last_token_is_served(engines: dict[str, Any]) -> None:
    (first,), _, (second,) = lived(engines["LAST"])
    assert second["cached"] == 640
    assert second["vector"] == pytest.approx(first["vector"], abs=1e-4)


def test_embeddings_of_all_tokens_are_computed(engines: dict[str, Any]) -> None:
    (first,), (second,) = lived(engines["token_embed"])
    assert first == second


def test_an_encoder_without_a_kv_cache_runs_as_without_us(engines: dict[str, Any]) -> None:
    ((out,),) = lived(engines["encoder"])
    assert len(out["vector"]) == 64
    assert "set kv_connector to LMCacheConnector" in engines["encoder, vLLM's own name"]


def config(**changes: Any) -> tuple[Any, Any]:
    """An engine that can be served, but for ``changes``."""
    values = {
        "specs": [SimpleNamespace()],
        "supported": True,
        "runner": "generate",
        "prefix_caching": True,
        "encoder_only": False,
        "bidirectional": False,
        "diffusion": None,
        "rswa": None,
        **changes,
    }
    model = SimpleNamespace(
        is_prefix_caching_supported=values["supported"],
        pooler_config=SimpleNamespace(seq_pooling_type="MEAN", tok_pooling_type=None)
        if values["runner"] == "pooling"
        else None,
        attn_type="decoder",
        runner_type=values["runner"],
        rswa_window=values["rswa"],
    )
    vllm = SimpleNamespace(
        model_config=model,
        is_mm_encoder_only=values["encoder_only"],
        cache_config=SimpleNamespace(enable_prefix_caching=values["prefix_caching"]),
        attention_config=SimpleNamespace(use_non_causal=values["bidirectional"]),
        diffusion_config=values["diffusion"],
    )
    return vllm, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in values["specs"]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"specs": []}, "no KV cache"),
        ({"encoder_only": True}, "encoder only"),
        ({"supported": False, "runner": "pooling"}, r"decoder attention, MEAN pooling"),
        ({"supported": False}, "reuses no prefix"),  # encoder-decoders and models without attention
        ({"runner": "pooling", "prefix_caching": False}, "prefix caching is off"),
        ({"specs": [SimpleNamespace(non_causal=True)]}, "later tokens"),
        ({"specs": [SimpleNamespace(kv_cache_specs={"a": SimpleNamespace(non_causal=True)})]}, "later tokens"),
        ({"bidirectional": True}, "later tokens"),
        ({"diffusion": object()}, "how far the generation is"),
        ({"rswa": 128}, "how far the generation is"),
    ],
)
def test_what_vllm_would_not_reuse_is_not_promised(changes: dict[str, Any], reason: str) -> None:
    import re

    assert re.search(reason, why_inert(*config(**changes)) or "")


def test_prefix_caching_that_a_user_switched_off_does_not_switch_us_off() -> None:
    assert why_inert(*config()) is None
    assert why_inert(*config(prefix_caching=False)) is None


def test_an_inert_scheduler_says_so_once_and_promises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    inert = Inert("no reason")
    request: Any = SimpleNamespace(request_id="r")
    inert.on_new_request(request)
    assert inert.get_num_new_matched_tokens(request, 0) == (0, False)
    inert.update_state_after_alloc(request, ([1],), 0)
    assert inert.build_connector_meta(SimpleNamespace()) == StepMetadata()  # type: ignore[arg-type]
    inert.loads_failed(["r"])
    inert.request_finished(request)
    assert inert.reset_cache() is True
    inert.shutdown()
    assert [record.getMessage() for record in caplog.records] == ["lmcache: nothing is cached: no reason"]
