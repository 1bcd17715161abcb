"""What vLLM's KV is: planes of pages from its cache groups, and the KVFormat that names them."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lmcache.connector.identity.cpu_isa import cpu_isa
from lmcache.connector.identity.surroundings import engine_surroundings
from lmcache.engine.layout import PagedCache, Plane
from lmcache.errors import UnsupportedLayoutError
from lmcache.kernels import PagedLayers
from lmcache.kernels.codecs.base import RAW
from lmcache.kernels.copy.cpu_blocks import ISAS
from lmcache.kernels.sides import Side
from lmcache.keys import KVFormat

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Attention whose KV is a page of independent tokens; state-space and cross-attention caches are something else.
KINDS = {
    "FullAttentionSpec": "full_attention",
    "SlidingWindowSpec": "sliding_window",
    "MLAAttentionSpec": "mla_attention",
}


def layer_specs(kv_cache_config: KVCacheConfig) -> list[list[tuple[str, Any]]]:
    """(layer name, spec) of every group; UnsupportedLayoutError for attention that we cannot move."""
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        per_layer: Mapping[str, Any] = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        specs = [(name, per_layer.get(name, group.kv_cache_spec)) for name in group.layer_names]
        for name, spec in specs:
            if type(spec).__name__ not in KINDS or getattr(spec, "tokens_per_state", 1) != 1:
                raise UnsupportedLayoutError(
                    f"layer {name} keeps its KV as {type(spec).__name__}; lmcache can move {', '.join(KINDS)} with "
                    "one state a token. Start vLLM without the connector for this model."
                )
        groups.append(specs)
    return groups


def block_tokens(kv_cache_config: KVCacheConfig) -> list[int]:
    """Tokens of a block of each group, as the scheduler counts them."""
    return [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]


def block_unit(kv_cache_config: KVCacheConfig) -> int:
    """Tokens that are whole blocks in every group."""
    return math.lcm(*(spec.block_size for group in layer_specs(kv_cache_config) for _, spec in group))


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse, at start, what would make equal tokens have different KV, or KV that we cannot address."""
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedLayoutError(
            "calculate_kv_scales gives every process its own KV scales, so its KV is not reusable: "
            "use a checkpoint with scales, or kv_cache_dtype='auto'"
        )
    if getattr(vllm_config.parallel_config, "nnodes", 1) > 1:
        raise UnsupportedLayoutError("a replica that spans hosts: the scheduler reaches its workers on one host only")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(vllm_config.parallel_config, name, 1) > 1:
            raise UnsupportedLayoutError(f"{name} > 1 spreads a token's KV over ranks: not supported, set it to 1")


def paged_cache(
    kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor], vllm_config: VllmConfig | None = None
) -> PagedCache:
    """The planes of vLLM's registered KV tensors, one page a block of vLLM's block table.

    vllm_config: says which heads of the model these are, and how its CPU attention orders a block; codecs need both.
    """
    planes = []
    for index, specs in enumerate(layer_specs(kv_cache_config)):
        alike: dict[tuple[Any, ...], list[tuple[str, Any]]] = {}
        for name, spec in specs:
            tensor = kv_caches.get(name)
            if tensor is None:
                continue  # the layer shares another layer's KV
            key = (tensor.shape, tensor.stride(), tensor.dtype, type(spec), getattr(spec, "sliding_window", 0))
            alike.setdefault(key, []).append((name, spec))
        for members in alike.values():
            names = tuple(name for name, _ in members)
            spec = members[0][1]
            pages = [_one_page_a_block(name, kv_caches[name], kv_cache_config.num_blocks, spec) for name in names]
            kind = KINDS[type(spec).__name__]
            kernel_tokens = kv_caches[names[0]].shape[2]
            if kernel_tokens != spec.block_size:
                # The order of bytes inside a page depends on how the backend splits it.
                kind += f"/kernel_block={kernel_tokens}"
            if pages[0].shape[1] > 1 and pages[0].stride(2) > pages[0].stride(1):
                kind += "/token_major"  # heads of a token lie together; only matters where pages move verbatim
            window = getattr(spec, "sliding_window", None) or 0
            sides, first = _sides(spec, pages[0]), _first_head(vllm_config)
            planes.append(
                Plane(index, names, PagedLayers(pages), kind, window, sides, first, kernel_tokens=kernel_tokens)
            )
    on_cpu = bool(planes) and planes[0].pages.device.type == "cpu"
    isas = {_isa(vllm_config, plane) for plane in planes if len(plane.sides) == 2} if on_cpu else set()
    return PagedCache(planes, opaque=on_cpu, cpu_isa=isas.pop() if len(isas) == 1 else None)


def _sides(spec: Any, pages: torch.Tensor) -> tuple[Side, ...]:
    """Where keys and values lie in a head's content; () where that is not known."""
    heads, content = pages.shape[1], pages.shape[3]
    if KINDS[type(spec).__name__] == "mla_attention":
        return (Side("value", 0, content, heads),)  # one latent, quantised token by token
    width = getattr(spec, "head_size", 0)
    if not 0 < width < content:
        return ()
    return Side("key", 0, width, heads), Side("value", width, content - width, heads)


def _first_head(vllm_config: VllmConfig | None) -> int:
    """Which of the model's KV heads is this rank's first; ranks share heads where there are more ranks than heads."""
    if vllm_config is None or vllm_config.parallel_config.tensor_parallel_size == 1:
        return 0
    total = vllm_config.model_config.get_total_num_kv_heads()
    return int(_ranks(vllm_config.parallel_config)[0] * total // vllm_config.parallel_config.tensor_parallel_size)


def _isa(vllm_config: VllmConfig | None, plane: Plane) -> str | None:
    """How vLLM's CPU attention orders this plane's blocks; None where that is not known."""
    if vllm_config is None or plane.sides[0].width != plane.sides[1].width:
        return None
    model, cache = vllm_config.model_config, vllm_config.cache_config
    try:
        isa = cpu_isa(model.dtype, plane.kernel_tokens, plane.sides[0].width, str(cache.cache_dtype))
    except UnsupportedLayoutError:
        return None
    return isa if isa in ISAS else None


def _one_page_a_block(name: str, tensor: torch.Tensor, num_blocks: int, spec: Any) -> torch.Tensor:
    """``[B, H, N, C]`` with B = vLLM's blocks; a backend may have split each block into smaller kernel blocks."""
    if tensor.dim() != 4:
        raise UnsupportedLayoutError(
            f"layer {name}: expected vLLM 0.32's [blocks, heads, tokens, content] KV, got {tuple(tensor.shape)}"
        )
    ratio = tensor.shape[0] // num_blocks
    if ratio == 1:
        return tensor
    _, heads, tokens, content = tensor.shape
    dense = tensor.stride() == (heads * tokens * content, tokens * content, content, 1)
    if tensor.shape[0] % num_blocks or tokens * ratio != spec.block_size or not dense:
        raise UnsupportedLayoutError(
            f"layer {name}: {tensor.shape[0]} kernel blocks of {tokens} tokens with strides {tensor.stride()} do not "
            f"make {num_blocks} blocks of {spec.block_size}: set --block-size {tokens}"
        )
    # Kernel block by kernel block, each [H, n, C]: as one page that is [ratio * H, n, C], which only whole-page moves
    # may use. vLLM splits blocks like this on devices whose pages are opaque anyway.
    if tensor.device.type != "cpu":
        raise UnsupportedLayoutError(f"layer {name}: kernel blocks of {tokens} tokens: set --block-size {tokens}")
    return tensor.view(num_blocks, heads, tokens * ratio, content)


def kv_format(
    vllm_config: VllmConfig,
    cache: PagedCache,
    *,
    weights: str,
    model_id: str | None,
    chunk_tokens: int,
    vllm_version: str,
    codec: str = RAW,
) -> KVFormat:
    """Everything about this engine that changes the bytes of a chunk. weights: what names the model's weights."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    described = model.hf_text_config.to_json_string()
    # LongRoPE picks its factors by the longest context that vLLM was started with.
    longest = str(model.max_model_len) if any(name in described for name in ("longrope", '"su"')) else ""
    capability = f"{torch.backends.cpu.get_cpu_capability()}{'+amx' if _has_amx() else ''}"
    opaque = f"vllm-{vllm_version}/{platform.machine()}/{capability}"
    tp_rank, pp_rank = _ranks(parallel)
    return KVFormat(
        model=weights,
        chunk_tokens=chunk_tokens,
        planes=tuple(plane.format() for plane in cache.planes),
        layout=opaque if cache.opaque else "token",
        tp_rank=tp_rank,
        tp_size=parallel.tensor_parallel_size,
        pp_rank=pp_rank,
        pp_size=parallel.pipeline_parallel_size,
        codec=codec,
        extras=(
            ("compute_dtype", str(model.dtype)),
            ("surroundings", engine_surroundings(vllm_config)),
            ("model_id", model_id or ""),
            ("longrope_max_model_len", longest),
            ("kv_cache_dtype", str(vllm_config.cache_config.cache_dtype)),
            ("quantization", str(model.quantization)),
        ),
    )


def _ranks(parallel: Any) -> tuple[int, int]:
    # vLLM numbers a replica's workers tensor-parallel first.
    rank = parallel.rank % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    return rank % parallel.tensor_parallel_size, rank // parallel.tensor_parallel_size


def _has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())
