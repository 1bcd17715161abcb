"""Blocks of vLLM's CPU attention are unpacked and packed as loops over single elements say, and nothing else moves."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lmcache.errors import KernelArgumentError, UnsupportedLayoutError
from lmcache.kernels import PagedLayers, gather_pages, scatter_pages
from lmcache.kernels.copy import cpu_blocks
from lmcache.kernels.copy.cpu_blocks import (
    pack_cpu_blocks,
    pack_cpu_blocks_torch,
    unpack_cpu_blocks,
    unpack_cpu_blocks_torch,
)

pytestmark = pytest.mark.host

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
CASES = [
    ("vec", torch.float32, 32, 64),
    ("vec", torch.bfloat16, 32, 64),
    ("vec", torch.float16, 64, 32),
    ("vec", torch.uint8, 32, 32),
    ("vec16", torch.bfloat16, 16, 80),
    ("vec16", torch.float32, 16, 112),
    ("vec16", torch.bfloat16, 5, 7),
    ("amx", torch.bfloat16, 32, 64),
    ("amx", torch.bfloat16, 128, 32),
    ("amx", torch.uint8, 64, 32),
]
EVERY_CASE = pytest.mark.parametrize(("isa", "dtype", "N", "D"), CASES, ids=lambda value: str(value))


def places(isa: str, N: int, D: int) -> tuple[list[int], list[int]]:
    """Where the key and the value of token t, channel d are in their halves of a packed head: entry t * D + d."""
    keys, values = [], []
    for t in range(N):
        for d in range(D):
            if isa == "amx":
                keys.append(((t // 16 * (D // 2) + d // 2) * 16 + t % 16) * 2 + d % 2)
                values.append(((d // 16 * (N // 2) + t // 2) * 16 + d % 16) * 2 + t % 2)
            else:
                keys.append(d * N + t)
                values.append(t * D + d)
    return keys, values


def random_pair(
    dtype: torch.dtype, L: int, n: int, H: int, N: int, D: int, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed blocks of any bits `[L, n, bytes]`, and their tokens `[L, n, N, H, 2 D]` as integers."""
    integers = INTEGERS[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (L, n, H * N * 2 * D * dtype.itemsize), dtype=torch.uint8, generator=generator)
    halves = blocks.view(integers).view(L, n, H, 2, N * D)
    keys, values = places(isa, N, D)
    assert sorted(keys) == sorted(values) == list(range(N * D))
    tokens = torch.stack([halves[:, :, :, 0][..., keys], halves[:, :, :, 1][..., values]], 3)  # [L, n, H, 2, N * D]
    return blocks, tokens.view(L, n, H, 2, N, D).permute(0, 1, 4, 2, 3, 5).flatten(4)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of ones bits in a buffer with red zones, with `pad` elements after each layer; (tensor, buffer)."""
    row = math.prod(shape[1:])
    buffer = torch.full(((shape[0] * (row + pad) + 128) * dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype)
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return buffer[64:].as_strided(shape, (row + pad, *steps[1:]), 64), buffer


def outside(buffer: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Bytes of the buffer that are no part of `inside`, which must all be 0xFF still; spoils `inside`."""
    inside.view(INTEGERS[inside.element_size()]).fill_(-1 if inside.element_size() > 1 else 255)
    return buffer.view(torch.uint8)


@EVERY_CASE
@pytest.mark.parametrize("pad", [0, 24])
@pytest.mark.parametrize("unpack", [unpack_cpu_blocks, unpack_cpu_blocks_torch])
def test_tokens_come_out_of_blocks(
    unpack: Callable[..., None], pad: int, isa: str, dtype: torch.dtype, N: int, D: int
) -> None:
    for L, n, H in ((2, 3, 2), (1, 1, 1), (3, 9, 3)):
        blocks, tokens = random_pair(dtype, L, n, H, N, D, isa)
        out, buffer = poisoned((L, n, N, H, 2 * D), dtype, pad)
        unpack(blocks, D, isa, out)
        assert torch.equal(out.view(tokens.dtype), tokens)
        assert outside(buffer, out).eq(0xFF).all()
        flat, buffer = poisoned((L, n * N, H, 2 * D), dtype, pad)
        unpack(blocks.view(dtype), D, isa, flat)
        assert torch.equal(flat.view(tokens.dtype), tokens.flatten(1, 2))
        assert outside(buffer, flat).eq(0xFF).all()


@EVERY_CASE
@pytest.mark.parametrize("pad", [0, 24])
@pytest.mark.parametrize("pack", [pack_cpu_blocks, pack_cpu_blocks_torch])
def test_blocks_are_packed_from_tokens(
    pack: Callable[..., None], pad: int, isa: str, dtype: torch.dtype, N: int, D: int
) -> None:
    for L, n, H in ((2, 3, 2), (1, 1, 1), (3, 9, 3)):
        blocks, tokens = random_pair(dtype, L, n, H, N, D, isa)
        packed, buffer = poisoned((L, n, blocks.shape[2]), torch.uint8, 4 * pad)
        pack(tokens.contiguous().view(dtype), D, isa, packed)
        assert torch.equal(packed, blocks)
        assert outside(buffer, packed).eq(0xFF).all()


def test_large_blocks_are_cut_into_tiles_and_small_ones_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in (1, 4096, 1 << 20):
        monkeypatch.setattr(cpu_blocks, "_TILE_BYTES", tile)
        blocks, tokens = random_pair(torch.bfloat16, 2, 7, 2, 32, 32, "vec")
        out = torch.zeros(tokens.shape, dtype=torch.bfloat16)
        unpack_cpu_blocks(blocks, 32, "vec", out)
        assert torch.equal(out.view(torch.int16), tokens)


@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_pages_that_were_gathered_are_unpacked_changed_and_scattered(isa: str) -> None:
    L, B, H, N, D = 2, 5, 2, 32, 32
    cache = torch.randn(L, B, H, N, 2 * D).to(torch.bfloat16)
    before = cache.clone()
    pages, ids = PagedLayers(list(cache)), torch.tensor([3, 0])
    blocks = torch.zeros(L, 2, pages.page_bytes, dtype=torch.uint8)
    gather_pages(pages, ids, blocks)
    tokens = torch.zeros(L, 2 * N, H, 2 * D, dtype=torch.bfloat16)
    unpack_cpu_blocks(blocks, D, isa, tokens)
    keys, values = places(isa, N, D)
    tokens[1, N + 5, 1, 7] = 100.0  # a key of the second block
    tokens[0, 2, 0, D + 3] = 200.0  # a value of the first
    pack_cpu_blocks(tokens, D, isa, blocks)
    scatter_pages(pages, ids, blocks)
    before[1, 0, 1].view(-1)[keys[5 * D + 7]] = 100.0
    before[0, 3, 0].view(-1)[N * D + values[2 * D + 3]] = 200.0
    assert torch.equal(cache.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize(("L", "n"), [(0, 3), (2, 0)])
def test_nothing_is_nothing_to_do(L: int, n: int) -> None:
    blocks, tokens = torch.zeros(L, n, 32 * 2 * 64 * 4, dtype=torch.uint8), torch.zeros(L, n, 32, 2, 64)
    unpack_cpu_blocks(blocks, 32, "vec", tokens)
    pack_cpu_blocks(tokens, 32, "vec", blocks)


@pytest.mark.parametrize(
    ("isa", "dtype"), [("neon", torch.float32), ("AMX", torch.bfloat16), ("amx", torch.float32), ("vec", torch.float64)]
)
def test_unknown_orders_are_refused(isa: str, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedLayoutError, match="is not known"):
        unpack_cpu_blocks(torch.zeros(1, 2, 32 * 128, dtype=dtype), 64, isa, torch.zeros(1, 64, 1, 128, dtype=dtype))


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("blocks", "tokens", "isa", "message"),
    [
        (torch.zeros(2, 3, 4096, device="meta"), torch.zeros(2, 96, 1, 128), "vec", "on meta"),
        (torch.zeros(2, 3, 4096), torch.zeros(2, 96, 1, 128, device="meta"), "vec", "on meta"),
        (torch.zeros(2, 6, 4096)[:, ::2], torch.zeros(2, 96, 1, 128), "vec", "strides"),
        (torch.zeros(2, 3, 4096), torch.zeros(2, 96, 1, 256)[..., ::2], "vec", "strides"),
        (torch.zeros(2, 3, 4096), torch.zeros(2, 96, 2, 64), "vec", "for heads of 64"),
        (torch.zeros(2, 3, 4096), torch.zeros(96, 1, 128), "vec", "for heads of 64"),
        (torch.zeros(2, 12288), torch.zeros(2, 96, 1, 128), "vec", "must be"),
        (torch.zeros(1, 3, 4096), torch.zeros(2, 48, 1, 128), "vec", "the same layers"),
        (torch.zeros(2, 3, 4096), torch.zeros(2, 2, 48, 1, 128), "vec", "the same layers, blocks"),
        (torch.zeros(2, 5, 4096), torch.zeros(2, 96, 1, 128), "vec", "and bytes"),
        (torch.zeros(2, 3, 4096), torch.zeros(2, 96, 1, 128, dtype=BF16), "vec", "and bytes"),
        (torch.zeros(2, 3, 3072, dtype=BF16), torch.zeros(2, 72, 1, 128, dtype=BF16), "amx", "multiples of 16, not 24"),
        (
            torch.zeros(8192 * 3 + 1, dtype=torch.uint8)[1:].view(1, 3, 8192),
            torch.zeros(1, 96, 1, 128, dtype=BF16),
            "vec",
            "begin at a multiple of 2 bytes",
        ),
    ],
)
def test_wrong_arguments_are_refused(blocks: torch.Tensor, tokens: torch.Tensor, isa: str, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        unpack_cpu_blocks(blocks, 64, isa, tokens)
    with pytest.raises(KernelArgumentError, match=message):
        pack_cpu_blocks(tokens, 64, isa, blocks)


def test_the_tables_of_places_differ() -> None:
    assert places("vec", 32, 32)[0] != places("amx", 32, 32)[0]
    assert np.array_equal(places("vec", 32, 32)[0], np.arange(1024).reshape(32, 32).T.reshape(-1))
