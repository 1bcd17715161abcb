"""Weights that vLLM's CPU build hands to oneDNN, which repacks them where they cannot be read back.

vLLM removes the parameter and keeps a handler. So what a weight held is noted on its handler while the handler is made,
which this module sees when it was loaded before the model: vLLM's plugin entry point does that in every process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import xxhash

logger = logging.getLogger(__name__)

MAKERS = ("create_onednn_mm", "create_onednn_scaled_mm")
HANDLER = "CPUDNNLGEMMHandler"
_NOTE = "lmcache_digest"


def note_packed_weights() -> None:
    """From now on note what every weight held that is packed in this process. Does nothing but on a CPU. Idempotent."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import vllm._custom_ops as ops

    for name in MAKERS:
        make = getattr(ops, name, None)
        if make is not None and not hasattr(make, _NOTE):
            setattr(ops, name, _noting(make))


def packed_digest(value: Any) -> bytes | None:
    """What the weight behind a handler held; None for anything that is no handler.

    A handler that was made before anybody looked gets a name of its own: its weight cannot change, so its KV can be
    used again in this process, and nowhere else.
    """
    if type(value).__name__ != HANDLER:
        return None
    if not hasattr(value, _NOTE):
        logger.warning(
            "lmcache: the model was loaded before lmcache could see its weights, which are packed for the processor: "
            "its KV is not shared with other processes, nor found after a restart. Install lmcache with pip, so that "
            "vLLM loads its plugin (VLLM_PLUGINS must name lmcache, where it is set)"
        )
        setattr(value, _NOTE, os.urandom(16))
    noted: bytes = getattr(value, _NOTE)
    return noted


def _noting(make: Callable[..., Any]) -> Callable[..., Any]:
    def noting(weight: torch.Tensor, *args: Any, **options: Any) -> Any:
        tensors = [each for each in (weight, *args, *options.values()) if isinstance(each, torch.Tensor)]
        content = b"".join(_digest(each) for each in tensors)
        handler = make(weight, *args, **options)
        setattr(handler, _NOTE, content)
        return handler

    setattr(noting, _NOTE, True)
    return noting


def _digest(tensor: torch.Tensor) -> bytes:
    # A view of a transposed weight is read the way it lies in memory, where it can be.
    transposed = tensor.dim() == 2 and tensor.t().is_contiguous()
    flat = (tensor.t() if transposed else tensor).contiguous().detach().view(-1).view(torch.uint8)
    shape = f"{tensor.dtype}{tuple(tensor.shape)}{'t' if transposed else ''}"
    return shape.encode() + xxhash.xxh3_128_digest(flat.numpy().data)
