"""vLLM -> us. ``LMCacheConnector`` is loaded when vLLM asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache.connector.vllm import LMCacheConnector

__all__ = ["LMCacheConnector"]


def __getattr__(name: str) -> Any:
    if name == "LMCacheConnector":
        from lmcache.connector.vllm import LMCacheConnector

        return LMCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
