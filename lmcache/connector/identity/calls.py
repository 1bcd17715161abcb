"""Tells of the calls that vLLM's executors make on this process's worker, beside the steps of the model.

Weights change through such calls: ``apply_model``, ``reload_weights``, ``update_weights``, ``sleep``, ``wake_up``, or
any method or function that a user runs with ``collective_rpc``. vLLM does not tell a connector of them, so what its
executors hand calls to workers with is wrapped.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

# Calls that leave the weights alone. Whatever is not named here may have changed them.
HARMLESS = frozenset(
    {
        "add_lora",
        "check_health",
        "compute_weight_checksums",
        "execute_dummy_batch",
        "execute_model",
        "get_cache_block_size_bytes",
        "get_kv_cache_spec",
        "get_kv_connector_handshake_metadata",
        "get_model_inspection",
        "get_supported_tasks",
        "list_loras",
        "pin_lora",
        "profile",
        "remove_lora",
        "reset_encoder_cache",
        "reset_mm_cache",
        "sample_tokens",
        "save_sharded_state",
        "shutdown",
        "synchronize_device",
        "take_draft_token_ids",
        "update_max_model_len",
    }
)
_WRAPPED = "lmcache_wrapped"
_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


class Watcher:
    """Calls ``called(name)`` before and after each call that is no step, until it is closed or forgotten.

    name: of the worker's method; "" for a function that was sent to it.
    """

    def __init__(self, called: Callable[[str], None]) -> None:
        self.called = called
        _wrap_dispatchers()
        _watchers.add(self)

    def close(self) -> None:
        _watchers.discard(self)


def _wrap_dispatchers() -> None:
    """Wrap what vLLM 0.32's executors hand calls to their worker with. Idempotent."""
    import vllm.v1.executor.multiproc_executor as multiproc
    import vllm.v1.executor.uniproc_executor as uniproc

    _wrap(uniproc, "run_method", lambda worker, method, *rest: method)
    _wrap(multiproc.WorkerProc, "_execute_worker_rpc", lambda self, request: request[0])
    if ray := sys.modules.get("vllm.v1.executor.ray_utils"):
        _wrap(ray, "run_method", lambda worker, method, *rest: method)


def _wrap(owner: Any, name: str, method_of: Callable[..., Any]) -> None:
    dispatch = getattr(owner, name)
    if hasattr(dispatch, _WRAPPED):
        return

    def telling(*args: Any) -> Any:
        method = method_of(*args)
        name = method if isinstance(method, str) else ""
        if name in _STEPS:
            return dispatch(*args)
        _tell(name)
        try:
            return dispatch(*args)
        finally:
            _tell(name)

    setattr(telling, _WRAPPED, True)
    setattr(owner, name, telling)


_STEPS = frozenset({"execute_model", "sample_tokens", "take_draft_token_ids"})


def _tell(name: str) -> None:
    for watcher in list(_watchers):
        watcher.called(name)
