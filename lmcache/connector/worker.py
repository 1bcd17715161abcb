"""The worker half: owns the cache engine, loads before the forward pass and stores behind it."""

from __future__ import annotations

import atexit
import logging
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from lmcache import metrics
from lmcache.blend.models.base import BlendModel
from lmcache.config import LMCacheConfig
from lmcache.connector.blending import Blending
from lmcache.connector.identity.adapters import LoadedAdapters
from lmcache.connector.identity.watch import Identity
from lmcache.connector.lookup.server import Held, LookupServer
from lmcache.connector.metadata import Learn, Load, StepMetadata, Store
from lmcache.engine.engine import CacheEngine
from lmcache.engine.layout import PagedCache
from lmcache.errors import AdapterChangedError, LeaseExpiredError, WeightsChangedError
from lmcache.keys import KVFormat

logger = logging.getLogger(__name__)

# vLLM may have launched the next steps before it hears of a failed load: what they compute on top is not stored either.
TAINTED_STEPS = 3


class WorkerHalf:
    """Lives in vLLM's worker process, one a rank. Never raises into vLLM's step: a failing cache is a slower vLLM.

    blended: the model, vLLM's name of each of its layers' KV, and its longest prompt, where prompts are to be blended.
    identity: what the model computes with; the format names it as it is now. None: what the format says stays true.
    adapters: what vLLM has loaded of them, where it loads any.
    """

    def __init__(
        self,
        config: LMCacheConfig,
        address: str,
        format: KVFormat,
        cache: PagedCache,
        blended: tuple[BlendModel, Sequence[str], int] | None = None,
        identity: Identity | None = None,
        adapters: LoadedAdapters | None = None,
    ) -> None:
        self._identity = identity or Identity(None)
        self._adapters = adapters or LoadedAdapters(None)
        self.engine = CacheEngine(config, format, cache, holds=self._identity.holds)
        try:
            self.blending = Blending(config.blend, self.engine, *blended) if config.blend and blended else None
            self._server = LookupServer(self.engine, address, self.blending, self._identity, self._adapters.admits)
        except BaseException:
            self.engine.close()
            raise
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._tainted_requests: set[str] = set()
        self._tainted_blocks: deque[set[int]] = deque(maxlen=TAINTED_STEPS)
        atexit.register(self.shutdown)

    def begin_step(self, meta: StepMetadata) -> None:
        """Before anything else of a step: KV is named after the weights and adapters that compute it."""
        try:
            self._identity.settle(meta.step, self._renamed)
            self._adapters.begin_step(meta.step, meta.adapters)
        # Whatever cannot be known of a step's weights and adapters, vLLM goes on, and its KV is left alone.
        except Exception:
            metrics.WEIGHTS_UNKNOWN.inc()
            logger.exception("lmcache: it cannot be known what this step computes with: nothing of it is cached")
            self._identity.doubt()
        self._server.resume()

    def start_load(self, meta: StepMetadata) -> None:
        """Do the step's loads; what fails is remembered for ``take_results`` and ``take_failed_blocks``."""
        self._tainted_blocks.append(set())
        for load in meta.loads:
            held = self._server.take(load.lookup_id)
            try:
                self._load(load, held)
            # Whatever went wrong, these pages must not be used: vLLM recomputes or fails the request.
            except Exception:
                metrics.LOAD_FAILURES.inc()
                logger.exception("lmcache: a load of %d tokens failed; vLLM is told", load.stop - load.start)
                self._load_failed(load)
            finally:
                if held is not None:
                    held.close()
            if load.whole_request:
                self._received.add(load.request_id)

    def finish_step(self, meta: StepMetadata) -> None:
        """Store what this step computed. The pages are read before this returns."""
        for store in meta.stores:
            if self._is_tainted(store):
                continue
            names = self._identity.tags(store.ranks)
            own = store.adapter is None or self._adapters.stores(store.adapter, store.oldest)
            if names is None or not own or not self._identity.computed(store.oldest, bool(store.placeholders)):
                metrics.STORE_DOUBTED_TOKENS.inc(len(store.tokens) // 4 - store.start)
                continue
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
        for learn in meta.learns:
            if self.blending is None or self._is_tainted(learn):
                continue
            if self._identity.tags(()) is None or not self._identity.computed(learn.oldest, images=False):
                continue
            try:
                tables = self.engine.tables(learn.block_ids)
                self.blending.learn(learn.tokens, learn.passages, tables, learn.start, learn.tags)
            # As above.
            except Exception:
                metrics.STORE_FAILURES.inc()
                logger.exception("lmcache: passages could not be kept; their tokens will be computed again")

    def take_results(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        """(received, failed) whole-request loads since the last call."""
        self._tainted_requests -= finished_request_ids
        received, failed = self._received, self._failed
        self._received, self._failed = set(), set()
        return received, failed

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def shutdown(self) -> None:
        """Write out what is queued and let go of everything. Idempotent."""
        atexit.unregister(self.shutdown)
        self._identity.close()
        self._server.close()
        self.engine.close()

    def _renamed(self, name: str | None) -> None:
        if name is not None:
            self.engine.rename(name)
            if self.blending is not None:
                self.blending.rename(name)
        self._server.drop()

    def _load(self, load: Load, held: Held | None) -> None:
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

    def _load_failed(self, load: Load) -> None:
        self._tainted_requests.add(load.request_id)
        blocks = self._loaded_blocks(load)
        self._tainted_blocks[-1] |= blocks
        if load.whole_request:
            self._failed.add(load.request_id)
        else:
            self._failed_blocks |= blocks

    def _loaded_blocks(self, load: Load) -> set[int]:
        blocks: set[int] = set()
        for plane in self.engine.cache.planes:
            first, last = load.start // plane.block_tokens, -(-load.stop // plane.block_tokens)
            blocks.update(load.block_ids[plane.group][first:last])
        return blocks - {-1}

    def _is_tainted(self, store: Store | Learn) -> bool:
        if store.request_id in self._tainted_requests:
            return True
        tainted = set().union(*self._tainted_blocks)
        if tainted and any(tainted.intersection(ids) for ids in store.block_ids):
            self._tainted_requests.add(store.request_id)
            return True
        return False


def describe(format: KVFormat, config: LMCacheConfig, tiers: Sequence[str], memory_tokens: int) -> str:
    """One line for the log at start."""
    below = f"below it: {', '.join(tiers)}" if tiers else "no tier below it, so what is evicted or restarted is lost"
    return (
        f"lmcache: memory {config.memory.capacity.human_readable()} holds the KV of {memory_tokens:,} tokens, {below}; "
        f"{len(format.planes)} plane(s) of {sum(len(p.layers) for p in format.planes)} layers, chunks of "
        f"{format.chunk_tokens} tokens, codec {format.codec}, format {format.fingerprint().hex()[:12]}"
    )


def registered(kv_caches: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """vLLM may hand a layer's KV as a one-element list."""
    return {name: kv[0] if isinstance(kv, list | tuple) else kv for name, kv in kv_caches.items()}
