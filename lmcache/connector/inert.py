"""Engines whose KV cannot be reused: the connector starts with them, logs the reason once, and does nothing."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lmcache.connector.metadata import BlockIds, StepMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


def why_inert(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """Why no token of this engine may be skipped, or None where the cache can work.

    If vLLM has switched prefix caching off because of the model, loading a prefix would end the engine (a pooler that
    needs every token's hidden state) or give wrong KV (KV that depends on later tokens). If the user or the platform
    has switched it off, loaded KV is as good as computed KV, and the connector works.
    """
    model = vllm_config.model_config
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    specs += [each for spec in specs for each in getattr(spec, "kv_cache_specs", {}).values()]
    if not specs:
        return "this model keeps no KV cache"
    if vllm_config.is_mm_encoder_only:
        return "this engine runs the multimodal encoder only"
    if not model.is_prefix_caching_supported:
        pooler = model.pooler_config
        how = f", {pooler.seq_pooling_type or pooler.tok_pooling_type} pooling" if pooler else ""
        return f"vLLM reuses no prefix with this model ({model.attn_type} attention{how})"
    if model.runner_type == "pooling" and not vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off for this pooling model"
    if any(getattr(spec, "non_causal", False) for spec in specs) or vllm_config.attention_config.use_non_causal:
        return "layers of this model attend to later tokens, so the KV of a prefix depends on what follows it"
    if vllm_config.diffusion_config is not None or model.rswa_window:
        return "this model's KV of a token depends on how far the generation is"
    return None


class Inert:
    """The scheduler half that promises and plans nothing."""

    def __init__(self, reason: str) -> None:
        logger.warning("lmcache: nothing is cached: %s", reason)

    def bind_block_pool(self, hash_tokens: int) -> None:
        """No block is filled."""

    def on_new_request(self, request: Request) -> None:
        """Nothing is looked up."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Request, block_ids: BlockIds | None, num_external_tokens: int) -> None:
        """Nothing was promised."""

    def build_connector_meta(self, output: SchedulerOutput) -> StepMetadata:
        return StepMetadata()

    def loads_failed(self, request_ids: Sequence[str], block_ids: Collection[int] = ()) -> None:
        """Nothing is loaded."""

    def step_ended(self) -> None:
        """Nobody waits for the cache."""

    def request_finished(self, request: Request) -> None:
        """Nothing is known of it."""

    def reset_cache(self) -> bool:
        return True  # there is nothing to forget

    def shutdown(self) -> None:
        """Nothing is held."""
