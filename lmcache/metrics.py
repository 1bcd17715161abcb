"""Every metric of the package, in one table. Prometheus registers each when this module is first imported."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

RETRIEVED_TOKENS = Counter("lmcache_retrieved_tokens", "tokens whose KV was written into the engine's pages")
STORED_TOKENS = Counter("lmcache_stored_tokens", "tokens whose KV was copied out of the engine's pages")
STORE_REFUSED_TOKENS = Counter("lmcache_store_refused_tokens", "tokens not stored for lack of memory")
STORE_FAILURES = Counter("lmcache_store_failures", "stores that raised; their tokens will be computed again")
STORE_DOUBTED_TOKENS = Counter(
    "lmcache_store_doubted_tokens",
    "tokens not stored: computed, in part, by other weights or another adapter, or before caches were reset",
)
WEIGHTS_CHANGED = Counter("lmcache_weights_changed", "times that the weights turned out to be others while serving")
WEIGHTS_UNKNOWN = Counter("lmcache_weights_unknown", "times that the weights of the model could not be named")
LOAD_FAILURES = Counter("lmcache_load_failures", "loads that raised; vLLM was told")
LOOKUP_ERRORS = Counter("lmcache_lookup_errors", "lookups that failed and counted as a miss")
LOOKUPS_REFUSED = Counter(
    "lmcache_lookups_refused", "reads not begun because lookup_queue others were waiting or under way; a miss"
)
LOOKUPS_CUT = Counter("lmcache_lookups_cut", "lookups not waited for any longer than computing would take")
SEGMENT_TOKENS = Counter(
    "lmcache_segment_tokens",
    "tokens of segments, by what became of them: stored, reused, or computed for being missing, incomplete, late, "
    "corrupt or unmovable",
    ["outcome"],
)

# What the wrappers of a backend see (storage/wrappers).
_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_BYTES = tuple(4.0**n for n in range(5, 17))  # 1 KiB to 4 GiB
BACKEND_SECONDS = Histogram(
    "lmcache_backend_seconds", "duration of one call of a backend", ["backend", "operation"], buckets=_SECONDS
)
BACKEND_BYTES = Histogram(
    "lmcache_backend_bytes", "payload of one call of a backend", ["backend", "operation"], buckets=_BYTES
)
BACKEND_ERRORS = Counter("lmcache_backend_errors", "calls of a backend that raised", ["backend", "operation"])
AUDIT_FAILURES = Counter("lmcache_audit_failures", "answers that differ from what was put", ["backend"])
COMPRESSED_BYTES = Counter("lmcache_compressed_bytes", "payload bytes, before and after compression", ["stage"])
UNREADABLE_CHUNKS = Counter(
    "lmcache_unreadable_chunks", "encrypted chunks that were not read, by why: no key, or not authentic", ["why"]
)

TIER_HITS = Counter("lmcache_tier_hits", "chunks served", ["tier"])
TIER_ERRORS = Counter("lmcache_tier_errors", "operations of a tier that raised or hung", ["tier", "operation"])
TIER_SHED_BYTES = Counter(
    "lmcache_tier_shed_bytes", "bytes not written: the queue was full, or the tier failed", ["tier"]
)
TIER_REFUSED_BYTES = Counter("lmcache_tier_refused_bytes", "bytes that a tier had no room for", ["tier"])
TIER_REFUSED_CHUNKS = Counter("lmcache_tier_refused_chunks", "chunks that a tier did not take", ["tier"])
TIER_BREAKER_OPEN = Gauge(
    "lmcache_tier_breaker_open", "1 while reads, or writes, of a tier are left alone", ["tier", "operation"]
)
CORRUPT_CHUNKS = Counter(
    "lmcache_corrupt_chunks", "chunks that were not what they should be, and were removed", ["tier"]
)
EVICTED_CHUNKS = Counter("lmcache_evicted_chunks", "chunks evicted for lack of capacity", ["tier"])
EVICTED_UNWRITTEN_CHUNKS = Counter(
    "lmcache_evicted_unwritten_chunks", "chunks evicted from memory before a lower tier had them (demotion on_evict)"
)
TIER_RETRIES = Counter("lmcache_tier_retries", "second attempts of reads and writes", ["tier"])
TIER_HUNG_CALLS = Counter("lmcache_tier_hung_calls", "calls that ran out of time and were left behind", ["tier"])
QUOTA_REFUSED_BYTES = Counter(
    "lmcache_quota_refused_bytes", "bytes not kept in memory for a tenant's quota", ["tenant"]
)
TENANT_MEMORY_BYTES = Gauge(
    "lmcache_tenant_memory_bytes", "bytes of the chunks that memory keeps for a tenant with a quota", ["tenant"]
)
MEMORY_USED_BYTES = Gauge("lmcache_memory_used_bytes", "bytes of the pool that are in use")

SERVER_CONNECTIONS = Gauge("lmcache_server_connections", "connections of clients")
SERVER_REQUESTS = Counter("lmcache_server_requests", "requests answered", ["request"])
SERVER_SECONDS = Histogram("lmcache_server_request_seconds", "from a request's head to its answer's end", ["request"])
SERVER_RECEIVED_BYTES = Counter("lmcache_server_received_bytes", "bytes of chunks received")
SERVER_SENT_BYTES = Counter("lmcache_server_sent_bytes", "bytes of chunks sent")
SERVER_NOT_HELD = Counter("lmcache_server_not_held", "chunks that were put and are not held", ["reason"])
SERVER_COMPLAINTS = Counter("lmcache_server_complaints", "connections that were ended or refused", ["kind"])
SERVER_IN_FLIGHT_BYTES = Gauge("lmcache_server_in_flight_bytes", "bytes of memory that requests under way hold")
DIRECT_IO = Gauge("lmcache_direct_io", "1 where a folder's files bypass the page cache, 0 where not", ["folder"])
FOLDER_ERRORS = Counter("lmcache_folder_errors", "operations on the files of a folder that failed", ["folder"])
