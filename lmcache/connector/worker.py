"""The worker half: owns the cache engine, loads before the forward pass of a step and stores after it.

begin_step   which weights and adapters compute this step
start_load   leased chunks and passages -> pages; a load that fails goes to FailedLoads, which vLLM asks
finish_step  pages of what was computed -> chunks and passages
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence

from lmcache import metrics
from lmcache.blend.models.base import BlendModel
from lmcache.config import LMCacheConfig
from lmcache.connector.blending import Blending
from lmcache.connector.failed_loads import FailedLoads
from lmcache.connector.identity.adapters import LoadedAdapters
from lmcache.connector.identity.weights_in_use import WeightsInUse
from lmcache.connector.lookup.server import HeldLookup, LookupServer
from lmcache.connector.metadata import Learn, Load, StepMetadata, Store
from lmcache.engine.engine import CacheEngine
from lmcache.engine.layout import PagedCache
from lmcache.errors import AdapterChangedError, LeaseExpiredError, WeightsChangedError
from lmcache.keys import KVFormat

logger = logging.getLogger(__name__)


class WorkerHalf:
    """Lives in vLLM's worker process, one a rank. No call raises into vLLM's step: what fails is logged and computed.

    blended: the model, vLLM's name of each of its layers' KV, and its longest prompt, where prompts are to be blended.
    weights: which the model computes with; the format names them. None: they never change.
    adapters: the LoRA adapters that vLLM has loaded, where it loads any.
    """

    def __init__(
        self,
        config: LMCacheConfig,
        address: str,
        format: KVFormat,
        cache: PagedCache,
        blended: tuple[BlendModel, Sequence[str], int] | None = None,
        weights: WeightsInUse | None = None,
        adapters: LoadedAdapters | None = None,
    ) -> None:
        self._weights = weights or WeightsInUse(None)
        self._adapters = adapters or LoadedAdapters(None)
        self.engine = CacheEngine(config, format, cache, holds=self._weights.holds)
        try:
            self.blending = Blending(config.blend, self.engine, *blended) if config.blend and blended else None
            self._server = LookupServer(self.engine, address, self.blending, self._weights, self._adapters.admits)
        except BaseException:
            self.engine.close()
            raise
        self._received: set[str] = set()
        self._failed = FailedLoads(cache.planes)
        atexit.register(self.shutdown)

    def begin_step(self, meta: StepMetadata) -> None:
        """Called first in a step: finds out which weights and adapters compute it; keys of its KV depend on them."""
        try:
            self._weights.settle(meta.step, self._renamed)
            self._adapters.begin_step(meta.step, meta.adapters)
        # vLLM goes on with the step; its KV is neither stored nor loaded.
        except Exception:
            metrics.WEIGHTS_UNKNOWN.inc()
            logger.exception("lmcache: it cannot be known what this step computes with: nothing of it is cached")
            self._weights.doubt()
        self._server.resume()

    def start_load(self, meta: StepMetadata) -> None:
        """Do the step's loads; what fails is remembered for ``take_results`` and ``take_failed_blocks``."""
        self._failed.begin_step()
        for load in meta.loads:
            held = self._server.take(load.lookup_id)
            try:
                self._load(load, held)
            # Whatever went wrong, these pages must not be used: vLLM recomputes or fails the request.
            except Exception:
                metrics.LOAD_FAILURES.inc()
                logger.exception("lmcache: a load of %d tokens failed; vLLM is told", load.stop - load.start)
                self._failed.add(load)
            finally:
                if held is not None:
                    held.close()
            if load.whole_request:
                self._received.add(load.request_id)

    def finish_step(self, meta: StepMetadata) -> None:
        """Store what this step computed. The pages are read before this returns."""
        for store in meta.stores:
            if not self._failed.taints(store):
                self._store(store)
        for learn in meta.learns:
            if not self._failed.taints(learn):
                self._learn(learn)

    def take_results(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        """(received, failed) whole-request loads since the last call."""
        self._failed.finished(finished_request_ids)
        received, self._received = self._received, set()
        return received, self._failed.take_requests()

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        return self._failed.take_blocks()

    def shutdown(self) -> None:
        """Write out what is queued and let go of everything. Idempotent."""
        atexit.unregister(self.shutdown)
        self._weights.close()
        self._server.close()
        self.engine.close()

    def _renamed(self, name: str | None) -> None:
        if name is not None:
            self.engine.rename(name)
            if self.blending is not None:
                self.blending.rename(name)
        self._server.drop()

    def _load(self, load: Load, held: HeldLookup | None) -> None:
        if held is None or held.lookup is None:
            raise LeaseExpiredError(f"lookup {load.lookup_id} is not held by this worker")
        if load.adapter is not None and not self._adapters.loads(load.adapter):
            raise AdapterChangedError(
                f"adapter {load.adapter.number} is not the one that its files were when asked for"
            )
        if not load.blended:
            self.engine.retrieve(held.lookup, load.block_ids, start=load.start, stop=load.stop)
            return
        if self.blending is None or held.found is None:
            raise LeaseExpiredError(f"lookup {load.lookup_id} holds no passages")
        if load.exact > load.start:
            self.engine.retrieve(held.lookup, load.block_ids, start=load.start, stop=load.exact)
        self.blending.fill(held.found, self.engine.tables(load.block_ids), max(load.start, load.exact), load.stop)

    def _store(self, store: Store) -> None:
        names = self._weights.tags(store.ranks)
        own = store.adapter is None or self._adapters.stores(store.adapter, store.oldest)
        if names is None or not own or not self._weights.computed(store.oldest, bool(store.placeholders)):
            metrics.STORE_DOUBTED_TOKENS.inc(len(store.tokens) // 4 - store.start)
            return
        try:
            self.engine.store(
                store.tokens,
                store.block_ids,
                start=store.start,
                tail=store.tail,
                tags={**store.tags, **names},
                placeholders=store.placeholders,
            )
        except WeightsChangedError:
            metrics.STORE_DOUBTED_TOKENS.inc(len(store.tokens) // 4 - store.start)
        # A store that fails is a future miss.
        except Exception:
            metrics.STORE_FAILURES.inc()
            logger.exception("lmcache: a store failed; its tokens will be computed again")

    def _learn(self, learn: Learn) -> None:
        if self.blending is None or self._weights.tags(()) is None:
            return
        if not self._weights.computed(learn.oldest, images=False):
            return
        try:
            tables = self.engine.tables(learn.block_ids)
            self.blending.learn(learn.tokens, learn.passages, tables, learn.start, learn.tags)
        # As above.
        except Exception:
            metrics.STORE_FAILURES.inc()
            logger.exception("lmcache: passages could not be kept; their tokens will be computed again")


def describe(format: KVFormat, config: LMCacheConfig, tiers: Sequence[str], memory_tokens: int) -> str:
    """One line for the log at start."""
    below = f"below it: {', '.join(tiers)}" if tiers else "no tier below it, so what is evicted or restarted is lost"
    return (
        f"lmcache: memory {config.memory.capacity.human_readable()} holds the KV of {memory_tokens:,} tokens, {below}; "
        f"{len(format.planes)} plane(s) of {sum(len(p.layers) for p in format.planes)} layers, chunks of "
        f"{format.chunk_tokens} tokens, codec {format.codec}, format {format.fingerprint().hex()[:12]}"
    )
