"""KV blocks as vLLM's CPU attention packs them, to tokens and back.

A block of vLLM's `[B, H, N, 2 * D]` (0.32) is not what its shape says: of each head the first N * D elements are the
keys, the rest the values, in the order that the attention of this processor reads them. Found by writing known tokens
with vLLM's own operator (tests/connector/engines/test_cpu_blocks.py does it again):

    isa           keys                       values                     chosen for
    vec, vec16    [D, N]                     [N, D]                     what is not below
    amx           [N / 16, D / 2, 16, 2]     [D / 16, N / 2, 16, 2]     bf16 with AMX
                  token 16 i + k,            token 2 j + l,
                  channel 2 j + l            channel 16 i + k           of element [i, j, k, l]

Other processors (neon, rvv, vxe, vsx) have their own orders, which are not known here. A block of MLA is plain.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lmcache.errors import KernelArgumentError, UnsupportedLayoutError
from lmcache.kernels.layers import byte_offset, reinterpret

ISAS = ("vec", "vec16", "amx")

Array = np.ndarray[Any, Any]


def unpack_cpu_blocks(blocks: torch.Tensor, head_size: int, isa: str, out: torch.Tensor) -> None:
    """Packed blocks to tokens.

    `blocks`: any dtype, `[L, n, ...]` with the bytes of a block a row, as gather_pages leaves them. `out`: the KV's
    dtype, `[L, T, H, 2 * head_size]` or `[L, n, N, H, 2 * head_size]`, T = n * N: keys beside values. Both on the CPU,
    the rows of a layer contiguous, layers at any stride. Where vLLM has split its blocks into smaller kernel blocks,
    n counts those. Raises UnsupportedLayoutError for an `isa` or dtype whose order is not known, KernelArgumentError
    for the rest.
    """
    _copy(blocks, head_size, isa, out, pack=False)


def pack_cpu_blocks(tokens: torch.Tensor, head_size: int, isa: str, blocks: torch.Tensor) -> None:
    """The reverse of unpack_cpu_blocks: `tokens` to packed `blocks`, as scatter_pages wants them."""
    _copy(blocks, head_size, isa, tokens, pack=True)


def unpack_cpu_blocks_torch(blocks: torch.Tensor, head_size: int, isa: str, out: torch.Tensor) -> None:
    """The definition of unpack_cpu_blocks in torch."""
    keys, values, token_keys, token_values = _definition(blocks, head_size, isa, out)
    token_keys.copy_(keys)
    token_values.copy_(values)


def pack_cpu_blocks_torch(tokens: torch.Tensor, head_size: int, isa: str, blocks: torch.Tensor) -> None:
    """The definition of pack_cpu_blocks in torch."""
    keys, values, token_keys, token_values = _definition(blocks, head_size, isa, tokens)
    keys.copy_(token_keys)
    values.copy_(token_values)


def _definition(
    blocks: torch.Tensor, head_size: int, isa: str, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of both sides, element by element in the same order: keys and values packed, keys and values of tokens."""
    packed_LnHSE, tokens_LnNHC = _words(blocks, head_size, isa, tokens)
    block_tokens = tokens_LnNHC.shape[2]
    keys, values = packed_LnHSE.unbind(3)
    token_keys, token_values = (
        x.transpose(2, 3) for x in (tokens_LnNHC[..., :head_size], tokens_LnNHC[..., head_size:])
    )  # [L, n, H, N, D]
    if isa == "amx":
        return (
            keys.view(*keys.shape[:3], block_tokens // 16, head_size // 2, 16, 2).transpose(4, 5),  # [.., N, D / 2, 2]
            values.view(*keys.shape[:3], head_size // 16, block_tokens // 2, 16, 2).permute(0, 1, 2, 4, 6, 3, 5),
            token_keys.view(*keys.shape[:3], block_tokens // 16, 16, head_size // 2, 2),
            token_values.view(*keys.shape[:3], block_tokens // 2, 2, head_size // 16, 16),
        )
    return (
        keys.view(*keys.shape[:3], head_size, block_tokens).transpose(3, 4),
        values.view(*keys.shape[:3], block_tokens, head_size),
        token_keys,
        token_values,
    )


# Bytes of keys that are turned at a time: source, turned words and result stay in a processor's own cache.
_TILE_BYTES = 128 << 10


def _copy(blocks: torch.Tensor, head_size: int, isa: str, tokens: torch.Tensor, *, pack: bool) -> None:
    packed, wide = _words(blocks, head_size, isa, tokens)
    packed_LnHSE, tokens_LnNHC = packed.numpy(), wide.numpy()
    num_layers, n = tokens_LnNHC.shape[:2]
    if packed_LnHSE.size == 0:
        return
    some = max(1, _TILE_BYTES * n // max(1, packed_LnHSE[0].nbytes // 2))
    for layer in range(num_layers):
        for i in range(0, n, some):
            tile, rows = packed_LnHSE[layer, i : i + some], tokens_LnNHC[layer, i : i + some]
            turn = _turn_amx if isa == "amx" else _turn_vec
            turn(tile[:, :, 0], tile[:, :, 1], rows[..., :head_size], rows[..., head_size:], pack=pack)


def _turn_vec(keys: Array, values: Array, token_keys: Array, token_values: Array, *, pack: bool) -> None:
    """keys, values `[n, H, N * D]` <-> token_keys, token_values `[n, N, H, D]`.

    Keys are turned in words of 8 bytes, i.e. g tokens of one channel, and the words then taken apart: element by
    element it takes twice as long.
    """
    n, block_tokens, heads, head_size = token_keys.shape
    _move(values.reshape(n, heads, block_tokens, head_size).swapaxes(1, 2), token_values, pack=pack)
    g = math.gcd(8 // keys.itemsize, block_tokens)
    word = f"u{g * keys.itemsize}"
    turned = np.empty((n, block_tokens // g, heads, head_size), word)
    packed = keys.reshape(n, heads, head_size, block_tokens).view(word).transpose(0, 3, 1, 2)
    apart = turned.view(keys.dtype).reshape(*turned.shape, g).transpose(0, 1, 4, 2, 3)  # [n, N / g, g, H, D]
    grouped = token_keys.reshape(n, block_tokens // g, g, heads, head_size)
    if pack:
        np.copyto(apart, grouped)
        np.copyto(packed, turned)
    else:
        np.copyto(turned, packed)
        np.copyto(grouped, apart)


def _turn_amx(keys: Array, values: Array, token_keys: Array, token_values: Array, *, pack: bool) -> None:
    """As _turn_vec; keys in words of two channels."""
    n, block_tokens, heads, head_size = token_keys.shape
    word = f"u{2 * keys.itemsize}"
    packed = keys.view(word).reshape(n, heads, block_tokens // 16, head_size // 2, 16).transpose(0, 2, 4, 1, 3)
    _move(packed, token_keys.view(word).reshape(packed.shape), pack=pack)
    packed = values.reshape(n, heads, head_size // 16, block_tokens // 2, 16, 2).transpose(0, 3, 5, 1, 2, 4)
    _move(packed, token_values.reshape(packed.shape), pack=pack)


def _move(packed: Array, tokens: Array, *, pack: bool) -> None:
    if pack:
        np.copyto(packed, tokens)
    else:
        np.copyto(tokens, packed)


def _words(blocks: torch.Tensor, head_size: int, isa: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides as integers: packed `[L, n, H, 2, N * D]`, tokens `[L, n, N, H, 2 * D]`."""
    block_tokens = _check(blocks, head_size, isa, tokens)
    num_layers, n = blocks.shape[:2]
    size, heads, width = tokens.element_size(), tokens.shape[-2], 2 * head_size
    half, row = block_tokens * head_size, block_tokens * heads * width
    steps = (blocks.stride(0) * blocks.element_size() // size, row, 2 * half, half, 1)
    packed = reinterpret(blocks, size, (num_layers, n, heads, 2, half), steps)
    steps = (tokens.stride(0), row, heads * width, width, 1)
    return packed, reinterpret(tokens, size, (num_layers, n, block_tokens, heads, width), steps)


def _check(blocks: torch.Tensor, head_size: int, isa: str, tokens: torch.Tensor) -> int:
    """Tokens of a block."""
    size = tokens.element_size()
    if isa not in ISAS:
        raise UnsupportedLayoutError(f"the order of vLLM's CPU blocks for isa {isa!r} is not known; for {ISAS} it is")
    if size not in (1, 2, 4) or (isa == "amx" and size == 4):
        raise UnsupportedLayoutError(f"the order of vLLM's CPU blocks for isa {isa!r} and {tokens.dtype} is not known")
    for name, tensor in (("blocks", blocks), ("tokens", tokens)):
        if tensor.device.type != "cpu":
            raise KernelArgumentError(f"{name} are on {tensor.device}; vLLM packs blocks on a CPU only")
        if tensor.numel() and not tensor[0].is_contiguous():
            raise KernelArgumentError(f"{name} have strides {tensor.stride()}; those of a layer must be contiguous")
    shapes = f"blocks of shape {tuple(blocks.shape)}, {blocks.dtype}, tokens of {tuple(tokens.shape)}, {tokens.dtype}"
    if tokens.dim() not in (4, 5) or tokens.shape[-1] != 2 * head_size or blocks.dim() < 3:
        raise KernelArgumentError(
            f"{shapes}: blocks must be [L, n, ...], and tokens [L, T, H, {2 * head_size}] or [L, n, N, H, "
            f"{2 * head_size}] for heads of {head_size}"
        )
    n, layer_tokens = blocks.shape[1], math.prod(tokens.shape[1:-2])
    alike = blocks.shape[0] == tokens.shape[0] and (tokens.dim() == 4 or n == tokens.shape[1])
    if not alike or layer_tokens % max(n, 1) or blocks.nbytes != tokens.nbytes:
        raise KernelArgumentError(f"{shapes}: both must hold the same layers, blocks and bytes")
    block_tokens = layer_tokens // max(n, 1)
    if isa == "amx" and (block_tokens % 16 or head_size % 16):
        raise KernelArgumentError(f"isa 'amx' has blocks and heads of multiples of 16, not {block_tokens}, {head_size}")
    if (byte_offset(blocks) | blocks.stride(0) * blocks.element_size()) % size:
        raise KernelArgumentError(f"{shapes}: blocks must begin at a multiple of {size} bytes")
    return block_tokens
