"""The controller's choices from synthetic measurements, and from real ones on a tier that is throttled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import torch

from lmcache.blend.blender import Blender
from lmcache.blend.controller import LoadingController, slowest_hidden
from lmcache.blend.standalone import BlendEngine
from lmcache.config import load_config
from lmcache.errors import ConfigError
from lmcache.storage.manager import StorageManager

LAYERS, ALWAYS, TOKENS = 32, 50, 1000
LAYER_S, ROW_S = 2e-3, 1e-5  # what a layer and a row cost here
THROUGHPUT = 100e6


def measured(**options: Any) -> LoadingController:
    """What a tier of THROUGHPUT and a model of LAYER_S + ROW_S give."""
    made = LoadingController(**options)
    for rows in (200, 300, 650):
        made.computed([rows] * LAYERS, LAYERS * (LAYER_S + rows * ROW_S))
        made.read(rows * 1000, rows * 1000 / THROUGHPUT)
    return made


def load_of(ratio: float) -> float:
    """Bytes of a layer that take as long to load as the layer takes to compute that share of TOKENS."""
    return THROUGHPUT * (LAYER_S + ROW_S * (ALWAYS + ratio * TOKENS))


def test_measurements_are_what_they_were_made_of() -> None:
    made = measured()
    assert made.throughput == pytest.approx(THROUGHPUT)
    assert [made.compute_s(rows) for rows in (0, 100)] == [pytest.approx(LAYER_S), pytest.approx(LAYER_S + 1e-3)]


@pytest.mark.parametrize("ratio", [0.15, 0.2, 0.4, 1.0])
def test_computing_takes_as_long_as_loading(ratio: float) -> None:
    assert measured().ratio(TOKENS, load_of(ratio), always=ALWAYS) == pytest.approx(ratio)


@pytest.mark.parametrize(("loads", "chosen"), [(0.0, 0.15), (0.1, 0.15), (0.6, 0.5), (5.0, 0.5)])
def test_neither_less_than_quality_needs_nor_more_than_is_allowed(loads: float, chosen: float) -> None:
    assert measured(max_ratio=0.5).ratio(TOKENS, load_of(loads), always=ALWAYS) == pytest.approx(chosen)


def test_layers_that_compute_all_tokens_leave_less_for_the_others() -> None:
    ratio = measured().ratio(TOKENS, load_of(0.4), always=ALWAYS, complete=0.25)
    assert ratio == pytest.approx(0.2)
    assert 0.25 * 1.0 + 0.75 * ratio == pytest.approx(0.4)


def test_what_is_in_memory_takes_no_time() -> None:
    assert measured().ratio(TOKENS, 0) == 0.15
    assert measured().ratio(0, load_of(0.4)) == 0.15


def test_what_is_unknown_leaves_what_quality_needs() -> None:
    only_read, only_computed = LoadingController(), LoadingController()
    only_read.read(1000, 1.0)
    only_read.read(0, 5.0)  # a tier that brought nothing says nothing
    only_computed.computed([100], 1e-3)
    for made in (LoadingController(min_ratio=0.2), only_read, only_computed):
        assert made.ratio(TOKENS, 1 << 30) == made.min_ratio
    assert only_read.throughput == pytest.approx(1000)
    assert (only_read.compute_s(10), only_computed.throughput) == (None, None)


def test_blends_of_one_size_tell_what_rows_cost_and_not_what_layers_do() -> None:
    made = LoadingController()
    for _ in range(3):
        made.computed([200] * LAYERS, LAYERS * 4e-3)
    assert [made.compute_s(rows) for rows in (100, 200)] == [pytest.approx(2e-3), pytest.approx(4e-3)]


def test_a_tier_that_becomes_slow_or_fast_is_followed() -> None:
    made = measured()
    before = made.ratio(TOKENS, load_of(0.4), always=ALWAYS)
    for throughput, limits in ((THROUGHPUT / 3, (0.9, 1.0)), (THROUGHPUT * 9, (0.15, 0.16))):
        for _ in range(12):
            made.read(10**6, 10**6 / throughput)
        after = made.ratio(TOKENS, load_of(0.4), always=ALWAYS)
        assert limits[0] <= after <= limits[1]
        assert after != before


def test_the_slowest_tier_that_is_hidden_is_chosen() -> None:
    tiers = {"memory": 1e10, "ssd": 2e9, "disk": 5e8, "far": 1e8}
    compute_s, nbytes = 10e-3, 4e6
    assert slowest_hidden(tiers, nbytes, compute_s) == "disk"  # 8 ms; far: 40 ms
    assert slowest_hidden(tiers, nbytes, compute_s / 4) == "ssd"
    assert slowest_hidden(tiers, nbytes, 1.0) == "far"
    assert slowest_hidden(tiers, nbytes, 1e-6) is None


@pytest.mark.parametrize(
    "options", [{"min_ratio": -0.1}, {"min_ratio": 0.5, "max_ratio": 0.4}, {"max_ratio": 1.1}, {"memory": 1.0}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must"):
        LoadingController(**options)


# ---- in an engine

PREFIX = tiny.prompt(5, seed=9)
PASSAGES = [tiny.prompt(length, seed=length) for length in (40, 33, 47)]
QUESTION = tiny.prompt(11, seed=4)
PROMPT = torch.cat([PREFIX, *PASSAGES[::-1], QUESTION])
SLOW = 250_000  # bytes a second: 0.5 s for the passages, 0.12 s a layer
NBYTES = 4 * 2 * sum(map(len, PASSAGES)) * 2 * 16 * 4  # layers, keys and values, tokens, heads, size, fp32


@pytest.fixture
def throttled(tmp_path: Path) -> Iterator[Callable[..., tuple[BlendEngine, StorageManager]]]:
    """An engine that has learned PASSAGES, which lie in a tier of SLOW bytes a second, each layer in a chunk."""
    opened = []

    def do(**options: Any) -> tuple[BlendEngine, StorageManager]:
        disk = {"type": "disk", "path": str(tmp_path), "capacity": 64 << 20}
        config = load_config(
            overrides={
                "memory": {"capacity": 64 << 20, "huge_pages": False},
                "tiers": [{"type": "latency", "bytes_per_s": SLOW, "inner": disk}],
                "read_batch": 1,  # one chunk after the other, so that the tier has one rate
                "read_threads": 1,
            }
        )
        manager = StorageManager(config)
        opened.append(manager)
        given = {"model_id": "tiny", "prefix": PREFIX, "min_tokens": 8, "chunk_bytes": 1, **options}
        made = BlendEngine(tiny.model("llama"), manager, **given)
        assert made.learn(PASSAGES) == len(PASSAGES)
        assert manager.flush(30)
        return made, manager

    yield do
    for manager in opened:
        manager.clear()
        assert manager.pool.used_bytes == 0, "a buffer leaked"
        manager.close()


def share(report: Any) -> float:
    """Of the candidates, in the layers behind the one that chooses."""
    fresh = report.prompt_tokens - len(PREFIX) - report.candidates
    return (report.computed[2] - fresh) / report.candidates


def assert_measured(controller: LoadingController, blends: list[float]) -> None:
    """The throttle's rate, within a factor of 2; less if the machine was too busy to read as fast."""
    assert controller.throughput is not None
    assert min(SLOW / 2, NBYTES / max(blends)) < controller.throughput < SLOW * 2


def test_a_slow_tier_leaves_time_to_compute_more_and_memory_none(
    throttled: Callable[..., tuple[BlendEngine, StorageManager]],
) -> None:
    controller = LoadingController(max_ratio=0.9)
    made, manager = throttled(selector="cacheblend", controller=controller)
    logits, true = tiny.prefill(tiny.model("llama"), PROMPT)
    shares, distances, seconds = [], [], []
    for _ in range(2):
        manager.clear(tier="memory")
        begun = time.monotonic()
        blended = made.blend(PROMPT)
        seconds.append(time.monotonic() - begun)
        shares.append(share(blended.report))
        fixed = made.blender.at_ratio(shares[-1])
        with made.store_for(len(PROMPT)).retrieve(PROMPT.numpy(), made.index.find(PROMPT.numpy())) as reused:
            again = fixed.blend(PROMPT, reused)
        # Without the prefix there, its tokens are computed: the same KV, up to rounding.
        assert tiny.distance(blended.logits, again.logits) < 1e-3
        distances.append(tiny.distance(blended.logits, logits[-1:]))
        assert tiny.distance(blended.layers[0][0], true[0][0]) < 1e-3
    assert_measured(controller, seconds)
    assert shares[0] == pytest.approx(0.15, abs=0.01), "nothing is known yet"
    assert shares[1] == pytest.approx(0.9, abs=0.01), "0.12 s a layer hide all that is allowed"
    assert distances[1] < distances[0]
    measured = controller.throughput
    in_memory = made.blend(PROMPT)
    assert share(in_memory.report) == shares[0]
    assert controller.throughput == measured, "nothing was read"


def test_what_is_loaded_whole_is_measured_and_leaves_no_time(
    throttled: Callable[..., tuple[BlendEngine, StorageManager]],
) -> None:
    controller = LoadingController()
    made, manager = throttled(selector="question", controller=controller)
    seconds = []
    for _ in range(2):
        manager.clear(tier="memory")
        begun = time.monotonic()
        blended = made.blend(PROMPT)
        seconds.append(time.monotonic() - begun)
        assert share(blended.report) == pytest.approx(0.15, abs=0.01)
    assert_measured(controller, seconds)


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "all"},
        {"selector": "none"},
        {"selector": "epic", "segment_tokens": 4},
        {"selector": "cacheblend", "check_layers": (1, 2), "ratios": (0.3, 0.2)},
    ],
)
def test_selectors_whose_ratio_decides_nothing_are_refused(options: dict[str, Any]) -> None:
    manager = StorageManager(load_config(overrides={"memory.capacity": 1 << 20, "memory.huge_pages": False}))
    with pytest.raises(ConfigError, match="decides nothing"):
        BlendEngine(tiny.model("llama"), manager, model_id="tiny", controller=LoadingController(), **options)
    manager.close()


@pytest.mark.parametrize("selector", ["random", "epic", "cacheblend", "question", "oracle"])
def test_another_ratio_changes_nothing_else(selector: str) -> None:
    whole = Blender(tiny.model("llama"), selector, sinks=3, ratio=0.25)
    other = whole.at_ratio(0.5)
    assert (whole.selector.config.ratio, other.selector.config.ratio) == (0.25, 0.5)
    assert type(other.selector) is type(whole.selector)
    assert other.selector.config.model_copy(update={"ratio": 0.25}) == whole.selector.config
