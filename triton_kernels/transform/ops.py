"""Transform coding of KV: tokens -> small integers that an entropy coder packs well, and back.

For each layer and head, with the profile's mean, matrices and steps (`profile.py`):

    "klt"       y = F (x - mean)            F, B: a transform and its inverse, with the step width folded into them
                x ~ B round(y) + mean       (the KLT of keys as queries weigh them, of values as outputs do)
    "delta"     a = round(anchor / coarse)  one anchor a group of 16 tokens; the others as their difference from it
                y = (x - a coarse) / fine   (CacheGen, Liu et al., SIGCOMM 2024, arXiv:2310.07240)

Symbols are round(y / 2^e) + 128, uint8. The exponent e of a row (one token, one head) is the least, from 0 on, that
keeps every channel within the bounds of its table: no value is ever clipped. A row that is not finite, or needs more
than 2^126, gets the symbols of zeros, 128, and pack_symbols returns False.

    symbols   uint8 [2, l, H, T, D]   keys, then values
    exponents uint8 [2, l, H, T]
    anchors   uint8 [2, l, H, A, D], their exponents uint8 [2, l, H, A]; A = T / 16 rounded up; "delta" only
"""

from __future__ import annotations

import dataclasses
import math

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.copy.pages import check_ids, check_layers, gather_tokens, scatter_tokens
from lmcache.kernels.launch import LazyKernel, runs_kernel
from lmcache.kernels.layers import PagedLayers
from lmcache.kernels.quantise.packing import to_pages_torch
from lmcache.kernels.quantise.scheme import FLOATS
from lmcache.kernels.transform.kernel import _pack_symbols, _unpack_symbols

ANCHOR_GROUP = 16
CENTRE = 128
# Rounding may reach half a step beyond a bound, but for the errors of fp32.
_REACH = 0.499


@dataclasses.dataclass(frozen=True)
class Transform:
    """One side's transform: fp32, contiguous, on the device of the pages. L layers, H heads, D channels.

    mean, bounds: `[L, H, D]`; bounds: the largest |symbol - 128| of each channel's table, 1 to 127.
    forward, inverse: `[L, H, D, D]`, y = x @ forward, x = y @ inverse; `[L, H, 0, 0]` for "delta".
    fine, coarse, coarse_bounds: `[L, H, D]`; `[L, H, 0]` for "klt".
    """

    mean: torch.Tensor
    bounds: torch.Tensor
    forward: torch.Tensor
    inverse: torch.Tensor
    fine: torch.Tensor
    coarse: torch.Tensor
    coarse_bounds: torch.Tensor

    @property
    def is_delta(self) -> bool:
        return self.forward.numel() == 0

    def part(self, layers: torch.Tensor, heads: slice, device: torch.device) -> Transform:
        """The part of some layers (an int64 index) and heads, on `device`."""
        fields = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Transform(*(field[layers][:, heads].contiguous().to(device) for field in fields))


@dataclasses.dataclass(frozen=True)
class Symbols:
    """What one side of a chunk becomes; as in this file's head, but for the leading 2. A is 0 for "klt"."""

    codes: torch.Tensor
    exponents: torch.Tensor
    anchors: torch.Tensor
    anchor_exponents: torch.Tensor

    @classmethod
    def empty(cls, layers: int, heads: int, tokens: int, width: int, *, delta: bool, device: torch.device) -> Symbols:
        groups = -(-tokens // ANCHOR_GROUP) if delta else 0
        shapes = ((tokens, width), (tokens,), (groups, width), (groups,))
        return cls(*(torch.zeros(layers, heads, *shape, dtype=torch.uint8, device=device) for shape in shapes))


def pack_symbols(
    pages: PagedLayers, slots: torch.Tensor, transform: Transform, out: Symbols, first_layer: int = 0
) -> torch.Tensor:
    """The symbols of the tokens at `slots` of layers first_layer..; returns a bool scalar: whether every row has them.

    `pages`: one side, views `[B, H, N, D]` of bf16, fp16 or fp32. `slots`: int64 `[T]`; a negative one has the symbols
    of zeros. `transform`: of exactly those layers. Nothing is synchronised. Raises KernelArgumentError for anything
    else, never for what the pages hold.
    """
    _check(pages, slots, transform, out, first_layer)
    if out.codes.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=pages.device)
    if not runs_kernel(pages.device):
        return pack_symbols_torch(pages, slots, transform, out, first_layer)
    broken = torch.zeros(1, dtype=torch.int32, device=pages.device)
    t = transform
    parameters = (t.mean, t.bounds, t.forward, t.fine, t.coarse, t.coarse_bounds, broken)
    _launch(_pack_symbols, pages, slots, out, parameters, first_layer, delta=t.is_delta)
    return broken[0] == 0


def unpack_symbols(
    pages: PagedLayers, slots: torch.Tensor, transform: Transform, symbols: Symbols, first_layer: int = 0
) -> None:
    """The reverse of pack_symbols: write token t to `slots[t]`, rounded to the dtype of the pages."""
    _check(pages, slots, transform, symbols, first_layer)
    if symbols.codes.numel() == 0:
        return
    if runs_kernel(pages.device):
        parameters = (transform.mean, transform.inverse, transform.fine, transform.coarse)
        _launch(_unpack_symbols, pages, slots, symbols, parameters, first_layer, delta=transform.is_delta)
    else:
        unpack_symbols_torch(pages, slots, transform, symbols, first_layer)


def pack_symbols_torch(
    pages: PagedLayers, slots: torch.Tensor, transform: Transform, out: Symbols, first_layer: int = 0
) -> torch.Tensor:
    """The definition of pack_symbols in torch."""
    num_layers, heads, tokens, width = out.codes.shape
    rows = torch.zeros(num_layers, tokens, heads, width, dtype=pages.dtype, device=pages.device)
    gather_tokens(pages, slots, rows, first_layer)
    x = rows.transpose(1, 2).float()  # [l, H, T, D]
    live = (slots >= 0)[:, None]
    x = torch.where(live, x - transform.mean[:, :, None], 0)
    sound = torch.ones((), dtype=torch.bool, device=pages.device)
    if not transform.is_delta:
        y = x @ transform.forward
    else:
        first = x[:, :, ::ANCHOR_GROUP]  # [l, H, A, D]
        sound = _quantise_torch(
            first * (1 / transform.coarse[:, :, None]), transform.coarse_bounds, out.anchors, out.anchor_exponents
        )
        y = (x - _anchors_torch(transform, out, tokens)) * (1 / transform.fine[:, :, None])
        y = torch.where(live, y, 0)
        y[:, :, ::ANCHOR_GROUP] = 0
    return sound & _quantise_torch(y, transform.bounds, out.codes, out.exponents)


def unpack_symbols_torch(
    pages: PagedLayers, slots: torch.Tensor, transform: Transform, symbols: Symbols, first_layer: int = 0
) -> None:
    """The definition of unpack_symbols in torch."""
    y = (symbols.codes.float() - CENTRE) * torch.exp2(symbols.exponents.float())[..., None]
    if not transform.is_delta:
        x = y @ transform.inverse
    else:
        x = y * transform.fine[:, :, None] + _anchors_torch(transform, symbols, y.shape[2])
    x = x + transform.mean[:, :, None]
    scatter_tokens(pages, slots, to_pages_torch(x.transpose(1, 2), pages.dtype).contiguous(), first_layer)


def _anchors_torch(transform: Transform, symbols: Symbols, tokens: int) -> torch.Tensor:
    """What each token's difference is taken from: `[l, H, T, D]`."""
    values = (symbols.anchors.float() - CENTRE) * torch.exp2(symbols.anchor_exponents.float())[..., None]
    values = values * transform.coarse[:, :, None]
    return values.repeat_interleave(ANCHOR_GROUP, 2)[:, :, :tokens]


def _quantise_torch(
    y: torch.Tensor, bounds: torch.Tensor, codes: torch.Tensor, exponents: torch.Tensor
) -> torch.Tensor:
    """`y` `[l, H, T, D]` as codes and exponents, in place; returns whether all rows have them."""
    most = (y.abs() * (1 / (bounds[:, :, None] + _REACH))).amax(-1)  # [l, H, T]
    sound = most <= 2.0**126
    mantissa, above = torch.frexp(most)  # most = mantissa 2^above, the mantissa from 1/2 up to 1
    e = torch.where(sound, above - (mantissa == 0.5).int(), 0).clamp(min=0)
    codes.copy_(torch.where(sound[..., None], (y * torch.exp2(-e)[..., None]).round() + CENTRE, CENTRE))
    exponents.copy_(e)
    return sound.all()


def _launch(
    kernel: LazyKernel,
    pages: PagedLayers,
    slots: torch.Tensor,
    symbols: Symbols,
    parameters: tuple[torch.Tensor, ...],
    first_layer: int,
    *,
    delta: bool,
) -> None:
    num_layers, heads, tokens, width = symbols.codes.shape
    layer = pages.layers[0]
    block_t = ANCHOR_GROUP if delta else min(_BLOCK_T, max(16, 1 << ((tokens + 1) // 2 - 1).bit_length()))
    of_program = block_t if delta else 2 * block_t
    block_d = max(16, 1 << (width - 1).bit_length())
    strides = [step * layer.element_size() for step in layer.stride()[:3]]
    kernel.launch(
        (-(-tokens // of_program), heads, num_layers),
        pages.device,
        pages.pointers,
        layer,
        slots,
        symbols.codes,
        symbols.exponents,
        symbols.anchors,
        symbols.anchor_exponents,
        *parameters,
        first_layer,
        tokens,
        *layer.stride()[:3],
        BLOCK_TOKENS=pages.block_tokens,
        HEADS=heads,
        D=width,
        DELTA=delta,
        ALIGN=math.gcd(16, pages.address_gcd, *strides),
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        BLOCK_K=min(_BLOCK_K, block_d),
        num_warps=max(1, min(4, block_t * block_d // 1024)),
        num_stages=max(1, min(3, width // _BLOCK_K)),
    )


# A program reads all of a head's matrix, so it takes many tokens: twice 32 of 128 channels are 64 sums a thread.
_BLOCK_T, _BLOCK_K = 32, 32


def _check(pages: PagedLayers, slots: torch.Tensor, transform: Transform, symbols: Symbols, first_layer: int) -> None:
    if pages.dtype not in FLOATS:
        raise KernelArgumentError(f"pages are {pages.dtype}; coded are bfloat16, float16 and float32")
    check_ids(pages, pages.token_units, slots, "slots")
    layers, heads, tokens, width = len(symbols.codes), pages.heads, len(slots), pages.content
    check_layers(pages, first_layer, layers, "codes")
    groups = -(-tokens // ANCHOR_GROUP) if transform.is_delta else 0
    of_symbols = ((tokens, width), (tokens,), (groups, width), (groups,))
    wide, narrow = (0, width) if transform.is_delta else (width, 0)
    of_transform = ((width,), (width,), (wide, wide), (wide, wide), (narrow,), (narrow,), (narrow,))
    for owner, shapes, dtype in ((symbols, of_symbols, torch.uint8), (transform, of_transform, torch.float32)):
        for field, shape in zip(dataclasses.fields(owner), shapes, strict=True):
            given, want = getattr(owner, field.name), (layers, heads, *shape)
            if given.dtype != dtype or tuple(given.shape) != want or not given.is_contiguous():
                raise KernelArgumentError(
                    f"{field.name} is {given.dtype} of shape {tuple(given.shape)}, strides {given.stride()}; it must "
                    f"be a dense {dtype} {list(want)}"
                )
            if given.device != pages.device:
                raise KernelArgumentError(f"{field.name} is on {given.device}; it must be on {pages.device}")
