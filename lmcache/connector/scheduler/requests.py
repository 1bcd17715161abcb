"""What is known of each live request: all inputs that change its KV, and whether it may be read and stored."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lmcache import metrics
from lmcache.config import BlendConfig, LMCacheConfig
from lmcache.connector.identity.adapters import Adapter, Stamp, Stamps, shared_name, signature_of
from lmcache.connector.passages import Passages, passages_of
from lmcache.connector.scheduler.pace import WaitBudget
from lmcache.keys import PlaceholderSpan

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

CONTENT_HASH = re.compile(r"(^|:)[0-9a-f]{64,128}$")


@dataclass
class LiveRequest:
    """A request that vLLM has not finished yet.

    tags, placeholders: what changes its KV besides its tokens. readable: tokens of it may be promised. writable: what
    is computed of it may be stored. passages: how they are found, if it is to be blended.
    stamping: the reading of its adapter's folder, while that runs; after it ``stamp`` and ``adapter`` are set.
    """

    request: Request
    tags: dict[str, str]
    placeholders: tuple[PlaceholderSpan, ...]
    readable: bool
    writable: bool
    passages: Passages | None = None
    packed: bytearray = field(default_factory=bytearray)
    stamping: Future[Stamp | None] | None = None
    stamp: Stamp | None = None
    adapter: Adapter | None = None
    tracked_at: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        return str(self.request.request_id)

    @property
    def adapter_name(self) -> tuple[str, int] | None:
        """Name and vLLM's number of its adapter."""
        lora = self.request.lora_request
        return None if lora is None else (shared_name(lora), lora.lora_int_id)

    def tokens(self, stop: int) -> bytes:
        """The first ``stop`` token ids, packed; only new ones are converted."""
        done = len(self.packed) // 4
        if done < stop:
            self.packed += np.asarray(self.request.all_token_ids[done:stop], dtype="<u4").tobytes()
        return bytes(memoryview(self.packed)[: 4 * stop])

    def exclude(self) -> None:
        """Neither load nor store anything of it from now on."""
        self.readable = self.writable = False

    def give_up(self) -> None:
        """Log the exception that is being handled, and leave the request to vLLM."""
        metrics.LOOKUP_ERRORS.inc()
        logger.exception("lmcache: request %s goes on without the cache", self.id)
        self.exclude()


class Requests:
    """The live requests, by id.

    adapters: tells what an adapter is; None: requests with one are not cached. loads, stores, multimodal: as of
    SchedulerHalf. ahead: loads end before the request's first step.
    """

    def __init__(
        self,
        config: LMCacheConfig,
        budget: WaitBudget,
        adapters: Stamps | None,
        *,
        loads: bool,
        stores: bool,
        multimodal: bool,
        ahead: bool,
    ) -> None:
        self._config, self._budget, self._adapters = config, budget, adapters
        self._loads, self._stores, self._multimodal, self._ahead = loads, stores, multimodal, ahead
        self._live: dict[str, LiveRequest] = {}

    def get(self, request_id: str) -> LiveRequest | None:
        return self._live.get(request_id)

    def track(self, request: Request) -> LiveRequest:
        """What is known of a request, from the first call on. Never raises."""
        live = self._live.get(request.request_id)
        if live is None:
            try:
                live = describe(request, self._config.blend)
                if request.mm_features and not self._multimodal:
                    live.exclude()
                if request.lora_request is not None:
                    self._ask_adapter(live)
            # A request may carry anything (kv_transfer_params are the client's); what cannot be read is not cached.
            except Exception:
                live = LiveRequest(request, {}, (), readable=False, writable=False)
                live.give_up()
            live.readable = live.readable and self._loads
            live.writable = live.writable and self._stores
            self._live[live.id] = live
        return live

    def identify(self, live: LiveRequest, *, may_wait: bool = False) -> bool:
        """Whether it is known by now which adapter computes the request's KV; where that cannot be, it is not cached.

        may_wait: for the adapter's files, as long as the step's budget lasts.
        """
        if live.stamping is None:
            return True
        wait([live.stamping], self._budget.left_s if may_wait else 0.0)
        late = time.monotonic() - live.tracked_at > self._config.read_timeout_s
        if not live.stamping.done() and not late:
            if may_wait:
                self._budget.spend()
            return False
        stamp = live.stamping.result() if live.stamping.done() else None
        live.stamping = None
        if stamp is None or self._adapters is None:
            live.exclude()
            return True
        lora = live.request.lora_request
        live.stamp = stamp
        live.tags["lora"] = self._adapters.tag(lora, stamp)
        live.adapter = self._adapters.adapter(lora, stamp, must_be_loaded=self._ahead)
        if self._ahead and live.adapter.reloaded:
            live.readable = False  # it would be read again between the load and the first step
        return True

    def adapter_has_changed(self, live: LiveRequest) -> bool:
        """Whether the adapter's files have changed since the request came: vLLM may load what they are now."""
        if live.stamp is None or signature_of(live.stamp.folder) == live.stamp.signature:
            return False
        live.exclude()
        return True

    def exclude(self, request_id: str, *, loads: bool = True) -> None:
        """Store nothing of a request from now on; with ``loads``, load nothing either."""
        if live := self._live.get(request_id):
            live.writable = False
            live.readable = live.readable and not loads

    def forget(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def close(self) -> None:
        if self._adapters is not None:
            self._adapters.close()

    def _ask_adapter(self, live: LiveRequest) -> None:
        request = live.request
        if self._adapters is None or (request.mm_features and not self._adapters.images):
            live.exclude()
        else:
            live.stamping = self._adapters.ask(request.lora_request.lora_path)


def describe(request: Request, blend: BlendConfig | None) -> LiveRequest:
    """Everything of a request that changes its KV, each input in a field of its own; its adapter comes later."""
    tags: dict[str, str] = {"cache_salt": request.cache_salt or ""}
    params = request.kv_transfer_params or {}
    for name, value in params.get("lmcache.tags", {}).items():
        if not isinstance(value, str):
            raise TypeError(f"kv_transfer_params['lmcache.tags'] maps names to strings, got {value!r} for {name!r}")
        tags[f"tag.{name}"] = value
    placeholders = tuple(
        PlaceholderSpan(
            item.mm_position.offset,
            item.mm_position.offset + item.mm_position.length,
            f"{item.modality}:{item.identifier}".encode(),
        )
        for item in request.mm_features
    )
    # The tokens of a streaming-input session change behind what was computed; embeddings are not named by tokens.
    known = request.prompt_token_ids is not None and request.prompt_embeds is None and not request.resumable
    # vLLM names an item by a hash of its content, by a counter when its caches are off, or as the client likes.
    known = known and all(CONTENT_HASH.search(item.identifier) for item in request.mm_features)
    readable = known and not request.skip_reading_prefix_cache
    # The models that can be blended see tokens only, and are run as they are.
    passages = passages_of(params, blend) if not placeholders and request.lora_request is None else None
    return LiveRequest(request, tags, placeholders, readable=readable, writable=known, passages=passages)
