"""Data movement between an engine's paged KV cache and contiguous chunks: Triton kernels, and torch for CPUs.

Importing this package imports neither triton nor a GPU driver; the first launch does.
"""

from __future__ import annotations

if __name__ != "lmcache.kernels":
    raise ModuleNotFoundError(f"import lmcache.kernels, not {__name__}", name=__name__)

from lmcache.kernels.copy.pages import gather_pages, gather_tokens, scatter_pages, scatter_tokens
from lmcache.kernels.layers import PagedLayers

__all__ = ["PagedLayers", "gather_pages", "gather_tokens", "scatter_pages", "scatter_tokens"]
