"""Keys and values of an engine's KV cache as token-wise views, whatever the order of its dimensions.

A *view* is `[B, H, N, D]`: blocks, heads, tokens a block, channels of a head; nothing is copied. B blocks, N tokens a
block, H heads, D channels, T tokens (B * N), R the latent of multi-head latent attention (MLA), `KV` keys then values:

    name     tensor                     who keeps it so
    "BHNC"   [B, H, N, 2 * D]           vLLM since 0.32, in each of its orders of dimensions: strides may be any
    "KVBNHD" [2, B, N, H, D]            vLLM before, FlashAttention
    "BKVNHD" [B, 2, N, H, D]            vLLM before, Triton and FlashInfer; FlashInfer's NHD. Strides may be any
    "BKVHND" [B, 2, H, N, D]            FlashInfer's HND
    "BNHD"   two of [B, N, H, D]        FlashAttention's own paged cache
    "THD"    two of [T, H, D]           SGLang: one tensor of keys and one of values; `page_tokens` says N
    "B1NR"   [B, 1, N, R]               MLA, vLLM since 0.32
    "BNR"    [B, N, R]                  MLA, vLLM before
    "T1R"    [T, 1, R]                  MLA, SGLang; `page_tokens` says N

An MLA cache has no values: its one latent serves as both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache.errors import KernelArgumentError, UnsupportedLayoutError
from lmcache.kernels.layers import PagedLayers

# What one layer of a cache is: a tensor, or one of keys and one of values.
LayerKV = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# Layout -> (tensors a layer, dimensions of each).
LAYOUTS = {
    "BHNC": (1, "[B, H, N, 2 * D]"),
    "KVBNHD": (1, "[2, B, N, H, D]"),
    "BKVNHD": (1, "[B, 2, N, H, D]"),
    "BKVHND": (1, "[B, 2, H, N, D]"),
    "BNHD": (2, "[B, N, H, D]"),
    "THD": (2, "[T, H, D]"),
    "B1NR": (1, "[B, 1, N, R]"),
    "BNR": (1, "[B, N, R]"),
    "T1R": (1, "[T, 1, R]"),
}


def kv_views(layer: LayerKV, layout: str, page_tokens: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The keys and the values of one layer as views `[B, H, N, D]`; MLA has `[B, 1, N, R]` and no values.

    `layout`: a name of the table above. `page_tokens`: N, where the layout does not say it. Raises
    UnsupportedLayoutError for an unknown name, KernelArgumentError for tensors that are not what the name says.
    """
    tensors = _check(layer, layout, page_tokens)
    first = tensors[0]
    if layout == "BHNC":
        width = first.shape[3] // 2
        return first[..., :width], first[..., width:]
    if layout == "KVBNHD":
        return first[0].transpose(1, 2), first[1].transpose(1, 2)
    if layout == "BKVNHD":
        return first[:, 0].transpose(1, 2), first[:, 1].transpose(1, 2)
    if layout == "BKVHND":
        return first[:, 0], first[:, 1]
    if layout == "B1NR":
        return first, None
    if layout == "BNR":
        return first[:, None], None
    if layout != "BNHD":
        tensors = tuple(tensor.view(-1, page_tokens, *tensor.shape[1:]) for tensor in tensors)
    views = [tensor.transpose(1, 2) for tensor in tensors]
    return views[0], views[1] if len(views) == 2 else None


def kv_layers(layers: Sequence[LayerKV], layout: str, page_tokens: int = 1) -> PagedLayers:
    """The keys and values of all layers of a cache group as one plane, in the order K0, V0, K1, V1, ...

    A chunk of it is `[2 * L, T, H, D]`, which is `[L, 2, T, H, D]`: the same bytes whatever the engine's layout, so one
    engine may read what another one wrote. MLA: `[L, T, 1, R]`. Layer l is entries 2 l and 2 l + 1 (MLA: l), hence
    first_layer=2 * l for copies that begin there. Raises what kv_views and PagedLayers raise.
    """
    pairs = [kv_views(layer, layout, page_tokens) for layer in layers]
    return PagedLayers([view for pair in pairs for view in pair if view is not None])


def key_layers(layers: Sequence[LayerKV], layout: str, page_tokens: int = 1) -> PagedLayers:
    """The keys alone: a chunk is `[L, T, H, D]`."""
    return PagedLayers([kv_views(layer, layout, page_tokens)[0] for layer in layers])


def value_layers(layers: Sequence[LayerKV], layout: str, page_tokens: int = 1) -> PagedLayers:
    """The values alone. Raises KernelArgumentError for MLA, which has none."""
    views = [kv_views(layer, layout, page_tokens)[1] for layer in layers]
    values = [view for view in views if view is not None]
    if len(values) < len(views):
        raise KernelArgumentError(f"layout {layout!r} has no values: the latent of MLA is all there is")
    return PagedLayers(values)


def _check(layer: LayerKV, layout: str, page_tokens: int) -> tuple[torch.Tensor, ...]:
    if layout not in LAYOUTS:
        known = ", ".join(f"{name} {shape}" for name, (_, shape) in LAYOUTS.items())
        raise UnsupportedLayoutError(f"KV layout {layout!r} is unknown; the known ones are {known}")
    tensors = layer if isinstance(layer, tuple) else (layer,)
    number, shape = LAYOUTS[layout]
    wanted = [part.strip() for part in shape.strip("[]").split(",")]
    given = " and ".join(str(list(tensor.shape)) for tensor in tensors)
    fits = len(tensors) == number and all(tensor.dim() == len(wanted) for tensor in tensors)
    fits = fits and all(
        tensor.shape[i] == int(size) for tensor in tensors for i, size in enumerate(wanted) if size.isdigit()
    )
    fits = fits and not (layout == "BHNC" and tensors[0].shape[3] % 2)
    if not fits or len({tensor.shape for tensor in tensors}) > 1:
        what = f"{shape}" if number == 1 else f"a tuple of keys and values, each {shape}"
        raise KernelArgumentError(f"layout {layout!r} needs {what}; {given} was given")
    if "T" in wanted and (page_tokens < 1 or tensors[0].shape[0] % page_tokens):
        raise KernelArgumentError(
            f"layout {layout!r}: {tensors[0].shape[0]} tokens are no whole number of pages of page_tokens={page_tokens}"
        )
    return tensors
