"""Every metric of the package, in one table. Prometheus registers each when this module is first imported."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

RETRIEVED_TOKENS = Counter("lmcache_retrieved_tokens", "tokens whose KV was written into the engine's pages")
STORED_TOKENS = Counter("lmcache_stored_tokens", "tokens whose KV was copied out of the engine's pages")
STORE_REFUSED_TOKENS = Counter("lmcache_store_refused_tokens", "tokens not stored for lack of memory")
STORE_FAILURES = Counter("lmcache_store_failures", "stores that raised; their tokens will be computed again")
LOAD_FAILURES = Counter("lmcache_load_failures", "loads that raised; vLLM was told")
LOOKUP_ERRORS = Counter("lmcache_lookup_errors", "lookups that failed and counted as a miss")

TIER_HITS = Counter("lmcache_tier_hits", "chunks served", ["tier"])
TIER_ERRORS = Counter("lmcache_tier_errors", "operations of a tier that raised or hung", ["tier"])
TIER_SHED_BYTES = Counter("lmcache_tier_shed_bytes", "bytes not written because the queue was full", ["tier"])
TIER_BREAKER_OPEN = Gauge("lmcache_tier_breaker_open", "1 while a tier is left alone", ["tier"])
CORRUPT_CHUNKS = Counter(
    "lmcache_corrupt_chunks", "chunks that were not what they should be, and were removed", ["tier"]
)
EVICTED_CHUNKS = Counter("lmcache_evicted_chunks", "chunks evicted for lack of capacity", ["tier"])
MEMORY_USED_BYTES = Gauge("lmcache_memory_used_bytes", "bytes of the pool that are in use")
DIRECT_IO = Gauge("lmcache_direct_io", "1 where a folder's files bypass the page cache, 0 where not", ["folder"])
FOLDER_ERRORS = Counter("lmcache_folder_errors", "operations on the files of a folder that failed", ["folder"])
