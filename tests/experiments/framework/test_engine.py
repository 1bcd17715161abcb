"""A real vLLM behind the pipe: rows come back as measured, resets reset, nothing is left running."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments.framework.config import EngineConfig
from experiments.framework.engine import Engine, EngineFailed, Job, Step, model_path
from experiments.framework.workloads import Request

TEXT = "The lighthouse keeper writes the weather of every day into a book with a green cover. " * 20


def job(**changes: str) -> Job:
    config = EngineConfig(kv_space_gib=1, max_model_len=1024)
    options = {**config.model_dump(mode="json"), **changes}
    return Job(model_path(config), options, kv_transfer=None, max_tokens=4, seed=0)


@pytest.mark.vllm
def test_steps_come_back_as_rows_and_resets_empty_the_cache(tmp_path: Path) -> None:
    """Slow: real vLLM in a process of its own, which imports it afresh."""
    asked = [Request("lighthouse", 0, TEXT), Request("lighthouse", 0, TEXT)]
    with Engine(job(), tmp_path / "log") as engine:
        first, again = engine.run(Step("kept", asked))
        (reset,) = engine.run(Step("reset", asked[:1], reset="vllm"))
        child = engine._child.pid
    assert first.phase == "kept"
    assert first.cached_tokens == reset.cached_tokens == 0
    assert again.cached_tokens >= 256
    assert first.tokens == again.tokens == reset.tokens
    assert 0 < first.ttft_s < first.total_s
    assert first.prompt_tokens > 300
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.vllm
def test_wrong_engine_options_are_reported_with_vllms_own_words(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="float31"):
        Engine(job(dtype="float31"), tmp_path / "log")


def test_unknown_reset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: none, vllm, all"):
        Step("phase", [], reset="device")
