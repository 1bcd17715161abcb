"""Everything in vLLM's configuration that can change KV, by a list of what cannot.

A field of vLLM's config classes is hashed into the key unless HARMLESS names it with a reason; one that a newer vLLM
brings is hashed until somebody has looked at it, and a test that walks the installed vLLM's classes asks for that.
Values are hashed by content and in a fixed order: no object ids, no paths, the same on every host.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

REASONS = {
    "weights": "says where weights come from; they are named by their content",
    "format": "in the key by another way (planes, ranks, layout, dtypes, hf_config), or made of what is",
    "request": "named with each request that it concerns",
    "input": "makes token ids, which are the key",
    "output": "acts on logits, samples, text or pooled vectors, behind the last layer",
    "when": "decides when, where, how many at once or out of which memory",
    "rounding": "another kernel or another split of the same sum: differs as two batches of one engine differ",
    "report": "logs, metrics, profiles, events",
    "refused": "an engine that uses it does not start with us, or is not cached",
}

# What is not here is in the key. Fields that somebody has looked at and left in it: NAMED in test_surroundings.py.
HARMLESS: dict[str, dict[str, str]] = {
    "VllmConfig": {
        "request": "lora_config",
        "output": "watermark_config structured_outputs_config reasoning_config",
        "when": "scheduler_config offload_config engram_config instance_id shutdown_timeout kv_transfer_config",
        "rounding": "optimization_level performance_mode",
        "report": "aux_output_config observability_config logging_config profiler_config kv_events_config",
        "refused": "mamba_config diffusion_config ec_transfer_config",
        "weights": "load_config weight_transfer_config",
    },
    "ModelConfig": {
        "weights": "model model_weights revision hf_token seed word_embeddings_untied_by_checkpoint "
        "allow_deprecated_quantization",
        "format": "dtype max_model_len hf_overrides hf_config_path config_format is_submodel_config",
        "request": "allowed_local_media_path allowed_media_domains",
        "refused": "enable_prompt_embeds",
        "input": "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init io_processor_plugin",
        "output": "return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel enable_trace_replay "
        "served_model_name generation_config override_generation_config logits_processors pooler_config",
        "when": "spec_target_max_model_len enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend "
        "sleep_mode_offload_cudagraph enable_nccl_comm_suspend enable_cumem_allocator renderer_num_workers",
        "rounding": "enforce_eager disable_cascade_attn",
    },
    "MultiModalConfig": {
        "request": "limit_per_prompt enable_mm_embeds mm_hasher_algorithm",
        "input": "interleave_mm_strings",
        "format": "mm_encoder_fp8_scale_path",
        "when": "language_model_only mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb "
        "skip_mm_profiling mm_tensor_ipc mm_ipc_gpu_memory_gb mm_encoder_fp8_scale_save_path "
        "mm_encoder_fp8_scale_save_margin",
        "rounding": "mm_encoder_tp_mode",
        "refused": "mm_encoder_only",
    },
    "CacheConfig": {
        "format": "block_size user_specified_block_size kv_cache_layout effective_attention_block_size "
        "_block_size_resolved",
        "when": "prefix_match_unit gpu_memory_utilization num_gpu_blocks_override enable_prefix_caching "
        "prefix_caching_hash_algo prefix_cache_retention_interval num_gpu_blocks num_cpu_blocks kv_cache_size_tokens "
        "kv_cache_max_concurrency hash_block_size cache_hit_alignment_tokens kv_cache_memory_bytes kv_offloading_size "
        "kv_offloading_backend skip_page_size_padded",
        "refused": "is_attention_free mamba_page_size_padded mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype "
        "mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm use_kda_recoverssm",
    },
    "ParallelConfig": {
        "format": "pipeline_parallel_size tensor_parallel_size world_size rank is_moe_model",
        "refused": "prefill_context_parallel_size decode_context_parallel_size dcp_kv_cache_interleave_size "
        "dcp_comm_backend dcp_q_replicate cp_kv_cache_interleave_size _allow_auto_resolve_cp_interleave_size nnodes",
        "when": "data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local "
        "data_parallel_master_ip data_parallel_rpc_port dp_sync_interval data_parallel_master_port "
        "data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb enable_batch_sharded_sampling "
        "enable_ep_weight_filter max_parallel_loading_workers enable_shm_tensor_arena enable_elastic_ep "
        "elastic_ep_max_dp_size disable_nccl_for_dp_synchronization ray_workers_use_nsight ray_runtime_env "
        "placement_group distributed_executor_backend master_addr master_port node_rank numa_bind numa_bind_nodes "
        "numa_bind_cpus assigned_physical_gpu_ids distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "_data_parallel_master_port_list _coord_store_port data_parallel_index _api_process_count _api_process_rank "
        "enable_fault_tolerance fault_tolerance_config",
        "rounding": "enable_expert_parallel enable_eplb eplb_config expert_placement_strategy "
        "disable_custom_all_reduce enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold",
    },
    "DeviceConfig": {"when": "device"},
    "AttentionConfig": {
        "rounding": "flash_attn_max_num_splits_for_cuda_graph tokenspeed_mla_min_split_kv "
        "tq_max_kv_splits_for_cuda_graph flex_attn_block_m flex_attn_block_n flex_attn_q_block_size "
        "flex_attn_kv_block_size",
        "when": "sparse_mla_prefill_workspace_factor",
        "refused": "use_non_causal",
    },
    "KernelConfig": {
        "rounding": "ir_op_priority enable_flashinfer_autotune enable_rocm_segmented_attn_autotune",
        "when": "enable_cutedsl_warmup enable_jit_warmup",
    },
    "CompilationConfig": {
        "rounding": "mode backend custom_ops ir_enable_torch_wrap splitting_ops compile_mm_encoder "
        "cudagraph_mm_encoder compile_sizes compile_ranges_endpoints inductor_compile_config "
        "use_inductor_graph_partition pass_config dynamic_shapes_config enabled_custom_ops disabled_custom_ops",
        "when": "cache_dir local_cache_dir compile_cache_save_format encoder_cudagraph_token_budgets "
        "encoder_cudagraph_max_vision_items_per_batch encoder_cudagraph_max_frames_per_batch "
        "cudagraph_decoder_replay decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold "
        "cudagraph_mode cudagraph_num_of_warmups cudagraph_capture_sizes cudagraph_copy_inputs "
        "cudagraph_specialize_lora max_cudagraph_capture_size fast_moe_cold_start",
        "report": "debug_dump_path traced_files compilation_time encoder_compilation_time",
        "format": "static_forward_context static_all_moe_layers",
    },
    "LoRAConfig": {
        "request": "default_mm_loras",
        "when": "max_lora_rank max_loras max_cpu_loras specialize_active_lora",
        "rounding": "fully_sharded_loras",
        "output": "max_lora_cls_labels",
    },
    "SpeculativeConfig": {
        "weights": "model revision draft_load_config",
        "format": "target_model_config target_parallel_config max_model_len",
        "when": "num_speculative_tokens draft_tensor_parallel_size tensor_parallel_size draft_parallel_config "
        "num_speculative_tokens_per_batch_size disable_padded_drafter_batch prompt_lookup_max prompt_lookup_min "
        "suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor "
        "suffix_decoding_min_token_prob",
        "rounding": "enforce_eager use_local_argmax_reduction",
        "output": "rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length "
        "enable_adaptive_verification draft_sample_method",
    },
}

# Drafts that are looked up, not computed by a model: they keep no KV.
_WITHOUT_A_MODEL = frozenset({"ngram", "ngram_gpu", "suffix"})
# Of a model's own description: where it was found, and who wrote the file.
_ABOUT_THE_FILE = frozenset({"transformers_version", "vllm_version"})


def surroundings(config: object) -> str:
    """A digest of all of ``config`` (vLLM's, or a part of it) that can change KV, the same in every process."""
    text = json.dumps(_stable(config, ()), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fields_in_key(config_class: type) -> list[str]:
    """Names of the fields of a vLLM config class that `surroundings` hashes."""
    harmless = {name for names in HARMLESS.get(config_class.__name__, {}).values() for name in names.split()}
    return [each.name for each in dataclasses.fields(config_class) if each.name not in harmless]


def processor_files(model: ModelConfig) -> str:
    """A digest of the files that say how images, sounds and films become what the model sees, and of its own code.

    Empty for a model that reads text only with vLLM's code.
    """
    patterns = ["*processor*.json"] if model.multimodal_config is not None else []
    patterns += ["*.py"] if model.trust_remote_code else []
    if not patterns:
        return ""
    folder = _model_folder(model)
    files = {file for pattern in patterns for file in folder.glob(pattern)} if folder else set()
    if scales := getattr(model.multimodal_config, "mm_encoder_fp8_scale_path", None):
        files.add(pathlib.Path(scales))
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files, key=lambda each: each.name):
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def why_no_multimodal(vllm_config: VllmConfig) -> str | None:
    """Why nothing is known of how this engine's images and sounds become embeddings; None where it is known."""
    if vllm_config.ec_transfer_config is not None:
        return "embeddings are computed by another process (ec_transfer_config), with weights that are not known here"
    described = vllm_config.model_config.multimodal_config
    if described and described.mm_encoder_attn_dtype and not described.mm_encoder_fp8_scale_path:
        return "the encoder's scales follow what it has seen before (mm_encoder_attn_dtype without a scale file)"
    return None


def engine_surroundings(vllm_config: VllmConfig) -> str:
    """What `kv_format` names besides weights, planes and ranks."""
    return f"{surroundings(vllm_config)}/{processor_files(vllm_config.model_config)}"


def _model_folder(model: ModelConfig) -> pathlib.Path | None:
    local = pathlib.Path(model.model)
    if local.exists():
        return local if local.is_dir() else local.parent
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    except (ImportError, ValueError):
        return None
    return pathlib.Path(config).parent if isinstance(config, str) else None


def _stable(value: Any, seen: tuple[int, ...]) -> Any:
    """``value`` as JSON, by content. seen: ids of the objects around it, so that a circle ends."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if id(value) in seen:
        return {"again": type(value).__qualname__}
    seen = (*seen, id(value))
    if isinstance(value, Mapping):
        return {"map": sorted([json.dumps(_stable(k, seen)), _stable(v, seen)] for k, v in value.items())}
    if isinstance(value, Set):
        return {"set": sorted(json.dumps(_stable(each, seen), sort_keys=True) for each in value)}
    if isinstance(value, Sequence):
        return [_stable(each, seen) for each in value] if not isinstance(value, bytes) else {"bytes": value.hex()}
    if isinstance(value, enum.Enum):
        return {"enum": f"{type(value).__qualname__}.{value.name}"}
    if isinstance(value, torch.dtype | torch.device):
        return {"torch": str(value)}
    if isinstance(value, pathlib.PurePath):
        return {"path": ""}  # where something lies says nothing about it
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return {"code": f"{value.__module__}.{value.__qualname__}"}
    return {"object": type(value).__qualname__, "of": dict(_parts(value, seen))}


def _parts(value: Any, seen: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield "tensor", [list(value.shape), hashlib.blake2b(raw, digest_size=16).hexdigest()]
    elif _is_description(value):
        yield "described", _stable(_described(value.to_dict()), seen)
    elif dataclasses.is_dataclass(value):
        for name in fields_in_key(type(value)):
            part = getattr(value, name, None)
            if name == "speculative_config" and getattr(part, "method", None) in _WITHOUT_A_MODEL:
                part = None
            yield name, _stable(part, seen)
    else:
        for name, part in sorted(getattr(value, "__dict__", {}).items()):
            if not name.startswith("_"):
                yield name, _stable(part, seen)


def _is_description(value: Any) -> bool:
    """Whether this is a model's config as transformers keeps it."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _described(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _described(part)
            for name, part in value.items()
            if not str(name).startswith("_") and name not in _ABOUT_THE_FILE
        }
    return [_described(part) for part in value] if isinstance(value, list | tuple) else value
