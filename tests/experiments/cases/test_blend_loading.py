"""The experiment on loading with a tiny model; runs that went wrong fail, and say why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.blending.prompts import filled
from experiments.blending.session import BlendSession
from experiments.cases.blend_loading import experiment as blend_loading
from experiments.cases.blend_loading.experiment import Found, JudgeConfig
from experiments.framework import plots
from experiments.framework.config import ROOT
from experiments.run import load
from lmcache.blend.models import adapt
from lmcache.config import load_config
from lmcache.errors import BlendError
from lmcache.storage.manager import StorageManager

CONFIG = str(ROOT / "experiments" / "configs" / "blend_loading.yaml")
TINY = ["passage=48", "question=16", "settle=1", "engine.threads=1"]


@pytest.fixture
def session() -> Iterator[BlendSession]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=4,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config).eval()
    manager = StorageManager(load_config(overrides={"memory.capacity": 16 << 20, "memory.huge_pages": False}))
    text = "".join(map(chr, torch.randint(2, 90, (900,)).tolist()))
    yield BlendSession("tiny", model, adapt(model), lambda t: [ord(c) % 97 for c in t], {"a": text}, manager, "tiny")
    manager.close()


def row(load_s: float, compute_s: float, pipelined_s: float, **changes: Any) -> Found:
    made = Found(1.0, 50e6, 0.15, load_s, compute_s, load_s + compute_s, pipelined_s)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("scale", ["ci", "full"])
def test_the_shipped_config_has_both_scales(scale: str) -> None:
    _, config = load(CONFIG, [f"scale={scale}"])
    assert config.judge.ratio in config.scales[scale].ratios
    assert 1 in config.scales[scale].loads


def test_a_good_run_passes() -> None:
    found = [row(1.0, 1.0, 1.1), row(1.0, 0.1, 1.09), row(1.0, 1.0, 1.2, chosen=True)]
    assert blend_loading.judge(found, JudgeConfig()) == []


def test_a_run_fails_when_nothing_is_hidden() -> None:
    (failure,) = blend_loading.judge([row(1.0, 1.0, 1.9)], JudgeConfig())
    assert failure == "50 MB/s, 15%: pipelined takes 0.95 of the sequential time; 0.9 is allowed"


def test_a_run_fails_when_neither_could_hide_the_other() -> None:
    (failure,) = blend_loading.judge([row(1.0, 0.4, 1.0), row(0.1, 1.0, 1.0)], JudgeConfig())
    assert failure.startswith("nothing was measured")


def test_a_run_fails_when_the_controller_chooses_too_much() -> None:
    (failure,) = blend_loading.judge([row(1.0, 1.0, 1.1), row(1.0, 1.0, 2.2, ratio=0.9, chosen=True)], JudgeConfig())
    assert failure == "50 MB/s: at the controller's 90% a blend takes 1.10 of the sequential time at 15%; 1 is allowed"


def test_all_is_measured_tabled_and_drawn(session: BlendSession, tmp_path: Path) -> None:
    _, config = load(CONFIG, [*TINY, "scales.ci.repeats=1"])
    scale = config.scales["ci"]
    prompt = filled(list(session.texts.values()), session.encode, length=256, passage=48, question=16)
    rate = blend_loading.balanced_rate(session, config, prompt, tmp_path / "tier")
    assert 1e5 < rate < 1e9
    rows, chosen = blend_loading.measure(session, config, scale, prompt, 2.0, rate / 2, tmp_path / "tier")
    assert {each.bytes_per_s for each in rows} == {rate / 2}
    assert {each.method for each in rows} == {"load", "compute", "sequential", "pipelined", "chosen"}
    assert len(rows) == 1 + 3 * len(scale.ratios) + 1
    assert config.judge.ratio - 0.01 <= chosen <= 1
    found = blend_loading.summary(rows, chosen)
    assert [f.chosen for f in found] == [False] * len(scale.ratios) + [True]
    assert all(f.sequential_s > f.load_s / 2 for f in found)
    assert len(blend_loading.table(found).splitlines()) == 2 + len(found)
    plots.blend_loading_figure(found, "title", "caption", tmp_path / "loading.png")
    assert (tmp_path / "loading.png").stat().st_size > 1000


def test_passages_that_storage_has_lost_are_no_measurement(session: BlendSession, tmp_path: Path) -> None:
    _, config = load(CONFIG, TINY)
    prompt = filled(list(session.texts.values()), session.encode, length=256, passage=48, question=16)
    with blend_loading.opened(session, config, prompt, tmp_path / "tier", None) as bench:
        bench.load()
        bench.manager.clear()
        for broken in (bench.load, lambda: bench.blend(0.15, pipelined=True)):
            with pytest.raises(BlendError, match="0 of 2 passages came"):
                broken()
