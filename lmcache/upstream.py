"""What upstream LMCache calls its settings, and what to write here instead.

Upstream reads them from a file (``chunk_size``), from the environment (``LMCACHE_CHUNK_SIZE``) and, prefixed, from
kv_connector_extra_config (``lmcache.chunk_size``). Here they are not read: whoever uses one is told, by this table.
"""

from __future__ import annotations

from collections.abc import Iterable

PREFIX = "LMCACHE_"
DISK = "tiers: [{type: disk, path: ..., capacity: 100GiB}]"
REMOTE = 'tiers: [{type: remote, url: "redis://..."}]'
INSTEAD = {
    "chunk_size": "chunk_tokens",
    "local_cpu": "nothing: memory is always the first tier",
    "max_local_cpu_size": "memory.capacity, with a unit: 5GiB",
    "local_cpu_use_hugepages": "memory.huge_pages",
    "numa_mode": "memory.numa_node",
    "cache_policy": "memory.eviction",
    "local_disk": DISK,
    "max_local_disk_size": DISK,
    "remote_url": REMOTE,
    "remote_serde": "codec",
    "remote_storage_plugins": "tiers",
    "storage_plugins": "tiers",
    "gds_path": "tiers: [{type: gds, path: ..., capacity: 100GiB}]",
    "save_decode_cache": "store_generated",
    "save_unfull_chunk": "nothing: whole blocks behind the last chunk are always stored",
    "enable_async_loading": "nothing: lower tiers are always read while a request waits",
    "enable_blending": "blend: {}",
    "blend_recompute_ratios": "blend.selector: {type: question, ratio: 0.15}",
    "blend_min_tokens": "blend.min_tokens",
    "blend_special_str": "blend.separator, as token ids, with blend.find: separator",
    "blocking_timeout_secs": "read_timeout_s",
    "lookup_timeout_ms": "lookup_timeout_s",
    "log_level": "nothing: logging is vLLM's (VLLM_LOGGING_LEVEL), or Python's",
    "track_usage": "nothing: no usage is tracked",
    "lmcache": "options without the prefix lmcache., for example memory.capacity",
}


def hints(names: Iterable[str]) -> str:
    """``; <name> is upstream LMCache's: write <ours>`` for each of ``names`` that is; empty for others."""
    return "".join(f"; {name} is upstream LMCache's: write {INSTEAD[name]}" for name in names if name in INSTEAD)


def unread(variables: Iterable[str]) -> list[str]:
    """Of names of environment variables those that look like settings of LMCache, with what to write instead."""
    found = sorted(name for name in variables if name.startswith(PREFIX))
    words = {name: INSTEAD.get(name.removeprefix(PREFIX).lower(), "") for name in found}
    return [f"{name} (write {instead})" if instead else name for name, instead in words.items()]
