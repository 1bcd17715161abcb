"""What vLLM's built-in name ``LMCacheConnectorV1`` imports.

Its wrapper is smaller than the connector API: loads are synchronous, cache groups are one (vLLM switches its hybrid
manager off), blocks become known at the end of a step, and nobody calls shutdown (the worker does it at exit).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from lmcache.connector.inert import Inert
from lmcache.connector.lookup.sockets import meeting_name
from lmcache.connector.metadata import StepMetadata
from lmcache.connector.scheduler.half import SchedulerHalf
from lmcache.connector.vllm import make_scheduler, make_worker
from lmcache.connector.worker import WorkerHalf
from lmcache.errors import UnsupportedLayoutError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class LMCacheConnectorV1Impl:
    """The object behind vLLM's LMCacheConnectorV1."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, parent: KVConnectorBase_V1) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = parent._kv_cache_config
        self._worker: WorkerHalf | None = None
        self._meta = StepMetadata()
        self._name = meeting_name(vllm_config, role.name)
        if role == KVConnectorRole.SCHEDULER:
            if not self._kv_cache_config.kv_cache_groups:
                # vLLM's scheduler asserts one cache group when a request of such a connector ends.
                raise UnsupportedLayoutError(
                    "this model keeps no KV cache, and vLLM's own LMCacheConnectorV1 cannot serve such a model: set "
                    "kv_connector to LMCacheConnector, or leave the connector out"
                )
            self._scheduler: SchedulerHalf | Inert = make_scheduler(
                vllm_config, self._kv_cache_config, self._name, whole_request=False, hears_of_failures=False
            )
            # vLLM's wrapper has no reset of its own; its base class answers for it, and forgets nothing.
            parent.reset_cache = self._scheduler.reset_cache

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)[0]

    def update_state_after_alloc(self, request: Request, num_external_tokens: int) -> None:
        self._scheduler.update_state_after_alloc(request, None, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        return self._scheduler.build_connector_meta(scheduler_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.request_finished(request)
        return False, None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker = make_worker(self._vllm_config, self._kv_cache_config, self._name, kv_caches)

    def bind_connector_metadata(self, meta: StepMetadata) -> None:
        self._meta = meta
        if self._worker is not None:
            self._worker.begin_step(meta)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_load(self._meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end in start_load_kv."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers are stored at once, in wait_for_save."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.finish_step(self._meta)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is not None:
            self._worker.take_results(finished_req_ids)
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def get_kv_events(self) -> list[Any]:
        return []
