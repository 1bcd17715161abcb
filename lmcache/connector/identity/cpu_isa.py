"""Which processor's code vLLM's CPU attention runs here, hence the order of elements inside its blocks."""

from __future__ import annotations

import torch

from lmcache.errors import UnsupportedLayoutError


def cpu_isa(dtype: torch.dtype, block_size: int, head_size: int, kv_cache_dtype: str = "auto") -> str:
    """The isa that vLLM chooses on this machine, as lmcache.kernels.copy.cpu_blocks names it.

    ``dtype``: the model's. ``block_size``: tokens of a kernel block. ``kv_cache_dtype``: vLLM's setting. Raises
    UnsupportedLayoutError where vLLM has no such function or cannot run this model at all.
    """
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError as error:
        raise UnsupportedLayoutError(
            f"this vLLM does not say how its CPU attention orders a block ({error}): only whole blocks can be moved"
        ) from error
    try:
        return str(_get_attn_isa(dtype, block_size, head_size, kv_cache_dtype))
    except NotImplementedError as error:
        raise UnsupportedLayoutError(f"vLLM's CPU attention cannot run this model: {error}") from error


def write_cpu_tokens(
    pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, isa: str
) -> None:
    """Tokens into vLLM's CPU blocks, by vLLM's own operator, which packs several times as fast as numpy does.

    ``pages``: ``[B, H, N, 2 D]`` as the attention sees them, written in place. ``keys``, ``values``: ``[T, H, D]``.
    ``slots``: int64 ``[T]``, block * N + offset; negative: that token is not written. ``isa``: as ``cpu_isa`` names it.
    """
    from vllm import _custom_ops

    there = slots >= 0
    if not bool(there.all()):
        keys, values, slots = keys[there], values[there], slots[there]
    blocks, heads, tokens, content = pages.shape
    key_cache, value_cache = pages.view(blocks, heads, 2 * tokens, content // 2).chunk(2, 2)
    _custom_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)
