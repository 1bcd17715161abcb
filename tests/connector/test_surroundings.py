"""What of vLLM's configuration is in the key: every field of the installed vLLM is on one of two lists."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import ROOT

from lmcache.connector.identity import surroundings as s

# Fields that are in the key because somebody has looked at them; those in neither table are in it until somebody has.
NAMED: dict[str, str] = {
    "VllmConfig": "model_config cache_config parallel_config device_config attention_config kernel_config "
    "speculative_config quant_config compilation_config ec_manager_config additional_config",
    "ModelConfig": "runner convert trust_remote_code hf_config hf_text_config code_revision quantization "
    "quantization_config disable_sliding_window model_class_overrides model_impl multimodal_config",
    "MultiModalConfig": "media_io_kwargs mm_processor_kwargs mm_device_do_normalize mm_encoder_attn_backend "
    "mm_encoder_attn_dtype video_pruning_rate video_pruning_method allow_missing_mm_embeddings",
    "CacheConfig": "cache_dtype sliding_window kv_cache_dtype_skip_layers kv_sharing_fast_prefill swa_bounded_replay",
    "ParallelConfig": "enable_hc_sp all2all_backend worker_cls worker_extension_cls",
    "DeviceConfig": "device_type",
    "AttentionConfig": "backend minimax_m3_msa_decode_backend backend_per_kind flash_attn_version "
    "use_trtllm_attention disable_flashinfer_q_quantization mla_prefill_backend use_prefill_query_quantization "
    "indexer_kv_dtype indexer_sparse_logits hisparse_config sparse_mla_force_mqa",
    "HiSparseConfig": "device_buffer_size eager_host_mirror",
    "KernelConfig": "moe_backend sparse_indexer_topk_backend linear_backend linear_backend_per_quant",
    "CompilationConfig": "inductor_passes",
    "LoRAConfig": "lora_dtype target_modules enable_tower_connector_lora enable_mixed_moe_lora_format "
    "enable_moe_shared_loras",
    "SpeculativeConfig": "method quantization moe_backend attention_backend kv_cache_dtype code_revision "
    "index_share_for_mtp_iteration disable_eagle_block_drop use_heterogeneous_vocab parallel_drafting "
    "draft_model_config dspark_draft_topk",
    "EncoderCacheManagerConfig": "encoder_cache_manager_cls manager_config",
    "QuantizationConfigArgs": "linear moe ignore targets",
    "QuantSpec": "weight activation",
}


def part_classes(kind: Any) -> Iterator[type]:
    """vLLM's config classes that a field's type speaks of."""
    if inspect.isclass(kind) and dataclasses.is_dataclass(kind) and kind.__module__.startswith("vllm.config"):
        yield kind
    for argument in typing.get_args(kind):
        yield from part_classes(argument)


def walk(config_class: type, seen: dict[str, type]) -> dict[str, type]:
    """The config classes that are reached through fields that are in the key."""
    if config_class.__name__ not in seen:
        seen[config_class.__name__] = config_class
        kinds = typing.get_type_hints(config_class)
        for name in s.fields_in_key(config_class):
            for part in part_classes(kinds[name]):
                walk(part, seen)
    return seen


@pytest.fixture(scope="module")
def classes() -> dict[str, type]:
    from vllm.config import LoRAConfig, VllmConfig

    return walk(LoRAConfig, walk(VllmConfig, {}))


def listed(name: str) -> list[str]:
    return [*NAMED.get(name, "").split(), *" ".join(s.HARMLESS.get(name, {}).values()).split()]


def test_every_field_of_vllms_configuration_is_on_exactly_one_list(classes: dict[str, type]) -> None:
    assert len(classes) > 10
    for name, config_class in classes.items():
        fields = [field.name for field in dataclasses.fields(config_class)]
        assert sorted(listed(name)) == sorted(fields), f"{name}: decide whether these can change KV"
    assert {*NAMED, *s.HARMLESS} == set(classes), "a list of a class that vLLM does not have"
    assert {reason for reasons in s.HARMLESS.values() for reason in reasons} <= set(s.REASONS)


def markdown() -> str:
    """The tables of docs/identity.md."""
    lines = ["| class | in the key |", "|---|---|"]
    lines += [f"| `{name}` | {_quoted(fields)} |" for name, fields in NAMED.items()]
    lines += ["", "| class | cannot change KV, because | fields |", "|---|---|---|"]
    for name, reasons in s.HARMLESS.items():
        lines += [f"| `{name}` | {s.REASONS[reason]} | {_quoted(fields)} |" for reason, fields in reasons.items()]
    return "\n".join(lines)


def _quoted(names: str) -> str:
    return " ".join(f"`{name}`" for name in names.split())


def test_the_page_shows_the_lists() -> None:
    page = (ROOT / "docs" / "identity.md").read_text()
    assert markdown() in page, "put the output of this file's markdown() into docs/identity.md"


Make = Callable[..., Any]


@pytest.fixture(scope="module")
def engine_config(tiny_model: Callable[[str], Path]) -> Make:
    """vLLM's configuration as an engine would get it."""
    from vllm.engine.arg_utils import EngineArgs

    def make(model: Path | None = None, **options: Any) -> Any:
        values = {
            "model": str(model or tiny_model("llama")),
            "dtype": "float32",
            "skip_tokenizer_init": True,
            **options,
        }
        return EngineArgs(**values).create_engine_config()

    return make


def test_replicas_that_differ_in_size_place_and_schedule_share(
    engine_config: Make, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = s.engine_surroundings(engine_config())
    for options in (
        {},
        {"gpu_memory_utilization": 0.2, "max_num_seqs": 3, "max_num_batched_tokens": 4096, "block_size": 64},
        {"master_port": 12345, "data_parallel_rpc_port": 4711, "seed": 7, "served_model_name": "other"},
        {"enforce_eager": True, "enable_prefix_caching": False, "async_scheduling": False, "max_model_len": 512},
        {"disable_log_stats": True, "max_logprobs": 5, "tokenizer": str(tmp_path), "load_format": "safetensors"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        {"enable_lora": True, "max_loras": 2},
    ):
        assert s.engine_surroundings(engine_config(**options)) == plain, options
    copy = Path(shutil.copytree(tiny_model("llama"), tmp_path / "elsewhere"))
    assert s.engine_surroundings(engine_config(copy)) == plain


def test_what_changes_kv_is_another_name(engine_config: Make) -> None:
    others = [
        {},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}},
        {"hf_overrides": {"rms_norm_eps": 1e-3}},
        {"attention_config": {"use_prefill_query_quantization": True}},
        {"kernel_config": {"moe_backend": "triton"}},
        {"worker_extension_cls": "some.Extension"},
        {"additional_config": {"a": 1}},
        {"model_impl": "vllm"},
    ]
    names = [s.engine_surroundings(engine_config(**options)) for options in others]
    assert len(set(names)) == len(names)


def test_a_process_of_its_own_gives_the_same_name(engine_config: Make, tiny_model: Callable[[str], Path]) -> None:
    import subprocess
    import sys

    script = (
        "import sys; from vllm.engine.arg_utils import EngineArgs;"
        "from lmcache.connector.identity import surroundings as s;"
        "print(s.engine_surroundings(EngineArgs(model=sys.argv[1], dtype='float32', skip_tokenizer_init=True)"
        ".create_engine_config()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model("llama"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == s.engine_surroundings(engine_config())


def test_a_field_that_nobody_has_looked_at_is_in_the_key() -> None:
    def made(value: int) -> Any:
        return dataclasses.make_dataclass("CacheConfig", ["cache_dtype", "block_size", "invented"])("auto", 16, value)

    assert s.surroundings(made(1)) != s.surroundings(made(2))
    assert "invented" in s.fields_in_key(type(made(1)))
    assert "block_size" not in s.fields_in_key(type(made(1)))


class Thing:
    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


def test_values_are_named_by_content_not_by_place() -> None:
    import torch

    def twice(make: Callable[[], Any]) -> bool:
        return s.surroundings({"of": make()}) == s.surroundings({"of": make()})

    assert twice(lambda: Thing(a=1, b=Thing(c={"x", "y"}), _private=object()))
    assert twice(lambda: {"b": 1, "a": [1.5, None, torch.float32, Path("/here")]})
    assert s.surroundings(Path("/a")) == s.surroundings(Path("/b"))
    loop = Thing(a=1)
    loop.itself = loop  # type: ignore[attr-defined]
    assert s.surroundings(loop)
    different = [1, True, 1.0, "1", [1], (1, 2), {"a": 1}, {1}, None, b"1", Thing(a=1), Thing(a=2), torch.ones(1)]
    assert len({s.surroundings({"of": value}) for value in different}) == len(different)
    assert s.surroundings({"a": 1, "b": 2}) == s.surroundings({"b": 2, "a": 1})


def model(folder: Path, *, images: bool = True, trust: bool = False) -> Any:
    return SimpleNamespace(
        model=str(folder),
        revision=None,
        trust_remote_code=trust,
        multimodal_config=SimpleNamespace(mm_encoder_fp8_scale_path=None) if images else None,
    )


def test_files_that_say_how_an_image_is_read_are_known_by_content(tmp_path: Path) -> None:
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}))
    (tmp_path / "modeling_own.py").write_text("a = 1")
    first, text, own = s.processor_files(model(tmp_path)), "", s.processor_files(model(tmp_path, trust=True))
    assert s.processor_files(model(tmp_path, images=False)) == text
    file.write_text(json.dumps({"image_processor": {"image_mean": [0.1, 0.2, 0.4]}}))
    assert s.processor_files(model(tmp_path)) != first
    file.write_text(json.dumps({"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}))
    copy = Path(shutil.copytree(tmp_path, tmp_path / "copy"))
    assert s.processor_files(model(copy)) == first
    (tmp_path / "modeling_own.py").write_text("a = 2")
    assert s.processor_files(model(tmp_path)) == first
    assert s.processor_files(model(tmp_path, trust=True)) != own


def test_embeddings_of_unknown_origin_are_not_cached() -> None:
    def engine(ec: object = None, dtype: str | None = None, scales: str | None = None) -> Any:
        images = SimpleNamespace(mm_encoder_attn_dtype=dtype, mm_encoder_fp8_scale_path=scales)
        return SimpleNamespace(ec_transfer_config=ec, model_config=SimpleNamespace(multimodal_config=images))

    assert s.why_no_multimodal(engine()) is None
    assert "another process" in (s.why_no_multimodal(engine(ec=object())) or "")
    assert "seen before" in (s.why_no_multimodal(engine(dtype="fp8")) or "")
    assert s.why_no_multimodal(engine(dtype="fp8", scales="/some.json")) is None


def test_another_layer_of_the_vision_tower_and_another_mean_are_other_names(
    engine_config: Make, tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig
    from vllm.config import MultiModalConfig

    files = tmp_path / "processor_config.json"

    def name(mean: float = 0.1, kwargs: Any = None, images: int = 1, epsilon: float = 1e-5, **described: Any) -> str:
        config = engine_config()
        # vLLM's own vision models cannot be imported without torchvision, so their description is put in by hand.
        vision = CLIPVisionConfig(num_hidden_layers=2, layer_norm_eps=epsilon)
        config.model_config.hf_config = LlavaConfig(vision_config=vision, **described)
        config.model_config.multimodal_config = MultiModalConfig(
            mm_processor_kwargs=kwargs, limit_per_prompt={"image": images}
        )
        config.model_config.model = str(tmp_path)
        files.write_text(json.dumps({"image_processor": {"image_mean": [mean] * 3}}))
        return s.engine_surroundings(config)

    plain = name(vision_feature_layer=-1)
    assert name(vision_feature_layer=-1, images=2) == plain
    others = [
        name(vision_feature_layer=-2),
        name(vision_feature_layer=-1, epsilon=0.5),
        name(vision_feature_layer=-1, mean=0.2),
        name(vision_feature_layer=-1, kwargs={"do_resize": False}),
    ]
    assert len({plain, *others}) == 5
