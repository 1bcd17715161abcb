"""The scheduler half: what vLLM's scheduler asks, handed to the part that answers it.

    new request ─ lookup ─ (None: still reading) ─ matched tokens ─ allocated ─ Load ─ computed ─ Store ─ finished

    requests.py   what is known of a request, and whether it may be read and stored
    lookups.py    how much of a prompt the workers hold, and how long to wait for the answer
    loads.py      what was promised to vLLM, and the Load that fulfils it
    stores.py     what a step computes that is worth storing
    taint.py      what is not stored because the load below it may have failed

A request's chunks are read into the workers' memory while it queues. Only what is in memory by then, verified and
leased, is promised to vLLM, so that a promise cannot fail for lack of the bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from lmcache.config import LMCacheConfig
from lmcache.connector.identity.adapters import Stamps
from lmcache.connector.lookup.client import LookupClient
from lmcache.connector.metadata import BlockIds, StepMetadata
from lmcache.connector.scheduler.loads import Loads
from lmcache.connector.scheduler.lookups import Lookups
from lmcache.connector.scheduler.pace import Pace, WaitBudget
from lmcache.connector.scheduler.requests import LiveRequest, Requests
from lmcache.connector.scheduler.stores import Stores
from lmcache.connector.scheduler.taint import Taint

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class SchedulerHalf:
    """Lives in vLLM's scheduler process; used by the scheduler's thread only.

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
        self._whole_request = whole_request
        self._step = 0
        self._pace, self._budget = Pace(), WaitBudget()
        self._requests = Requests(
            config, self._budget, adapters, loads=loads, stores=stores, multimodal=multimodal, ahead=whole_request
        )
        self._lookups = Lookups(config, client, self._pace, self._budget, weights_changed=self._disown)
        self._loads = Loads(whole_request)
        self._stores = Stores(chunk_tokens, block_tokens, store_generated=config.store_generated)
        self._taint = Taint(hold_steps)

    def bind_block_pool(self, hash_tokens: int) -> None:
        """hash_tokens: of one hash of vLLM's prefix cache."""
        self._loads.hash_tokens = hash_tokens

    def on_new_request(self, request: Request) -> None:
        """Start reading what is cached while the request still queues."""
        live = self._requests.track(request)
        if self._requests.identify(live) and live.readable:
            self._lookups.ask_early(live)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load beyond ``num_computed_tokens``, or None while they are being read."""
        live = self._requests.track(request)
        if not self._requests.identify(live, may_wait=True):
            return None, False
        if not live.readable or self._lookups.muted:
            return 0, False
        if self._requests.adapter_has_changed(live):
            self._lookups.release(live.id)
            return 0, False
        lookup = self._lookups.current(live, num_computed_tokens)
        if lookup is None:
            return 0, False
        if lookup.matched is None:
            return None, False
        count = self._loads.promise(live, lookup)
        return count, self._whole_request and count > 0

    def update_state_after_alloc(self, request: Request, block_ids: BlockIds | None, num_external_tokens: int) -> None:
        """Blocks are allocated: the lookup is used, or not needed.

        block_ids: None when they are known only at the step's end.
        """
        live = self._requests.track(request)
        lookup = self._lookups.take(live.id)
        if lookup is None:
            return
        # What was found is in a tier, so it is not stored again.
        self._stores.skip(live.id, lookup.matched or 0)
        if num_external_tokens > 0:
            self._loads.add(live, lookup, block_ids, num_external_tokens)
        else:
            self._lookups.let_go(lookup.lookup_id)

    def build_connector_meta(self, output: SchedulerOutput) -> StepMetadata:
        """The loads and stores of this step."""
        self._step += 1
        meta = StepMetadata(step=self._step, loads=self._loads.of_step(output))
        for load in meta.loads:
            self._stores.loading(load, self._step)
            self._taint.hold(load, self._step)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        of_prompts = 0
        for request_id, scheduled in output.num_scheduled_tokens.items():
            start = computed.get(request_id, 0)
            self._stores.computing(output, request_id, start, scheduled, self._step)
            if live := self._requests.get(request_id):
                of_prompts += max(0, min(scheduled, live.request.num_prompt_tokens - start))
                self._plan_stores(meta, live, start, scheduled, output)
        # A step that loads says nothing of how fast prompts are computed.
        self._pace.begins(output.total_num_scheduled_tokens, 0 if meta.loads else of_prompts)
        self._budget.renew(computes=output.total_num_scheduled_tokens > 0)
        return meta

    def step_ended(self) -> None:
        """The results of a step have come."""
        self._pace.ends()

    def loads_failed(self, request_ids: Sequence[str], block_ids: Collection[int] = ()) -> None:
        """Loads that a worker could not do: compute these requests instead of trying again, and store nothing of
        whatever is held back."""
        for request_id in request_ids:
            self._requests.exclude(request_id)
        if request_ids or block_ids:
            for request_id in self._taint.held_back(self._step):
                self._requests.exclude(request_id, loads=False)

    def request_finished(self, request: Request) -> None:
        """The request ended, was aborted or failed."""
        self._pace.results_came()
        request_id = request.request_id
        self._lookups.release(request_id)
        if load := self._loads.forget(request_id):
            self._lookups.let_go(load.lookup_id)
        for part in (self._requests, self._stores, self._taint):
            part.forget(request_id)

    def reset_cache(self) -> bool:
        """Have every worker forget what the configuration's ``reset`` says. Returns at once.

        What was computed before is not stored any more either: a request that still runs would bring it back.
        """
        self._disown()
        self._stores.forget_all()
        self._lookups.reset()
        return True

    def shutdown(self) -> None:
        self._lookups.close()
        self._requests.close()

    def _disown(self) -> None:
        """Nothing that was begun until now is stored any more."""
        self._stores.since = self._step + 1

    def _plan_stores(
        self, meta: StepMetadata, live: LiveRequest, computed: int, scheduled: int, output: SchedulerOutput
    ) -> None:
        """Add what the step computes of a request, and the adapter that it computes with."""
        if live.adapter_name is not None:
            meta.adapters.append(live.adapter_name)
            if not self._requests.identify(live):
                return
        if live.writable and not self._taint.is_held(live.id, output, self._step):
            store, learn = self._stores.plan(live, computed, scheduled, output, self._lookups.ranks)
            meta.stores += [store] if store else []
            meta.learns += [learn] if learn else []
