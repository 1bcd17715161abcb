"""Attention of selected tokens is that of a loop in float64, whatever the layout, and depends on nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from attention_worlds import Batch, Result, World
from poison import poisoned_outputs

from lmcache.errors import ConfigError, KernelArgumentError
from lmcache.kernels.attention import host_provider as sparse_prefill_host
from lmcache.kernels.attention import split_kv
from lmcache.kernels.attention import triton_provider as sparse_prefill_triton
from lmcache.kernels.attention.sparse_prefill import (
    PROVIDERS,
    AttentionProblem,
    PackedKV,
    PagedKV,
    sparse_prefill,
    sparse_prefill_torch,
)
from lmcache.kernels.launch import runs_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = World(prompts=((9, 40), (2, 21)))
LAYOUTS = {
    "packed": {},
    "paged": {"page": 16},
    "pages of 5": {"page": 5},
    "pages with holes": {"page": 16, "holes": True},
    "queries in any order": {"page": 16, "unsorted": True},
}


def check(world: World, device: torch.device, num_splits: int | None = None, **options: Any) -> Batch:
    """Through the op and through the definition."""
    batch = world.build(device)
    result = Result.of(batch)
    want = batch.expected(**options)
    given = (batch.q, batch.kv, batch.positions, batch.cu_q)
    with poisoned_outputs():  # the parts of splits, too
        returned = sparse_prefill(*given, out=result.out, lse=result.lse, num_splits=num_splits, **options)
    assert returned is result.out
    result.check(want)
    plain = Result.of(batch)
    plain.out.copy_(sparse_prefill_torch(*given, lse=plain.lse, **options))
    plain.check(want)
    if not runs_kernel(device):  # without lse it is torch's own attention
        with poisoned_outputs():
            alone = sparse_prefill(*given, **options)
        result.out.copy_(alone)
        result.check(want)
    return batch


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    check(World(**LAYOUTS[layout], dtype=dtype), device)


@pytest.mark.parametrize(("layout", "splits"), [*((layout, 3) for layout in LAYOUTS), ("paged", 2), ("packed", 20)])
def test_splits_of_the_keys(layout: str, splits: int, device: torch.device) -> None:
    check(World(**LAYOUTS[layout], prompts=((3, 260), (2, 33)), heads=(2, 1)), device, splits)


@pytest.mark.parametrize("window", [1, 20, 100, 1000])
@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_windows(layout: str, window: int, device: torch.device) -> None:
    check(World(**LAYOUTS[layout], prompts=((6, 300), (3, 5))), device, window=window)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("layout", ["packed", "pages with holes"])
def test_everything_together(layout: str, splits: int, device: torch.device) -> None:
    world = World(**LAYOUTS[layout], prompts=((6, 300), (3, 90)), heads=(6, 2))
    check(world, device, splits, window=150, soft_cap=2.0, scale=0.3)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1), (40, 1), (34, 2)])
def test_groups_of_heads(heads: tuple[int, int], device: torch.device) -> None:
    check(dataclasses.replace(SMALL, heads=heads), device)


@pytest.mark.parametrize("size", [(16, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (8, 5), (100, 3)])
def test_sizes_of_heads(size: tuple[int, int], device: torch.device) -> None:
    check(dataclasses.replace(SMALL, size=size[0], v_size=size[1]), device)


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 100])
@pytest.mark.parametrize("page", [0, 1, 64])
def test_any_number_of_tokens(tokens: int, page: int, device: torch.device) -> None:
    check(World(prompts=((tokens, tokens), (tokens // 2, tokens)), heads=(2, 1), page=page), device)


def test_many_requests(device: torch.device) -> None:
    check(World(prompts=tuple((i % 4, 3 * i) for i in range(1, 20)), heads=(2, 1), page=16), device)


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    check(dataclasses.replace(SMALL, dtype=FP32), device, scale=40.0)
    check(dataclasses.replace(SMALL, dtype=FP32), device, scale=40.0, soft_cap=0.5)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("page", [0, 16])
def test_a_query_that_sees_nothing_gets_zeros(page: int, splits: int, device: torch.device) -> None:
    batch = World(prompts=((3, 40), (2, 0), (1, 30)), page=page).build(device)
    positions = torch.tensor([-1, 200, 5, 0, 7, -3], device=device)
    lse = torch.full((6, 4), math.nan, device=device)
    out = sparse_prefill(batch.q, batch.kv, positions, batch.cu_q, window=100, lse=lse, num_splits=splits)
    blind = torch.tensor([True, True, False, True, True, True], device=device)
    assert (out[blind] == 0).all()
    assert (lse[blind] == -math.inf).all()
    assert (out[~blind] != 0).all()
    assert lse[~blind].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_queries_that_share_positions(layout: str, splits: int, device: torch.device) -> None:
    batch = World(**LAYOUTS[layout], prompts=((9, 150), (0, 40), (3, 12))).build(device)
    places = torch.tensor([149, 7, 7, 80, 0, 149, 7, 64, 63, 11, 0, 0], device=device)
    result = Result.of(batch)
    options = {"window": 70, "soft_cap": 3.0}
    given = (batch.q, batch.kv, places, batch.cu_q)
    sparse_prefill(*given, out=result.out, lse=result.lse, num_splits=splits, **options)
    result.check(dataclasses.replace(batch, positions=places).expected(**options))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 2**31 - 1, 2**40])
@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_positions_and_windows_beyond_32_bits(
    layout: str, window: int | None, splits: int, device: torch.device
) -> None:
    batch = World(**LAYOUTS[layout], prompts=((6, 130),)).build(device)
    places = torch.tensor([-(2**63), -5, 3 - 2**32, 90, 129, 2**31 - 2], device=device)
    result = Result.of(batch)
    sparse_prefill(
        batch.q, batch.kv, places, batch.cu_q, window=window, out=result.out, lse=result.lse, num_splits=splits
    )
    # The oracle would subtract the window from the lowest.
    result.check(dataclasses.replace(batch, positions=places.clamp(min=-5)).expected(window=window))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_later_keys_never_change_an_earlier_query(
    dtype: torch.dtype, page: int, splits: int, device: torch.device
) -> None:
    batch = World(prompts=((40, 200),), page=page, dtype=dtype, seed=3).build(device)
    kv, given = batch.kv, (batch.positions, batch.cu_q)
    before = sparse_prefill(batch.q, kv, *given, num_splits=splits)
    for first in (0, 63, 64, 130, 199):
        changed = dataclasses.replace(kv, keys=kv.keys.clone(), values=kv.values.clone())
        for tensor in (changed.keys, changed.values):
            if isinstance(kv, PackedKV):
                tensor[first:] = tensor[first:] * 3 + 5
            else:
                index = torch.arange(first, 200, device=device)
                block = kv.block_table[0, index // page].long()
                tensor[block, :, index % page] = tensor[block, :, index % page] * 3 + 5
        after = sparse_prefill(batch.q, changed, *given, num_splits=splits)
        earlier = batch.positions < first
        assert torch.equal(after[earlier], before[earlier])
        assert not (after[~earlier] == before[~earlier]).all(-1).any()


@pytest.mark.parametrize("splits", [1, 3])
def test_keys_outside_the_reach_of_all_queries_are_never_read(splits: int, device: torch.device) -> None:
    batch = World(prompts=((4, 300),)).build(device)
    positions = torch.tensor([150, 152, 171, 190], device=device)
    want = sparse_prefill(batch.q, batch.kv, positions, batch.cu_q, window=60, num_splits=splits)
    for tensor in (batch.kv.keys, batch.kv.values):
        tensor[:91] = math.nan
        tensor[191:] = math.nan
    got = sparse_prefill(batch.q, batch.kv, positions, batch.cu_q, window=60, num_splits=splits)
    assert torch.equal(got, want)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_all_queries_are_causal_attention(dtype: torch.dtype, device: torch.device) -> None:
    batch = World(prompts=((130, 130),), heads=(4, 2), dtype=dtype).build(device)
    got = sparse_prefill(batch.q, batch.kv, batch.positions, batch.cu_q)
    assert batch.positions.tolist() == list(range(130))
    q, k, v = (t.transpose(0, 1)[None].float() for t in (batch.q, batch.kv.keys, batch.kv.values))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    tolerance = {"rtol": 2**-7, "atol": 6e-3} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got.float(), want[0].transpose(0, 1), **tolerance)


@pytest.mark.parametrize("window", [None, 1, 20, 129, 130])
@pytest.mark.parametrize("layout", ["packed", "pages with holes"])
def test_all_queries_of_any_layout(layout: str, window: int | None, device: torch.device) -> None:
    check(World(**LAYOUTS[layout], prompts=((130, 130), (7, 7))), device, window=window)


@pytest.mark.host
@pytest.mark.parametrize("prompts", [((130, 130), (7, 7)), ((40, 90), (2, 21))])
def test_a_plan_serves_layers_with_other_options(prompts: tuple[tuple[int, int], ...], device: torch.device) -> None:
    batch = World(prompts=prompts).build(device)
    given = (batch.q, batch.kv, batch.positions, batch.cu_q)
    plan: dict[object, Any] = {}
    options = ({}, {"window": 20}, {"soft_cap": 3.0}, {"window": 20, "soft_cap": 3.0})
    for option, with_lse in 2 * list(itertools.product(options, (False, True))):
        result = Result.of(batch)
        sparse_prefill_torch(*given, lse=result.lse, **option)
        lse = result.lse if with_lse else None
        sparse_prefill(*given, out=result.out, lse=lse, plan=plan, provider="torch", **option)
        result.check(batch.expected(**option))
    assert plan


def test_nothing_to_do(device: torch.device) -> None:
    batch = World(prompts=((0, 5), (0, 0))).build(device)
    assert sparse_prefill(batch.q, batch.kv, batch.positions, batch.cu_q).shape == (0, 4, 64)
    no_requests = PackedKV(batch.kv.keys[:0], batch.kv.values[:0], torch.zeros(1, dtype=torch.int64, device=device))
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    assert sparse_prefill(batch.q, no_requests, batch.positions, nothing).shape == (0, 4, 64)


@pytest.mark.host
@pytest.mark.parametrize("layout", ["packed", "pages with holes"])
def test_provider_torch(layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_prefill_host, "_SLAB_SCORES", 1)  # several slabs
    batch = World(**LAYOUTS[layout], prompts=((40, 90), (2, 21))).build(device)
    result = Result.of(batch)
    for lse in (result.lse, None):
        given = (batch.q, batch.kv, batch.positions, batch.cu_q)
        sparse_prefill(*given, out=result.out, lse=lse, window=50, provider="torch")
        result.check(batch.expected(window=50))


@pytest.mark.host
@pytest.mark.parametrize("shared", [1, 60, 1 << 30])
@pytest.mark.parametrize("window", [None, 50])
def test_a_plan_serves_one_layer_after_the_other(
    window: int | None, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: the same places, other queries, keys and values, in one call for a slab or in two."""
    monkeypatch.setattr(sparse_prefill_host, "_SLAB_ROWS", 16)
    monkeypatch.setattr(sparse_prefill_host, "_SHARED_KEYS", shared)
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 1, 2, 5, 70, *range(80, 100), *range(101, 130, 3), 199])
    cu_q, cu_kv = torch.tensor([0, len(positions)]), torch.tensor([0, 200])
    plan: dict[object, Any] = {}
    for _ in range(3):
        q = torch.randn(len(positions), 6, 32, generator=generator)
        kv = PackedKV(*torch.randn(2, 200, 2, 32, generator=generator), cu_kv)
        found = sparse_prefill(q, kv, positions, cu_q, window=window, provider="torch", plan=plan)
        torch.testing.assert_close(found, sparse_prefill_torch(q, kv, positions, cu_q, window=window))
        assert len(plan) == 1


def test_unknown_provider_names_the_known_ones() -> None:
    batch = SMALL.build(torch.device("cpu"))
    assert PROVIDERS.names() == ["flashinfer", "torch", "triton"]
    with pytest.raises(ConfigError, match="unknown attention provider 'fast'; known: flashinfer, torch, triton"):
        sparse_prefill(batch.q, batch.kv, batch.positions, batch.cu_q, provider="fast")


def test_flashinfer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    batch = SMALL.build(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs the package flashinfer-python.*choose 'triton' or 'torch'"):
        sparse_prefill(batch.q, batch.kv, batch.positions, batch.cu_q, provider="flashinfer")


class DocumentedFlashInfer:
    """What FlashInfer's documentation says of its two wrappers, in float64; sums to base 2, blind rows NaN."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8
        self.layout = kv_layout

    def run(self, q: torch.Tensor, *operands: Any, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        assert return_lse
        out = torch.full((*q.shape[:2], self.options["head_dim_vo"]), math.nan, dtype=q.dtype)
        lse = torch.full(q.shape[:2], math.nan)
        masks = iter(self.options["custom_mask"].tolist())
        for b in range(len(self.cu_q) - 1):
            keys, values = self.request(b, *operands)
            for t in range(int(self.cu_q[b]), int(self.cu_q[b + 1])):
                seen = torch.tensor([next(masks) for _ in range(len(keys))], dtype=torch.bool)
                for h in range(q.shape[1] if seen.any() else 0):
                    head = h * keys.shape[1] // q.shape[1]
                    logits = keys[seen, head].double() @ q[t, h].double() * self.options["sm_scale"]
                    if self.options["logits_soft_cap"]:
                        logits = self.options["logits_soft_cap"] * (logits / self.options["logits_soft_cap"]).tanh()
                    out[t, h] = logits.softmax(0) @ values[seen, head].double()
                    lse[t, h] = logits.logsumexp(0) / math.log(2)
        assert next(masks, None) is None
        return out, lse


class Ragged(DocumentedFlashInfer):
    def plan(
        self, cu_q: torch.Tensor, cu_kv: torch.Tensor, q_heads: int, heads: int, size: int, **options: Any
    ) -> None:
        assert (self.layout, cu_q.dtype, cu_kv.dtype, size) == ("NHD", torch.int32, torch.int32, 64)
        self.cu_q, self.cu_kv, self.options = cu_q, cu_kv, options

    def request(self, b: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = slice(int(self.cu_kv[b]), int(self.cu_kv[b + 1]))
        return keys[own], values[own]


class Paged(DocumentedFlashInfer):
    def plan(
        self,
        cu_q: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last: torch.Tensor,
        q_heads: int,
        heads: int,
        size: int,
        page: int,
        **options: Any,
    ) -> None:
        assert self.layout == "HND"
        assert {t.dtype for t in (cu_q, indptr, indices, last)} == {torch.int32}
        self.cu_q, self.indptr, self.indices, self.last, self.page = cu_q, indptr, indices, last, page
        self.options = options

    def request(self, b: int, cache: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = self.indices[int(self.indptr[b]) : int(self.indptr[b + 1])]
        assert 1 <= int(self.last[b]) <= self.page
        length = (len(blocks) - 1) * self.page + int(self.last[b])
        keys, values = (t[blocks.long()].transpose(1, 2).flatten(0, 1)[:length] for t in cache)
        return keys, values


@pytest.mark.host
@pytest.mark.parametrize("layout", ["packed", "pages with holes"])
def test_what_flashinfer_is_told(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=Ragged, BatchPrefillWithPagedKVCacheWrapper=Paged)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    batch = World(**LAYOUTS[layout], prompts=((6, 40), (0, 3), (1, 0), (2, 21))).build(torch.device("cpu"))
    result = Result.of(batch)
    options = {"window": 12, "soft_cap": 3.0, "scale": 0.2}
    given = (batch.q, batch.kv, batch.positions, batch.cu_q)
    sparse_prefill(*given, out=result.out, lse=result.lse, provider="flashinfer", **options)
    result.check(batch.expected(**options))


def packed(**changes: Any) -> dict[str, Any]:
    """Arguments that fit, but for the changes."""
    batch = SMALL.build(torch.device("cpu"))
    arguments = {"q": batch.q, "q_positions": batch.positions, "cu_q": batch.cu_q}
    parts = {f.name: getattr(batch.kv, f.name) for f in dataclasses.fields(batch.kv)}
    for name, value in changes.items():
        (parts if name in parts else arguments)[name] = value
    return {**arguments, "kv": PackedKV(**parts)}


def paged(**changes: Any) -> dict[str, Any]:
    batch = dataclasses.replace(SMALL, page=16).build(torch.device("cpu"))
    kv = dataclasses.replace(batch.kv, **changes)
    return {"q": batch.q, "q_positions": batch.positions, "cu_q": batch.cu_q, "kv": kv}


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: packed(q=torch.zeros(11, 4, 64, dtype=torch.float64)), "q is torch.float64"),
        (lambda: packed(q=torch.zeros(11, 256, dtype=BF16)), r"q is torch.bfloat16 of shape \(11, 256\)"),
        (lambda: packed(q=torch.zeros(11, 64, 4, dtype=BF16).mT), "q has strides .* the last must be 1"),
        (lambda: packed(q=torch.zeros(11, 4, 576, dtype=BF16)), "576 components; at most 256"),
        (lambda: packed(q=torch.zeros(11, 3, 64, dtype=BF16)), "a multiple of those of the keys"),
        (lambda: packed(q=torch.zeros(11, 4, 32, dtype=BF16)), "sizes must be equal"),
        (lambda: packed(keys=torch.zeros(61, 2, 64, dtype=FP16)), "keys is torch.float16 .* as q is"),
        (lambda: packed(values=torch.zeros(60, 2, 64, dtype=BF16)), "all but the last must be equal"),
        (lambda: packed(values=torch.zeros(61, 2, 64, dtype=BF16, device="meta")), "values is .* on meta"),
        (lambda: packed(q_positions=torch.zeros(10, dtype=torch.int64)), r"q_positions .* \(11,\)"),
        (lambda: packed(q_positions=torch.zeros(11, dtype=torch.int32)), "q_positions is torch.int32"),
        (lambda: packed(q_positions=torch.zeros(22, dtype=torch.int64)[::2]), "q_positions .* contiguous"),
        (lambda: packed(cu_q=torch.tensor([0, 9, 12])), "cu_q is .* must rise from 0 to 11"),
        (lambda: packed(cu_q=torch.tensor([0.0, 9, 11])), "cu_q is torch.float32"),
        (lambda: packed(cu_q=torch.tensor([0, 9, 11], device="meta")), "cu_q is on meta"),
        (lambda: packed(cu_kv=torch.tensor([0, 61])), r"cu_kv .* must be .* \(3,\)"),
        (lambda: packed(cu_kv=torch.tensor([0, 62, 61])), "cu_kv is .* must rise from 0 to 61"),
        (lambda: packed(window=0), "window is 0; it must be above 0"),
        (lambda: packed(scale=-1.0), "scale is -1.0"),
        (lambda: packed(scale=math.nan), "scale is nan"),
        (lambda: packed(soft_cap=0.0), "soft_cap is 0.0"),
        (lambda: packed(num_splits=0), "num_splits is 0"),
        (lambda: packed(out=torch.zeros(11, 4, 32, dtype=BF16)), r"out has shape .* must be \(11, 4, 64\)"),
        (lambda: packed(out=torch.zeros(11, 4, 64)), "out is torch.float32 .* as q is"),
        (lambda: packed(lse=torch.zeros(11, 4, dtype=BF16)), "lse is torch.bfloat16"),
        (lambda: packed(lse=torch.zeros(4, 11)), "lse is torch.float32 of shape"),
        (lambda: paged(kv_lens=torch.tensor([40, 500])), "kv_lens holds 40 to 500"),
        (lambda: paged(kv_lens=torch.tensor([40])), r"kv_lens .* \(2,\)"),
        (lambda: paged(block_table=torch.full((2, 5), 99)), "block_table holds 99"),
        (lambda: paged(block_table=torch.zeros(10, dtype=torch.int32)), "block_table is"),
        (lambda: paged(keys=torch.zeros(3, 2, 64, dtype=BF16)), "keys is .* 4 dimensions"),
    ],
)
def test_arguments_that_do_not_fit(arguments: Any, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        sparse_prefill(**arguments())


def test_the_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs a processor, of 8 blocks of keys or more."""
    monkeypatch.setattr(sparse_prefill_triton, "_processors", lambda device: 132)
    config = sparse_prefill_triton.Config(16, 64, 4, 3)

    def splits(programs: int, max_kv: int) -> int:
        problem = types.SimpleNamespace(q=torch.zeros(1), max_kv=max_kv)
        return sparse_prefill_triton._choose_splits(problem, config, programs)  # type: ignore[arg-type]

    assert [splits(8, 1 << 17), splits(300, 1 << 17), splits(132, 1 << 17)] == [33, 1, 2]
    assert [splits(8, 1000), splits(8, 4096), splits(1, 1 << 20), splits(0, 0)] == [1, 8, 64, 1]


@pytest.mark.interpret
def test_interpret_mode_really_runs_the_kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(sparse_prefill_host, "attend", None)
    monkeypatch.setattr(split_kv, "merge_splits_torch", None)
    check(SMALL, device, 2)


@pytest.mark.interpret
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("layout", ["packed", "pages with holes"])
def test_kernels_stay_inside_and_do_not_race(layout: str, splits: int) -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    batch = World(**LAYOUTS[layout], prompts=((5, 130), (2, 9)), heads=(3, 1), size=40).build(torch.device("cpu"))
    result = Result.of(batch)
    with sanitized() as watched:
        given = (batch.q, batch.kv, batch.positions, batch.cu_q)
        sparse_prefill(*given, out=result.out, lse=result.lse, window=70, num_splits=splits)
    result.check(batch.expected(window=70))
    assert watched.programs > 0


@pytest.mark.interpret
@pytest.mark.parametrize(("window", "masked"), [(None, 1), (190, 2)])
def test_clear_blocks_are_not_masked(
    window: int | None, masked: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Of blocks of 64 keys, queries at 200 and 201 see 0, 1, 2 whole, with the window 1 and 2; the others in part."""
    from triton.runtime.interpreter import interpreter_builder

    batch = World(prompts=((2, 300),), heads=(1, 1)).build(device)
    shapes: list[tuple[int, ...]] = []
    real = type(interpreter_builder).create_select

    def create_select(self: Any, condition: Any, *values: Any) -> Any:
        shapes.append(condition.data.shape)
        return real(self, condition, *values)

    monkeypatch.setattr(type(interpreter_builder), "create_select", create_select)
    sparse_prefill(batch.q, batch.kv, torch.tensor([200, 201]), batch.cu_q, window=window)
    assert shapes.count((16, 64)) == masked


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 63, 3, 64), (5, 7, 2, 100), (64, 3, 1, 256)])
def test_merge_of_splits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    rng = np.random.default_rng(1)
    parts, sums = rng.standard_normal(shape).astype(np.float32), 30 * rng.standard_normal(shape[:3]).astype(np.float32)
    blind = rng.random(shape[:3]) < 0.3
    blind[:, 0, 0] = True  # a row that no part saw
    sums[blind] = -np.inf
    parts[blind] = np.nan
    exact = sums.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        want_lse = exact.max(0) + np.log(np.exp(exact - exact.max(0)).sum(0))
        weights = np.where(blind, 0.0, np.exp(exact - want_lse))
    want_lse[blind.all(0)] = -np.inf
    want = (weights[..., None] * np.where(blind[..., None], 0.0, parts)).sum(0)
    given = [torch.from_numpy(array).to(device) for array in (parts, sums)]
    for merge in (split_kv.merge_splits, split_kv.merge_splits_torch):
        memory = torch.full((shape[1] + 2, shape[2], shape[3] + 8), math.nan, dtype=dtype, device=device)
        lse = torch.full(shape[1:3], math.nan, device=device)
        merge(*given, memory[1:-1, :, 4:-4], lse)
        tolerance = {BF16: 2**-8, FP16: 2**-10, FP32: 2e-6}[dtype]
        np.testing.assert_allclose(memory[1:-1, :, 4:-4].double().cpu().numpy(), want, tolerance, tolerance)
        np.testing.assert_allclose(lse.cpu().numpy(), want_lse, 1e-6, 1e-5)
        assert int(memory.isnan().sum()) == memory.numel() - want.size
        again = torch.full_like(memory, math.nan)
        merge(*given, again[1:-1, :, 4:-4])
        assert torch.equal(again[1:-1, :, 4:-4], memory[1:-1, :, 4:-4])


def test_merges_that_do_not_fit() -> None:
    parts, sums, out = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4), torch.zeros(3, 4, 8)
    with pytest.raises(KernelArgumentError, match=r"part_lses is .* must be fp32"):
        split_kv.merge_splits(parts, sums[:1], out)
    with pytest.raises(KernelArgumentError, match=r"parts has strides .* must be dense"):
        split_kv.merge_splits(parts.transpose(1, 2).contiguous().transpose(1, 2), sums, out)
    with pytest.raises(KernelArgumentError, match=r"out is torch.int32"):
        split_kv.merge_splits(parts, sums, out.int())
    with pytest.raises(KernelArgumentError, match=r"lse is .* must be fp32"):
        split_kv.merge_splits(parts, sums, out, sums[0, :2])
    with pytest.raises(KernelArgumentError, match="at least one split"):
        split_kv.merge_splits(parts[:0], sums[:0], out)
    with pytest.raises(KernelArgumentError, match="parts is on meta"):
        split_kv.merge_splits(parts.to("meta"), sums, out)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements() -> None:
    """The block table points at the last block of a cache of more than 2**31 elements."""
    heads, page, size = 8, 16, 128
    blocks = (2**31 + 2**20) // (heads * page * size * 2)
    if torch.cuda.mem_get_info()[0] < blocks * heads * page * size * 4 + 2**30:
        pytest.skip("not enough GPU memory")
    cache = torch.zeros(blocks, heads, page, 2 * size, dtype=BF16, device="cuda")
    cache[-1].normal_()
    q = torch.randn(1, heads, size, dtype=BF16, device="cuda")
    table = torch.tensor([[blocks - 1]], dtype=torch.int32, device="cuda")
    lengths, place = torch.tensor([page], device="cuda"), torch.tensor([page - 1], device="cuda")
    cu_q = torch.tensor([0, 1], device="cuda")
    got = sparse_prefill(q, PagedKV(cache[..., :size], cache[..., size:], table, lengths), place, cu_q)
    keys, values = cache[-1].transpose(0, 1).split(size, -1)
    packed_kv = PackedKV(keys.contiguous(), values.contiguous(), torch.tensor([0, page], device="cuda"))
    torch.testing.assert_close(got, sparse_prefill(q, packed_kv, place, cu_q))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 2])
def test_packed_offsets_beyond_two_to_the_31_elements(splits: int) -> None:
    """The last keys of more than 2**31 elements, as a request of their own and as the end of one."""
    heads, size, few = 8, 128, 100
    tokens = (2**31 + 2**20) // (heads * size * 2)
    if torch.cuda.mem_get_info()[0] < tokens * heads * size * 4 + 2**30:
        pytest.skip("not enough GPU memory")
    memory = torch.zeros(tokens, heads, 2 * size, dtype=BF16, device="cuda")
    memory[-few:].normal_()
    keys, values = memory.split(size, -1)
    q = torch.randn(1, heads, size, dtype=BF16, device="cuda")

    def attend(first: int, place: int, *bounds: int) -> torch.Tensor:
        kv = PackedKV(keys[first:], values[first:], torch.tensor([0, *bounds], device="cuda"))
        cu_q = torch.tensor([0] * len(bounds) + [1], device="cuda")
        return sparse_prefill(q, kv, torch.tensor([place], device="cuda"), cu_q, window=few, num_splits=splits)

    want = attend(tokens - few, few - 1, few)
    assert want.count_nonzero() > 0
    torch.testing.assert_close(attend(0, few - 1, tokens - few, tokens), want)
    torch.testing.assert_close(attend(0, tokens - 1, tokens), want, rtol=2**-7, atol=6e-3)


def test_the_oracle_sees_a_wrong_output(device: torch.device) -> None:
    batch = SMALL.build(device)
    result = Result.of(batch)
    sparse_prefill(batch.q, batch.kv, batch.positions, batch.cu_q, out=result.out, lse=result.lse)
    result.check(batch.expected())
    with pytest.raises(AssertionError):
        result.check(batch.expected(window=30))
    result.out_memory[0] = 0
    with pytest.raises(AssertionError):
        result.check(batch.expected())


def test_the_problem_is_what_a_provider_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[AttentionProblem] = []
    monkeypatch.setattr(sparse_prefill_host, "attend", problems.append)
    arguments = packed(max_kv=45, provider="torch", num_splits=3)
    out = sparse_prefill(**arguments)
    (problem,) = problems
    assert (problem.batch, problem.kv_heads, problem.max_kv, problem.num_splits) == (2, 2, 45, 3)
    assert problem.out is out
    assert problem.scale == 0.125
