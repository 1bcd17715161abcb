"""Blocks that vLLM's own CPU operator has written are what lmcache.kernels.copy.cpu_blocks takes them for."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from lmcache.connector.identity.cpu_isa import cpu_isa
from lmcache.errors import UnsupportedLayoutError
from lmcache.kernels import PagedLayers, gather_pages
from lmcache.kernels.copy.cpu_blocks import ISAS, pack_cpu_blocks, unpack_cpu_blocks

BLOCKS = 3
CASES = [
    ("vec", torch.float32, 32, 64),
    ("vec", torch.bfloat16, 32, 64),
    ("vec", torch.float16, 128, 128),
    ("vec16", torch.float32, 16, 64),
    ("vec16", torch.bfloat16, 16, 80),
    ("vec16", torch.bfloat16, 32, 112),
    ("amx", torch.bfloat16, 32, 64),
    ("amx", torch.bfloat16, 128, 128),
]


def written_by_vllm(
    isa: str, keys: torch.Tensor, values: torch.Tensor, block_tokens: int, kv_dtype: torch.dtype, kv_cache_dtype: str
) -> torch.Tensor:
    """A cache `[B, H, N, 2 D]` after vLLM has stored keys and values `[T, H, D]` of its last blocks, in any order."""
    import vllm._C  # noqa: F401
    from vllm import _custom_ops

    tokens, heads, head_size = keys.shape
    cache = torch.zeros(BLOCKS, heads, block_tokens, 2 * head_size, dtype=kv_dtype)
    first = BLOCKS * block_tokens - tokens
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    key_cache, value_cache = cache.view(BLOCKS, heads, 2 * block_tokens, head_size).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(
        keys[order].contiguous(),
        values[order].contiguous(),
        key_cache,
        value_cache,
        (first + order).contiguous(),
        isa,
        kv_cache_dtype=kv_cache_dtype,
    )
    return cache


def check(isa: str, keys: torch.Tensor, values: torch.Tensor, block_tokens: int, want: torch.Tensor, kv: str) -> None:
    """`want`: `[T, H, 2 D]` in the dtype of the cache."""
    cache = written_by_vllm(isa, keys, values, block_tokens, want.dtype, kv)
    pages, ids = PagedLayers([cache, cache]), torch.arange(BLOCKS)
    blocks = torch.zeros(2, BLOCKS, pages.page_bytes, dtype=torch.uint8)
    gather_pages(pages, ids, blocks)
    out = torch.full((2, BLOCKS * block_tokens, *want.shape[1:]), 1, dtype=want.dtype)
    unpack_cpu_blocks(blocks, keys.shape[2], isa, out)
    empty = len(out[0]) - len(want)
    for layer in out:
        assert torch.equal(layer[empty:], want)
        assert not layer[:empty].any()
    again = torch.full_like(blocks, 0xFF)
    pack_cpu_blocks(out, keys.shape[2], isa, again)
    assert torch.equal(again, blocks)


def skip_unless_x86() -> None:
    if platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("vLLM builds vec, vec16 and amx for x86")


@pytest.mark.parametrize(("isa", "dtype", "block_tokens", "head_size"), CASES, ids=str)
def test_tokens_are_where_vllm_has_put_them(isa: str, dtype: torch.dtype, block_tokens: int, head_size: int) -> None:
    skip_unless_x86()
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2 * block_tokens, 3, head_size, generator=generator).to(dtype)
    check(isa, keys, values, block_tokens, torch.cat([keys, values], -1), "auto")


@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_fp8_has_the_same_order(isa: str) -> None:
    skip_unless_x86()
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randint(-15, 16, (2, 64, 3, 64), generator=generator).to(torch.bfloat16)  # exact in e4m3
    want = torch.cat([keys, values], -1).float().to(torch.float8_e4m3fn).view(torch.uint8)
    check(isa, keys, values, 32, want, "fp8_e4m3")


def test_a_wrong_isa_is_seen() -> None:
    skip_unless_x86()
    keys, values = torch.randn(2, 64, 2, 64).to(torch.bfloat16)
    cache = written_by_vllm("vec", keys, values, 32, torch.bfloat16, "auto")
    out = torch.zeros(1, BLOCKS * 32, 2, 128, dtype=torch.bfloat16)
    unpack_cpu_blocks(cache.view(1, BLOCKS, -1), 64, "amx", out)
    assert not torch.equal(out[0, 32:], torch.cat([keys, values], -1))


@pytest.mark.parametrize(("dtype", "block", "head"), [(torch.float32, 128, 64), (torch.bfloat16, 16, 64)])
def test_the_isa_of_this_machine_is_known(dtype: torch.dtype, block: int, head: int) -> None:
    isa = cpu_isa(dtype, block, head)
    skip_unless_x86()
    assert isa in ISAS
    keys, values = torch.randn(2, 2 * block, 2, head).to(dtype)
    check(isa, keys, values, block, torch.cat([keys, values], -1), "auto")


def test_heads_of_half_a_vector_are_vec16() -> None:
    assert cpu_isa(torch.bfloat16, 128, 80) == "vec16"


def test_what_vllm_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedLayoutError, match="cannot run this model"):
        cpu_isa(torch.bfloat16, 128, 80, "fp8")
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.cpu_attn", None)
    with pytest.raises(UnsupportedLayoutError, match="only whole blocks"):
        cpu_isa(torch.bfloat16, 128, 64)
