"""vLLM's cache groups as planes, and the identity of weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lmcache.connector.identity import format as vllm_format
from lmcache.errors import UnsupportedLayoutError


def config(groups: list[tuple[list[str], object]], num_blocks: int = 8) -> SimpleNamespace:
    specs = [SimpleNamespace(layer_names=names, kv_cache_spec=spec) for names, spec in groups]
    return SimpleNamespace(kv_cache_groups=specs, num_blocks=num_blocks)


def full(block: int = 16) -> object:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=8, dtype=torch.float32)


def window(size: int = 64) -> object:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=size)


def tensors(*names: str, shape: tuple[int, ...] = (8, 2, 16, 16)) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name in names}


def test_groups_become_planes_with_their_windows() -> None:
    kv = config([(["a", "b"], full()), (["c"], window())])
    cache = vllm_format.paged_cache(kv, tensors("a", "b", "c"))
    assert [(p.group, p.names, p.kind, p.window) for p in cache.planes] == [
        (0, ("a", "b"), "full_attention", 0),
        (1, ("c",), "sliding_window", 64),
    ]
    assert vllm_format.block_unit(kv) == cache.unit == 16


def test_layers_that_share_another_layers_kv_are_left_out() -> None:
    cache = vllm_format.paged_cache(config([(["a", "b"], full())]), tensors("a"))
    assert cache.planes[0].names == ("a",)


def test_kernel_blocks_are_joined_to_blocks_and_named_in_the_format() -> None:
    kv = config([(["a"], full(32))])
    split = vllm_format.paged_cache(kv, tensors("a", shape=(16, 2, 16, 16)))
    whole = vllm_format.paged_cache(kv, tensors("a", shape=(8, 2, 32, 16)))
    assert split.unit == whole.unit == 32
    assert split.planes[0].pages.num_blocks == 8
    assert split.planes[0].format() != whole.planes[0].format()


def test_state_space_layers_are_refused_by_name() -> None:
    from vllm.v1.kv_cache_interface import MambaSpec

    spec = MambaSpec(block_size=16, shapes=((2, 2),), dtypes=(torch.float32,))
    with pytest.raises(UnsupportedLayoutError, match=r"layer m keeps its KV as MambaSpec; lmcache can move"):
        vllm_format.layer_specs(config([(["m"], spec)]))


def test_tensors_of_an_older_vllm_are_refused() -> None:
    with pytest.raises(UnsupportedLayoutError, match=r"\[blocks, heads, tokens, content\]"):
        vllm_format.paged_cache(config([(["a"], full())]), tensors("a", shape=(2, 8, 16, 2, 8)))


@pytest.mark.parametrize(
    ("cache", "parallel"),
    [({"calculate_kv_scales": True}, {}), ({}, {"decode_context_parallel_size": 2})],
)
def test_what_would_make_kv_differ_is_refused(cache: dict[str, object], parallel: dict[str, object]) -> None:
    fake = SimpleNamespace(cache_config=SimpleNamespace(**cache), parallel_config=SimpleNamespace(**parallel))
    with pytest.raises(UnsupportedLayoutError):
        vllm_format.check_supported(fake)


def test_a_replica_over_several_hosts_is_refused() -> None:
    fake = SimpleNamespace(cache_config=SimpleNamespace(), parallel_config=SimpleNamespace(nnodes=2))
    with pytest.raises(UnsupportedLayoutError, match="spans hosts"):
        vllm_format.check_supported(fake)
