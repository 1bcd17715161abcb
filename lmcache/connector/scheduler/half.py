"""The scheduler half: which tokens of a request are cached, and what the workers shall load and store.

A request's lookup starts when it arrives. Its chunks are read into the workers' memory while it waits; only what *is*
in memory, verified and leased, is ever promised to vLLM, so that a promise cannot fail for lack of the bytes.

    new request ─ lookup ─ (None: still reading) ─ matched tokens ─ allocated ─ Load ─ computed ─ Store ─ finished
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lmcache import metrics
from lmcache.config import BlendConfig, LMCacheConfig
from lmcache.connector.identity.adapters import Adapter, Stamp, Stamps, shared_name, signature_of
from lmcache.connector.identity.ages import BlockAges
from lmcache.connector.lookup.server import Answer, LookupClient
from lmcache.connector.metadata import BlockIds, Learn, Load, StepMetadata, Store
from lmcache.connector.pace import Pace
from lmcache.connector.passages import Passages, passages_of
from lmcache.keys import PlaceholderSpan

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

CONTENT_HASH = re.compile(r"(^|:)[0-9a-f]{64,128}$")
# A miss is asked again after this long in the queue: another request may have stored the prefix meanwhile.
ASK_AGAIN_S = 1.0
# How long one scheduler step may wait for an answer, when the last step computed something and when it did not.
BUSY_WAIT_S, IDLE_WAIT_S = 0.002, 0.02
# Lookups that are asked for at arrival; requests further back ask when vLLM comes to them, so that a long queue neither
# floods the tiers nor pins all of memory.
EARLY_LOOKUPS = 16
# No request waits for the cache longer than its tokens take to compute (times ``patience``), but for this long it may:
# a lookup needs some time even where all is in memory.
LEAST_PATIENCE_S = 0.02
# How long workers have to answer with what they hold, once they are told that nobody waits any longer.
SETTLE_S = 0.02
# After this many unanswered lookups in a row nothing is asked for a while.
TIMEOUTS, MUTE_S = 3, 30.0


@dataclass
class _Pending:
    """A lookup that was asked for and not yet used. matched: tokens held, None while that is not known.

    reach: where what can be blended ends, if that is further. waits_since: when vLLM first wanted the answer.
    cut_at: when the workers were told to answer with what they have.
    """

    lookup_id: int
    asked_at: float
    again: bool = False
    matched: int | None = None
    reach: int = 0
    seen_at: float = 0.0
    waits_since: float | None = None
    cut_at: float | None = None
    local: int = 0


@dataclass
class _Tracked:
    """What is known of a live request.

    passages: how they are found, if it is to be blended. blended: it is; from ``unshared`` on its blocks are its own.
    stamping: what lay in its adapter's folder when it arrived, while that is read; then, stamp and adapter.
    """

    request: Request
    tags: dict[str, str]
    placeholders: tuple[PlaceholderSpan, ...]
    readable: bool
    writable: bool
    passages: Passages | None = None
    blended: bool = False
    unshared: int | None = None
    pending: _Pending | None = None
    stored: int = 0
    learned: int = 0
    hold_until: float = 0
    packed: bytearray = field(default_factory=bytearray)
    stamping: Future[Stamp | None] | None = None
    stamp: Stamp | None = None
    adapter: Adapter | None = None
    tracked_at: float = field(default_factory=time.monotonic)

    def tokens(self, stop: int) -> bytes:
        """The first ``stop`` token ids, packed; only new ones are converted."""
        done = len(self.packed) // 4
        if done < stop:
            self.packed += np.asarray(self.request.all_token_ids[done:stop], dtype="<u4").tobytes()
        return bytes(memoryview(self.packed)[: 4 * stop])


class SchedulerHalf:
    """Lives in vLLM's scheduler process.

    chunk_tokens: as the workers use it. whole_request: loads are vLLM's asynchronous ones, which is the only kind whose
    failure can be reported for models with several cache groups.
    block_tokens: tokens of a block of each cache group.
    hold_steps: with several workers, steps for which nothing on top of a load is stored. A load that fails on one
    worker spoils what all of them compute, and the scheduler hears of it some steps later; infinite: it never does.
    loads, stores: vLLM's kv_role: a producer promises nothing, a consumer stores nothing.
    multimodal: requests with images and the like are cached, too. adapters: tells what an adapter is; None: requests
    with one are not cached.
    """

    def __init__(
        self,
        config: LMCacheConfig,
        client: LookupClient,
        *,
        chunk_tokens: int,
        block_tokens: Sequence[int],
        whole_request: bool,
        hold_steps: float = 0,
        loads: bool = True,
        stores: bool = True,
        multimodal: bool = True,
        adapters: Stamps | None = None,
    ) -> None:
        self._config = config
        self._multimodal = multimodal
        self._adapters = adapters
        self._client = client
        self._chunk_tokens = chunk_tokens
        self._whole_request = whole_request
        self._may_load, self._may_store = loads, stores
        self._tracked: dict[str, _Tracked] = {}
        self._loads: dict[str, tuple[Load, bool]] = {}
        self._wait_s = IDLE_WAIT_S
        self._hold_steps = hold_steps
        self._step = 0
        self._ages = BlockAges(block_tokens)
        self._since = 0  # nothing that was begun in an earlier step is stored
        self._ranks: tuple[str, ...] = ()  # the weights' token of every worker, where there are several
        self._recent: list[tuple[float, frozenset[int]]] = []  # (step until which to hold, blocks that were loaded)
        self._timeouts = 0
        self._muted_until = 0.0
        self._pace = Pace()
        # Tokens of one hash of vLLM's prefix cache; 0: not known.
        self.hash_tokens = 0

    def on_new_request(self, request: Request) -> None:
        """Start reading what is cached while the request still queues."""
        tracked = self._track(request)
        early = sum(other.pending is not None for other in self._tracked.values()) < EARLY_LOOKUPS
        if (
            self._is_identified(tracked)
            and tracked.readable
            and tracked.pending is None
            and early
            and not self._muted()
        ):
            try:
                self._ask(tracked)
            # Whatever a lookup may raise: this request is computed, and vLLM's scheduler goes on.
            except Exception:
                self._give_up(tracked)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load beyond ``num_computed_tokens``, or None while they are being read."""
        tracked = self._track(request)
        if not self._is_identified(tracked, self._wait_s):
            return None, False
        if not tracked.readable or self._muted() or self._is_touched(tracked):
            return 0, False
        try:
            pending = self._current(tracked, num_computed_tokens)
        # As above.
        except Exception:
            self._give_up(tracked)
            return 0, False
        if pending.matched is None:
            return None, False
        pending.local = num_computed_tokens
        # A synchronous load must leave a token to compute; after an asynchronous one vLLM takes care of it.
        limit = request.num_tokens - (0 if self._whole_request else 1)
        count = min(max(pending.matched, pending.reach), limit) - num_computed_tokens
        if count <= 0:
            return 0, False
        if pending.reach > max(pending.matched, num_computed_tokens):
            self._unshare(tracked, max(pending.matched, num_computed_tokens))
        return count, self._whole_request

    def update_state_after_alloc(self, request: Request, block_ids: BlockIds | None, num_external_tokens: int) -> None:
        """Blocks are allocated: the lookup is used, or not needed.

        block_ids: None when they are known only at the step's end.
        """
        tracked = self._track(request)
        pending, tracked.pending = tracked.pending, None
        if pending is None:
            return
        # What was found is in a tier, so it is not stored again.
        tracked.stored = max(tracked.stored, pending.matched or 0)
        if num_external_tokens <= 0:
            self._client.release(pending.lookup_id)
            return
        stop, exact = pending.local + num_external_tokens, pending.matched or 0
        load = Load(
            request_id=request.request_id,
            lookup_id=pending.lookup_id,
            block_ids=block_ids or (),
            start=pending.local,
            stop=stop,
            whole_request=self._whole_request,
            blended=stop > exact,
            exact=exact,
            adapter=tracked.adapter,
        )
        # What is computed on top of KV that is nearly right is no better than that.
        tracked.blended = tracked.blended or load.blended
        self._loads[request.request_id] = (load, block_ids is not None)

    def build_connector_meta(self, output: SchedulerOutput) -> StepMetadata:
        """The loads and stores of this step."""
        self._step += 1
        meta = StepMetadata(step=self._step)
        for load, has_blocks in self._loads.values():
            blocks = load.block_ids if has_blocks else self._block_ids(output, load.request_id)
            if not blocks:
                # vLLM counts on this load; going on without it would be wrong KV.
                raise RuntimeError(f"vLLM names no blocks for the load of request {load.request_id}")
            meta.loads.append(Load(**{**vars(load), "block_ids": _without_null(blocks)}))
            self._ages.begun(blocks, load.start, load.stop, self._step)
            self._hold(meta.loads[-1])
        self._loads.clear()
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, scheduled in output.num_scheduled_tokens.items():
            start = computed.get(request_id, 0)
            if self._ages.begins(start, scheduled):
                self._ages.begun(self._block_ids(output, request_id), start, start + scheduled, self._step)
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.request.lora_request is not None:
                lora = tracked.request.lora_request
                meta.adapters.append((shared_name(lora), lora.lora_int_id))
                if not self._is_identified(tracked):
                    continue
            if tracked is None or not tracked.writable or tracked.blended or self._is_held(tracked, output):
                continue
            try:
                store = self._store(tracked, computed.get(request_id, 0), scheduled, output)
                learn = self._learn(tracked, computed.get(request_id, 0) + scheduled, output)
            # A store that cannot be planned is a future miss.
            except Exception:
                self._give_up(tracked)
                continue
            if store is not None:
                meta.stores.append(store)
            if learn is not None:
                meta.learns.append(learn)
        self._time(output, computed, loads=bool(meta.loads))
        self._wait_s = BUSY_WAIT_S if output.total_num_scheduled_tokens else IDLE_WAIT_S
        return meta

    def step_ended(self) -> None:
        """The results of a step have come."""
        self._pace.ends()

    def loads_failed(self, request_ids: Sequence[str], block_ids: Collection[int] = ()) -> None:
        """Loads that a worker could not do: compute these requests instead of trying again, and store nothing of
        whatever is held back."""
        for request_id in request_ids:
            if tracked := self._tracked.get(request_id):
                tracked.readable = tracked.writable = False
        if request_ids or block_ids:
            for tracked in self._tracked.values():
                if tracked.hold_until > self._step:
                    tracked.writable = False

    def request_finished(self, request: Request) -> None:
        """The request ended, was aborted or failed."""
        self._pace.results_came()
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and tracked.pending is not None:
            self._client.release(tracked.pending.lookup_id)
        if entry := self._loads.pop(request.request_id, None):
            self._client.release(entry[0].lookup_id)

    def reset_cache(self) -> bool:
        """Have every worker forget what the configuration's ``reset`` says. Returns at once.

        What was computed before is not stored any more either: a request that still runs would bring it back.
        """
        self._since = self._step + 1
        for tracked in self._tracked.values():
            tracked.stored = tracked.learned = 0
            if tracked.pending is not None:
                self._client.release(tracked.pending.lookup_id)
                tracked.pending = None
        self._client.reset()
        return True

    def shutdown(self) -> None:
        self._client.close()
        if self._adapters is not None:
            self._adapters.close()

    def _track(self, request: Request) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            try:
                tracked = _tracked(request, self._config.blend)
                if request.mm_features and not self._multimodal:
                    tracked.readable = tracked.writable = False
                if request.lora_request is not None:
                    self._ask_adapter(tracked)
            # A request may carry anything (kv_transfer_params are the client's); what cannot be read is not cached.
            except Exception:
                tracked = _Tracked(request, {}, (), readable=False, writable=False)
                self._give_up(tracked)
            tracked.readable = tracked.readable and self._may_load
            tracked.writable = tracked.writable and self._may_store
            self._tracked[request.request_id] = tracked
        return tracked

    def _ask_adapter(self, tracked: _Tracked) -> None:
        request = tracked.request
        if self._adapters is None or (request.mm_features and not self._adapters.images):
            tracked.readable = tracked.writable = False
        else:
            tracked.stamping = self._adapters.ask(request.lora_request.lora_path)

    def _is_identified(self, tracked: _Tracked, wait_s: float = 0.0) -> bool:
        """Whether it is known by now what computes the request's KV; where that cannot be, it is not cached."""
        if tracked.stamping is None:
            return True
        wait([tracked.stamping], wait_s)
        late = time.monotonic() - tracked.tracked_at > self._config.read_timeout_s
        if not tracked.stamping.done() and not late:
            self._wait_s = 0.0 if wait_s else self._wait_s  # the budget is a step's, not a request's
            return False
        stamp = tracked.stamping.result() if tracked.stamping.done() else None
        tracked.stamping = None
        if stamp is None or self._adapters is None:
            tracked.readable = tracked.writable = False
            return True
        lora = tracked.request.lora_request
        tracked.stamp = stamp
        tracked.tags["lora"] = self._adapters.tag(lora, stamp)
        tracked.adapter = self._adapters.adapter(lora, stamp, must_be_loaded=self._whole_request)
        if self._whole_request and tracked.adapter.reloaded:
            tracked.readable = False  # it would be read again between the load and the first step
        return True

    def _is_touched(self, tracked: _Tracked) -> bool:
        """Whether the adapter's files have changed since the request came: vLLM may load what they are now."""
        if tracked.stamp is None or signature_of(tracked.stamp.folder) == tracked.stamp.signature:
            return False
        tracked.readable = tracked.writable = False
        if tracked.pending is not None:
            self._client.release(tracked.pending.lookup_id)
            tracked.pending = None
        return True

    @staticmethod
    def _give_up(tracked: _Tracked) -> None:
        metrics.LOOKUP_ERRORS.inc()
        logger.exception("lmcache: request %s goes on without the cache", tracked.request.request_id)
        tracked.readable = tracked.writable = False

    def _muted(self) -> bool:
        return time.monotonic() < self._muted_until

    def _hold(self, load: Load) -> None:
        if self._hold_steps:
            until = self._step + self._hold_steps
            self._recent = [entry for entry in self._recent if entry[0] > self._step]
            self._recent.append((until, frozenset(block for ids in load.block_ids for block in ids if block > 0)))
            if tracked := self._tracked.get(load.request_id):
                tracked.hold_until = until

    def _is_held(self, tracked: _Tracked, output: SchedulerOutput) -> bool:
        # Also a request that found blocks in vLLM's own prefix cache while they were being loaded for another.
        recent = [entry for entry in self._recent if entry[0] > self._step]
        if recent and tracked.hold_until <= self._step:
            own = {block for ids in self._block_ids(output, tracked.request.request_id) for block in ids}
            tracked.hold_until = max((until for until, blocks in recent if blocks & own), default=0)
        return tracked.hold_until > self._step

    def _ask(self, tracked: _Tracked, *, again: bool = False) -> _Pending:
        if tracked.pending is not None:
            self._client.release(tracked.pending.lookup_id)
        tokens = tracked.tokens(tracked.request.num_tokens)
        lookup_id = self._client.acquire(
            tokens, tracked.tags, tracked.placeholders, tracked.passages, self._ranks, tracked.adapter
        )
        tracked.pending = _Pending(lookup_id, time.monotonic(), again)
        return tracked.pending

    def _time(self, output: SchedulerOutput, computed: Mapping[str, int], *, loads: bool) -> None:
        """Tell the pace of a step; one that loads says nothing of computing."""
        of_prompts = 0
        for request_id, scheduled in output.num_scheduled_tokens.items():
            if (tracked := self._tracked.get(request_id)) and not loads:
                left = tracked.request.num_prompt_tokens - computed.get(request_id, 0)
                of_prompts += max(0, min(scheduled, left))
        self._pace.begins(output.total_num_scheduled_tokens, of_prompts)

    def _current(self, tracked: _Tracked, local: int) -> _Pending:
        pending = tracked.pending or self._ask(tracked)
        fresh = pending.matched is None
        if fresh:
            self._poll(tracked, pending, local)
        if pending.matched is not None and self._is_stale(pending, fresh):
            pending = self._ask(tracked, again=True)
            self._poll(tracked, pending, local)
        return pending

    def _is_stale(self, pending: _Pending, fresh: bool) -> bool:
        now = time.monotonic()
        if pending.matched:
            # A lease must outlive the step that loads it, and it runs since the lookup ended, not since it was seen.
            return now - pending.asked_at > self._config.lease_timeout_s / 2
        if pending.cut_at is not None or pending.seen_at - (pending.waits_since or now) > ASK_AGAIN_S:
            return False  # this request has waited for the tiers: one deadline is enough
        if fresh:
            # An old miss may be a hit by now; it is asked for once more, not for ever.
            return not pending.again and now - pending.asked_at > ASK_AGAIN_S
        return now - pending.seen_at > ASK_AGAIN_S

    def _poll(self, tracked: _Tracked, pending: _Pending, local: int) -> None:
        if pending.waits_since is None:
            pending.waits_since = time.monotonic()
        answer = self._client.answer(pending.lookup_id, self._wait_s)
        if answer is None:
            self._wait_s = 0.0  # the budget is a step's, not a request's
            answer = self._out_of_patience(tracked, pending, local)
        if answer is not None:
            if self._are_others(answer.ranks):
                self._ask(tracked, again=pending.again)
                return
            pending.matched, pending.reach = max(0, answer.tokens), answer.reach
            pending.seen_at = time.monotonic()
            self._timeouts = 0
            return
        age = time.monotonic() - pending.asked_at
        if age > self._config.read_timeout_s + self._config.lookup_timeout_s:
            logger.warning("lmcache: a lookup was not answered within %.1f s and counts as a miss", age)
            self._client.release(pending.lookup_id)
            pending.matched, pending.again = 0, True
            tracked.readable = False
            self._timeouts += 1
            if self._timeouts >= TIMEOUTS:
                self._timeouts, self._muted_until = 0, time.monotonic() + MUTE_S

    def _out_of_patience(self, tracked: _Tracked, pending: _Pending, local: int) -> Answer | None:
        """The end of a wait that would be longer than computing; None while there is more patience."""
        now = time.monotonic()
        if pending.cut_at is None:
            held = max(local, self._client.so_far(pending.lookup_id))
            patience_s = self._config.patience * max(0, tracked.request.num_tokens - held) / self._pace.rate
            if now - (pending.waits_since or now) <= max(patience_s, LEAST_PATIENCE_S):
                return None
            pending.cut_at = now
            metrics.LOOKUPS_CUT.inc()
            self._client.settle(pending.lookup_id)
            return self._client.answer(pending.lookup_id, BUSY_WAIT_S)
        if now - pending.cut_at <= SETTLE_S:
            return None
        self._client.release(pending.lookup_id)
        return Answer(0)

    def _store(self, tracked: _Tracked, computed: int, scheduled: int, output: SchedulerOutput) -> Store | None:
        request = tracked.request
        # After this step the prompt's KV is there as far as it was scheduled. Of generated tokens only those that
        # were computed before it count: the newest may be drafts that are rejected, or not yet known here.
        prompt = min(computed + scheduled, request.num_prompt_tokens)
        generated = min(computed, request.num_tokens) if self._config.store_generated else 0
        stop = max(prompt, generated)
        ends_prompt = tracked.stored < request.num_prompt_tokens <= stop
        if stop // self._chunk_tokens <= tracked.stored // self._chunk_tokens and not ends_prompt:
            return None
        blocks = self._block_ids(output, request.request_id)
        start = tracked.stored // self._chunk_tokens * self._chunk_tokens
        oldest = self._ages.oldest(blocks, stop)
        if oldest < self._since:
            return None
        tracked.stored = stop
        return Store(
            request_id=request.request_id,
            tokens=tracked.tokens(stop),
            block_ids=_without_null(blocks),
            start=start,
            tail=ends_prompt,
            tags=tracked.tags,
            placeholders=tracked.placeholders,
            oldest=oldest,
            ranks=self._ranks,
            adapter=tracked.adapter,
        )

    def _learn(self, tracked: _Tracked, stop: int, output: SchedulerOutput) -> Learn | None:
        """Passages whose last token this step computes."""
        stop = min(stop, tracked.request.num_prompt_tokens)
        if tracked.passages is None or stop <= tracked.learned:
            return None
        start, tracked.learned = tracked.learned, stop
        blocks = self._block_ids(output, tracked.request.request_id)
        oldest = self._ages.oldest(blocks, stop)
        if oldest < self._since:
            return None
        return Learn(
            tracked.request.request_id,
            tracked.tokens(stop),
            _without_null(blocks),
            start,
            tracked.passages,
            tracked.tags,
            oldest,
        )

    def _are_others(self, ranks: tuple[str, ...]) -> bool:
        """Whether several workers say that they have other weights than those they were asked for."""
        if len(ranks) < 2 or ranks == self._ranks:
            return False
        names = [token.partition("#")[0] for token in ranks]
        if self._ranks and names != [token.partition("#")[0] for token in self._ranks]:
            self._since = self._step + 1
        self._ranks = ranks
        return True

    def _unshare(self, tracked: _Tracked, exact: int) -> None:
        """Give the blocks behind ``exact`` tokens hashes that no other request has.

        vLLM's prefix cache enters a request's blocks under the hashes of its tokens as soon as they are allocated; what
        is hashed later is chained to these. Blended KV would be taken for that of the tokens.
        """
        if tracked.unshared is not None and tracked.unshared <= exact:
            return
        tracked.unshared = exact
        hashes = tracked.request.block_hashes
        first = exact // self.hash_tokens if self.hash_tokens else 0
        hashes[first:] = [os.urandom(len(each)) for each in hashes[first:]]

    @staticmethod
    def _block_ids(output: SchedulerOutput, request_id: str) -> BlockIds:
        state = output.kv_connector_block_state
        blocks = state.get_block_ids(request_id) if state is not None else None
        return tuple(list(ids) for ids in blocks) if blocks is not None else ()


def _without_null(block_ids: BlockIds) -> BlockIds:
    # Block 0 is vLLM's null block: it stands where a sliding window has given its block back.
    return tuple([block if block > 0 else -1 for block in ids] for ids in block_ids)


def _tracked(request: Request, blend: BlendConfig | None = None) -> _Tracked:
    """Everything of a request that changes its KV, each input in a field of its own; its adapter comes later."""
    tags: dict[str, str] = {}
    tags["cache_salt"] = request.cache_salt or ""
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
    return _Tracked(request, tags, placeholders, readable=readable, writable=known, passages=passages)
