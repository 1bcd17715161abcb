"""Passages learned, found by content, moved, blended: against Hugging Face's own forward pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import torch
from pydantic import ByteSize

from lmcache.blend.reuse import Segment
from lmcache.blend.standalone import BlendEngine
from lmcache.blend.stored import StoredKV
from lmcache.config import load_config
from lmcache.errors import ConfigError, CorruptChunkError, LeaseExpiredError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.base import Buffer
from lmcache.storage.manager import StorageManager

PREFIX = tiny.prompt(5, seed=9)
PASSAGES = [tiny.prompt(length, seed=length) for length in (40, 33, 47)]
QUESTION = tiny.prompt(11, seed=4)
# Another order than that of learning, and tokens between that are in no passage.
PROMPT = torch.cat([PREFIX, PASSAGES[2], tiny.prompt(3, seed=5), PASSAGES[0], PASSAGES[1], QUESTION])


@pytest.fixture
def manager() -> Iterator[StorageManager]:
    made = StorageManager(load_config(overrides={"memory.capacity": 64 << 20, "memory.huge_pages": False}))
    yield made
    made.clear()
    assert made.pool.used_bytes == 0, "a buffer leaked"
    made.close()


def engine(manager: StorageManager, family: str = "llama", selector: str = "all", **options: Any) -> BlendEngine:
    made = BlendEngine(
        tiny.model(family), manager, model_id=family, prefix=PREFIX, selector=selector, min_tokens=8, **options
    )
    assert made.learn(PASSAGES) == len(PASSAGES)
    return made


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_equals_full_prefill(family: str, manager: StorageManager) -> None:
    logits, true = tiny.prefill(tiny.model(family), PROMPT)
    blended = engine(manager, family).blend(PROMPT)
    assert blended.report.candidates == sum(map(len, PASSAGES))
    assert tiny.distance(blended.logits, logits[-1:]) < 1e-3
    for ours, theirs in zip(blended.layers, true, strict=True):
        assert tiny.distance(ours[0], theirs[0]) < 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_passage_right_behind_the_prefix_is_exact_without_recomputing(family: str, manager: StorageManager) -> None:
    prompt = torch.cat([PREFIX, PASSAGES[1], QUESTION])
    logits, _ = tiny.prefill(tiny.model(family), prompt)
    blended = engine(manager, family, "none").blend(prompt)
    assert blended.report.computed == [len(QUESTION)] * 4
    assert tiny.distance(blended.logits, logits[-1:]) < 1e-3


def test_only_a_share_of_the_passages_is_computed(manager: StorageManager) -> None:
    blended = engine(manager, selector="cacheblend", ratio=0.25).blend(PROMPT)
    fresh = len(PROMPT) - len(PREFIX) - blended.report.candidates
    assert blended.report.computed[2] == fresh + round(0.25 * blended.report.candidates)


def test_an_engine_finds_what_another_has_learned(manager: StorageManager) -> None:
    first = engine(manager, selector="none")
    second = engine(manager, selector="none")
    spans = [Segment(match.start, match.stop) for match in first.index.find(PROMPT.numpy())]
    assert torch.equal(second.blend(PROMPT, spans).logits, first.blend(PROMPT).logits)


def test_what_storage_has_lost_is_computed(manager: StorageManager) -> None:
    logits, _ = tiny.prefill(tiny.model("llama"), PROMPT)
    made = engine(manager, selector="none")
    assert tiny.distance(made.blend(PROMPT).logits, logits[-1:]) > 1e-2
    manager.clear()
    blended = made.blend(PROMPT)
    assert blended.report.candidates == 0
    assert tiny.distance(blended.logits, logits[-1:]) < 1e-3


@pytest.mark.parametrize("error", [LeaseExpiredError, CorruptChunkError])
@pytest.mark.parametrize("lives", [1, 2])
def test_a_segment_lost_midway_begins_the_blend_again(
    manager: StorageManager,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
    lives: int,
) -> None:
    made = engine(manager, selector="none")
    reused = made.blend(PROMPT).logits
    logits, _ = tiny.prefill(tiny.model("llama"), PROMPT)
    layer, failed = StoredKV.layer, []

    def failing(self: StoredKV, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 2 and self.segments and len(failed) < lives:
            failed.append(index)
            raise error("gone")
        return layer(self, index)

    monkeypatch.setattr(StoredKV, "layer", failing)
    with caplog.at_level(logging.WARNING):
        blended = made.blend(PROMPT)
    assert sum("begins again" in record.getMessage() for record in caplog.records) == lives
    if lives == 1:
        assert torch.equal(blended.logits, reused)
    else:
        assert tiny.distance(blended.logits, logits[-1:]) < 1e-3


def test_generation_goes_on_from_a_blend(manager: StorageManager) -> None:
    made, model = engine(manager), tiny.model("llama")
    cache = made.blender.cache(made.blend(PROMPT))
    with torch.no_grad():
        ours = model.generate(PROMPT[None], past_key_values=cache, max_new_tokens=8, do_sample=False)
        theirs = model.generate(PROMPT[None], max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, theirs)


def test_a_model_without_a_name_is_refused(manager: StorageManager) -> None:
    with pytest.raises(ConfigError, match="model_id is empty"):
        BlendEngine(tiny.model("llama"), manager, model_id="")


class Gate(DiskBackend):
    """Lets so many reads of one chunk through; after that it is broken, or damages what it reads."""

    def __init__(self, config: DiskConfig, fault: str) -> None:
        super().__init__(config)
        self.left, self.fault = 0, fault

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        self.left -= len(keys)
        if self.left < 0 and self.fault == "dead":
            raise OSError("the tier was killed")
        read = super().get(keys, into)
        if self.left < 0:
            for buffer in into[:read]:
                buffer.view[0] ^= 1
        return read


@pytest.mark.parametrize("fault", ["dead", "corrupt"])
@pytest.mark.parametrize("selector", ["none", "cacheblend", "question"])
def test_a_tier_that_fails_midway_leaves_the_blend_of_what_came(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str, selector: str
) -> None:
    """The first segment is in memory, the others come from a disk that fails behind their first layers."""
    gate = Gate(DiskConfig(path=tmp_path, capacity=ByteSize(64 << 20)), fault)
    options = {"memory": {"capacity": 64 << 20, "huge_pages": False}, "read_batch": 1, "read_threads": 1}
    made = StorageManager(load_config(overrides=options), tiers=[gate])
    blending = BlendEngine(
        tiny.model("llama"), made, model_id="llama", prefix=PREFIX, selector=selector, min_tokens=8, chunk_bytes=1
    )
    assert blending.learn(PASSAGES) == len(PASSAGES)
    spans = [Segment(match.start, match.stop) for match in blending.index.find(PROMPT.numpy())]
    smaller = blending.blend(PROMPT, spans[:1])
    assert made.flush(20)
    made.clear(tier="memory")
    gate.left = 4
    assert torch.equal(blending.blend(PROMPT, spans[:1]).logits, smaller.logits)  # brings the first into memory
    gate.left = 3
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        blended = blending.blend(PROMPT, spans, timeout_s=5)
    assert ("begins again" in caplog.text) == (selector != "question"), "layer by layer, but for who needs all"
    assert time.monotonic() - begun < 10
    assert blended.report.candidates == smaller.report.candidates == len(PASSAGES[2])
    assert torch.equal(blended.logits, smaller.logits)
    assert made.stats()["leases"] == 0
    made.clear()
    made.close()
    assert made.pool.used_bytes == 0, "a buffer leaked"
