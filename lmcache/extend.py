"""Everything that an extension subclasses, calls or raises, in one place; each name is loaded when it is first used.

    to add             subclass or write       entry-point group             used by
    storage backend    StorageBackend, Config  lmcache.storage_backends      tiers: [{type: NAME, ...}]
    remote scheme      StorageBackend, Config  lmcache.remote_schemes        tiers: [{type: remote, url: "NAME://..."}]
    eviction policy    EvictionPolicy          lmcache.eviction_policies     memory: {eviction: NAME}
    codec              Codec, QuantisedCodec   lmcache.codecs                codec: {type: NAME, ...}
    token selector     TokenSelector, Config   lmcache.token_selectors       blend: {selector: {type: NAME, ...}}
    blend model        BlendModel              lmcache.blend_models          a model of the class NAME: "package.Class"
    attention of       Provider, a function    lmcache.attention_providers   Blender(model, provider=NAME)
    blended prompts    of AttentionProblem

docs/extending.md has a guide for each. tests/test_extend.py pins these names; what is not here may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache.blend.models.base import BlendModel as BlendModel
    from lmcache.blend.models.base import KVShape as KVShape
    from lmcache.blend.models.base import LayerAttention as LayerAttention
    from lmcache.blend.models.base import Rope as Rope
    from lmcache.blend.reuse import GivenKV as GivenKV
    from lmcache.blend.reuse import ReusedKV as ReusedKV
    from lmcache.blend.reuse import Segment as Segment
    from lmcache.blend.selectors import Prompt as Prompt
    from lmcache.blend.selectors import RatioConfig as RatioConfig
    from lmcache.blend.selectors import SelectorConfig as SelectorConfig
    from lmcache.blend.selectors import TokenSelector as TokenSelector
    from lmcache.blend.selectors import build_selector as build_selector
    from lmcache.blend.selectors import highest as highest
    from lmcache.config import Config as Config
    from lmcache.errors import BlendError as BlendError
    from lmcache.errors import ClosedError as ClosedError
    from lmcache.errors import ConfigError as ConfigError
    from lmcache.errors import CorruptChunkError as CorruptChunkError
    from lmcache.errors import KernelArgumentError as KernelArgumentError
    from lmcache.errors import StorageError as StorageError
    from lmcache.kernels.attention.sparse_prefill import AttentionProblem as AttentionProblem
    from lmcache.kernels.attention.sparse_prefill import Provider as Provider
    from lmcache.kernels.codecs.base import Codec as Codec
    from lmcache.kernels.codecs.base import CodecConfig as CodecConfig
    from lmcache.kernels.codecs.base import build_codec as build_codec
    from lmcache.kernels.codecs.quantised import QuantisedCodec as QuantisedCodec
    from lmcache.kernels.quantise.scheme import Scheme as Scheme
    from lmcache.kernels.sides import Packed as Packed
    from lmcache.kernels.sides import PlaneCodec as PlaneCodec
    from lmcache.kernels.sides import Side as Side
    from lmcache.keys import ChunkKey as ChunkKey
    from lmcache.storage.base import Buffer as Buffer
    from lmcache.storage.base import StorageBackend as StorageBackend
    from lmcache.storage.chunk import HEADER_BYTES as HEADER_BYTES
    from lmcache.storage.chunk import check_chunk as check_chunk
    from lmcache.storage.chunk import encode_header as encode_header
    from lmcache.storage.eviction.base import EvictionPolicy as EvictionPolicy
    from lmcache.storage.eviction.base import Place as Place
    from lmcache.storage.registry import build_backend as build_backend

_HOMES = {
    "lmcache.blend.models.base": "BlendModel KVShape LayerAttention Rope",
    "lmcache.blend.reuse": "GivenKV ReusedKV Segment",
    "lmcache.blend.selectors": "Prompt RatioConfig SelectorConfig TokenSelector build_selector highest",
    "lmcache.config": "Config",
    "lmcache.errors": "BlendError ClosedError ConfigError CorruptChunkError KernelArgumentError StorageError",
    "lmcache.kernels.attention.sparse_prefill": "AttentionProblem Provider",
    "lmcache.kernels.codecs.base": "Codec CodecConfig build_codec",
    "lmcache.kernels.codecs.quantised": "QuantisedCodec",
    "lmcache.kernels.quantise.scheme": "Scheme",
    "lmcache.kernels.sides": "Packed PlaneCodec Side",
    "lmcache.keys": "ChunkKey",
    "lmcache.storage.base": "Buffer StorageBackend",
    "lmcache.storage.chunk": "HEADER_BYTES check_chunk encode_header",
    "lmcache.storage.eviction.base": "EvictionPolicy Place",
    "lmcache.storage.registry": "build_backend",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
