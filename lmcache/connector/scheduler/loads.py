"""From the tokens that are promised to vLLM to the Load that the workers carry out."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache.connector.metadata import BlockIds, Load
from lmcache.connector.scheduler.blocks import block_ids_of, without_null
from lmcache.connector.scheduler.lookups import PendingLookup
from lmcache.connector.scheduler.requests import LiveRequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Loads:
    """The loads of the coming step. whole_request: as of Load."""

    def __init__(self, whole_request: bool) -> None:
        self._whole_request = whole_request
        self._loads: dict[str, tuple[Load, bool]] = {}  # by request; with its blocks, or they are known at the step
        self._unshared: dict[str, int] = {}  # by request: from which token on its blocks are its own
        self.hash_tokens = 0
        """Tokens of one hash of vLLM's prefix cache; 0: not known."""

    def promise(self, live: LiveRequest, lookup: PendingLookup) -> int:
        """How many tokens behind ``lookup.local`` vLLM need not compute."""
        exact, local = lookup.matched or 0, lookup.local
        # A synchronous load must leave a token to compute; after an asynchronous one vLLM takes care of it.
        limit = live.request.num_tokens - (0 if self._whole_request else 1)
        count: int = min(max(exact, lookup.reach), limit) - local
        if count > 0 and lookup.reach > max(exact, local):
            self._unshare(live, max(exact, local))
        return max(0, count)

    def add(self, live: LiveRequest, lookup: PendingLookup, block_ids: BlockIds | None, count: int) -> None:
        """vLLM has taken ``count`` tokens of the promise. block_ids: None when they are known only at the step's end.

        The load owns the lookup from now on.
        """
        stop, exact = lookup.local + count, lookup.matched or 0
        load = Load(
            request_id=live.id,
            lookup_id=lookup.lookup_id,
            block_ids=block_ids or (),
            start=lookup.local,
            stop=stop,
            whole_request=self._whole_request,
            blended=stop > exact,
            exact=exact,
            adapter=live.adapter,
        )
        if load.blended:
            live.writable = False  # what is computed on top of KV that is nearly right is no better than that
        self._loads[live.id] = (load, block_ids is not None)

    def of_step(self, output: SchedulerOutput) -> list[Load]:
        """The loads to be done before this step, with their blocks."""
        loads = []
        for load, has_blocks in self._loads.values():
            blocks = load.block_ids if has_blocks else block_ids_of(output, load.request_id)
            if not blocks:
                # vLLM counts on this load; going on without it would be wrong KV.
                raise RuntimeError(f"vLLM names no blocks for the load of request {load.request_id}")
            loads.append(replace(load, block_ids=without_null(blocks)))
        self._loads.clear()
        return loads

    def forget(self, request_id: str) -> Load | None:
        """The request ended; its load, if that was not given to the workers yet."""
        self._unshared.pop(request_id, None)
        load, _ = self._loads.pop(request_id, (None, False))
        return load

    def _unshare(self, live: LiveRequest, exact: int) -> None:
        """Give the blocks behind ``exact`` tokens hashes that no other request has.

        vLLM's prefix cache enters a request's blocks under the hashes of its tokens as soon as they are allocated; what
        is hashed later is chained to these. Blended KV would be taken for that of the tokens.
        """
        if self._unshared.get(live.id, exact + 1) <= exact:
            return
        self._unshared[live.id] = exact
        hashes = live.request.block_hashes
        first = exact // self.hash_tokens if self.hash_tokens else 0
        hashes[first:] = [os.urandom(len(each)) for each in hashes[first:]]
