"""vLLM 0.32's KVConnectorBase_V1, delegating to the scheduler half and the worker half.

--kv-transfer-config '{"kv_connector": "LMCacheConnector", "kv_connector_module_path": "lmcache.connector",
                       "kv_role": "kv_both"}'
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmcache.blend.models import adapt
from lmcache.blend.models.vllm import find_model
from lmcache.config import LMCacheConfig, load_config
from lmcache.connector.identity import format as vllm_format
from lmcache.connector.identity.adapters import LoadedAdapters, Stamps, watch_loads
from lmcache.connector.identity.surroundings import why_no_multimodal
from lmcache.connector.identity.weights import Weights
from lmcache.connector.identity.weights_in_use import WeightsInUse
from lmcache.connector.inert import Inert, why_inert
from lmcache.connector.logs import show_logs
from lmcache.connector.lookup.client import LookupClient
from lmcache.connector.lookup.sockets import meeting_name, socket_path
from lmcache.connector.metadata import StepMetadata
from lmcache.connector.scheduler.half import SchedulerHalf
from lmcache.connector.worker import WorkerHalf, describe
from lmcache.engine.layout import chunk_tokens as chunk_size
from lmcache.errors import ConfigError, UnsupportedLayoutError
from lmcache.kernels.codecs.base import RAW, build_codec

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

# Options in kv_connector_extra_config that are vLLM's or name our config file; the rest are ours.
CONFIG_FILE_OPTION = "config_file"
VLLM_OPTIONS = frozenset({"use_native", "use_layerwise"})


def connector_config(vllm_config: VllmConfig) -> LMCacheConfig:
    """Config file, then kv_connector_extra_config on top. ConfigError for a typo."""
    show_logs()
    extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
    path = extra.pop(CONFIG_FILE_OPTION, None)
    if pointless := sorted(name for name in VLLM_OPTIONS if extra.get(name)):
        logger.warning("lmcache: %s in kv_connector_extra_config changes nothing here", " and ".join(pointless))
    return load_config(path, {name: value for name, value in extra.items() if name not in VLLM_OPTIONS})


def make_scheduler(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    name: str,
    *,
    whole_request: bool,
    hears_of_failures: bool = True,
) -> SchedulerHalf | Inert:
    """The scheduler half for this engine. name: its ``meeting_name``."""
    config = connector_config(vllm_config)
    if reason := why_inert(vllm_config, kv_cache_config):
        return Inert(reason)
    vllm_format.check_supported(vllm_config)
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy == "fail":
        logger.warning(
            "lmcache: kv_load_failure_policy is 'fail' (vLLM's default), so a request whose KV cannot be loaded ends "
            "with an error; set it to 'recompute' and vLLM computes the KV instead"
        )
    if not (transfer.is_kv_consumer and transfer.is_kv_producer):
        never = "loaded" if transfer.is_kv_producer else "stored"
        logger.info("lmcache: kv_role is %s, so nothing is %s", transfer.kv_role, never)
    unit = vllm_format.block_unit(kv_cache_config)
    chunk_tokens = chunk_size(config.chunk_tokens, unit)
    workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if config.blend and workers > 1:
        raise ConfigError(
            f"blend: one worker only, this engine has {workers} (tensor_parallel_size {parallel.tensor_parallel_size}, "
            f"pipeline_parallel_size {parallel.pipeline_parallel_size}): leave blend out, and prefixes are reused"
        )
    if workers > 1 and parallel.distributed_executor_backend == "external_launcher":
        # Every rank would have to see the same hits at the same step, and an answer may come a step later to one.
        raise ConfigError(
            "distributed_executor_backend is external_launcher, where every rank has its own scheduler: they could "
            "disagree on what is cached and wait for each other for ever; start vLLM without the connector"
        )
    if why := why_no_multimodal(vllm_config):
        logger.warning("lmcache: requests with more than text are not cached: %s", why)
    client = LookupClient([socket_path(name, rank) for rank in range(workers)])
    # Steps that vLLM may have under way when it hears of a failure, and some more.
    hold = 4 + 2 * parallel.pipeline_parallel_size if hears_of_failures else float("inf")
    return SchedulerHalf(
        config,
        client,
        chunk_tokens=chunk_tokens,
        block_tokens=vllm_format.block_tokens(kv_cache_config),
        whole_request=whole_request,
        hold_steps=hold if workers > 1 else 0,
        loads=transfer.is_kv_consumer,
        stores=transfer.is_kv_producer,
        multimodal=why is None,
        adapters=Stamps(vllm_config.lora_config) if vllm_config.lora_config else None,
    )


def make_worker(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, name: str, kv_caches: Mapping[str, torch.Tensor]
) -> WorkerHalf | None:
    """The worker half for vLLM's registered KV; None where there is nothing for it to do, which the scheduler half
    says. UnsupportedLayoutError when it cannot be moved safely.

    name: its ``meeting_name``.
    """
    config = connector_config(vllm_config)
    if why_inert(vllm_config, kv_cache_config):
        return None
    vllm_format.check_supported(vllm_config)
    codec = build_codec(config.codec)
    # vLLM may hand a layer's KV as a one-element list.
    registered = {name: kv[0] if isinstance(kv, list | tuple) else kv for name, kv in kv_caches.items()}
    cache = vllm_format.paged_cache(kv_cache_config, registered, vllm_config)
    chunk_tokens = chunk_size(config.chunk_tokens, cache.unit)
    if config.chunk_tokens and chunk_tokens != config.chunk_tokens:
        logger.warning(
            "lmcache: chunk_tokens %d is not a multiple of vLLM's block of %d tokens: using %d",
            config.chunk_tokens,
            cache.unit,
            chunk_tokens,
        )
    if cache.unit != vllm_format.block_unit(kv_cache_config):
        raise UnsupportedLayoutError(
            f"pages of {cache.unit} tokens for vLLM blocks of {vllm_format.block_unit(kv_cache_config)}"
        )
    layers = vllm_config.compilation_config.static_forward_context
    weights = Weights(layers)
    format = vllm_format.kv_format(
        vllm_config,
        cache,
        weights=weights.name or "unknown",
        model_id=config.model_id,
        chunk_tokens=chunk_tokens,
        vllm_version=vllm.__version__,
        codec=codec.id if codec else RAW,
    )
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    rank = parallel.rank % ranks
    blended = None
    if config.blend:
        model = adapt(find_model(layers))
        names: Sequence[str] = getattr(model, "kv_layers", ())
        blended = model, names, vllm_config.model_config.max_model_len
    adapters = None
    if vllm_config.lora_config is not None:
        watch_loads()
        adapters = LoadedAdapters(vllm_config.lora_config, several_workers=ranks > 1)
    in_use = WeightsInUse(weights, rank, ranks)
    worker = WorkerHalf(config, socket_path(name, rank), format, cache, blended, in_use, adapters)
    tiers = [str(tier.get("type")) for tier in config.tiers]
    logger.info("%s", describe(format, config, tiers, worker.engine.memory_tokens))
    return worker


class LMCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector that vLLM creates twice: in the scheduler's process and in each worker's."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._scheduler: SchedulerHalf | Inert | None = None
        self._worker: WorkerHalf | None = None
        self._name = meeting_name(vllm_config, role.name)
        if role == KVConnectorRole.SCHEDULER:
            several = len(kv_cache_config.kv_cache_groups) > 1
            self._scheduler = make_scheduler(vllm_config, kv_cache_config, self._name, whole_request=several)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a dropped store is a future miss

    # ---- scheduler side

    @property
    def _planner(self) -> SchedulerHalf | Inert:
        assert self._scheduler is not None, "a scheduler-side method was called on the worker's connector"
        return self._scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._planner.bind_block_pool(gpu_block_pool.hash_block_size)

    def on_new_request(self, request: Request) -> None:
        self._planner.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._planner.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        block_ids = tuple(list(ids) for ids in blocks.get_block_ids())
        self._planner.update_state_after_alloc(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._planner.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._planner.step_ended()
        failed, blocks = connector_output.failed_recving, connector_output.invalid_block_ids
        self._planner.loads_failed(tuple(failed or ()), tuple(blocks or ()))

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._planner.request_finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._planner.request_finished(request)
        return False, None

    def reset_cache(self) -> bool | None:
        return self._planner.reset_cache()

    # ---- worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker = make_worker(self._vllm_config, self._kv_cache_config, self._name, kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin_step(self._step())

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_load(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end in start_load_kv."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers are stored at once, in wait_for_save."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.finish_step(self._step())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        received, failed = self._worker.take_results(finished_req_ids)
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()

    def _step(self) -> StepMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepMetadata)
        return meta
