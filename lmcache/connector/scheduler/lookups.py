"""How much of each prompt the workers hold. Asked for when a request arrives; no request waits longer for the answer
than computing its tokens would take.

on_new_request              ask the workers, which read from their tiers meanwhile
get_num_new_matched_tokens  the answer; None (vLLM asks again next step) until it came or patience is over
update_state_after_alloc    the lookup is taken: a load uses it, or it is let go
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from lmcache import metrics
from lmcache.config import LMCacheConfig
from lmcache.connector.lookup.client import Answer, LookupClient
from lmcache.connector.scheduler.pace import BUSY_WAIT_S, Pace, WaitBudget
from lmcache.connector.scheduler.requests import LiveRequest

logger = logging.getLogger(__name__)

# A miss is asked again after this long in the queue: another request may have stored the prefix meanwhile.
ASK_AGAIN_S = 1.0
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
class PendingLookup:
    """A lookup that was asked for and not yet used. matched: tokens held exactly, None while that is not known.

    reach: where what can be blended ends, if that is further. local: tokens that vLLM has itself.
    again: it has been asked for once more after a late miss. seen_at: when the answer was read. waits_since: when vLLM
    first wanted the answer. cut_at: when the workers were told to answer with what they have.
    """

    lookup_id: int
    asked_at: float
    again: bool = False
    matched: int | None = None
    reach: int = 0
    local: int = 0
    seen_at: float = 0.0
    waits_since: float | None = None
    cut_at: float | None = None


class Lookups:
    """The lookups of live requests, one a request at most.

    weights_changed: called when several workers say that they compute with other weights than before.
    """

    def __init__(
        self,
        config: LMCacheConfig,
        client: LookupClient,
        pace: Pace,
        budget: WaitBudget,
        weights_changed: Callable[[], None],
    ) -> None:
        self._config, self._client, self._pace, self._budget = config, client, pace, budget
        self._weights_changed = weights_changed
        self._pending: dict[str, PendingLookup] = {}
        self._timeouts = 0
        self._muted_until = 0.0
        self.ranks: tuple[str, ...] = ()
        """The weights' token of every worker, where there are several."""

    @property
    def muted(self) -> bool:
        """Whether workers have left so many lookups unanswered that none is asked for now."""
        return time.monotonic() < self._muted_until

    def ask_early(self, live: LiveRequest) -> None:
        """Ask for a request that has just arrived, unless many are asked for already."""
        if live.id in self._pending or len(self._pending) >= EARLY_LOOKUPS or self.muted:
            return
        try:
            self._ask(live)
        # Whatever a lookup may raise: this request is computed, and vLLM's scheduler goes on.
        except Exception:
            live.give_up()

    def current(self, live: LiveRequest, local: int) -> PendingLookup | None:
        """The request's lookup, its ``matched`` None while the workers read; None where asking fails.

        Waits for the answer as long as the step's budget lasts. An answer that has become old is asked for again.
        """
        try:
            lookup = self._answered(live, local)
        # As above.
        except Exception:
            live.give_up()
            return None
        lookup.local = local
        return lookup

    def take(self, request_id: str) -> PendingLookup | None:
        """The request's lookup, handed over: the caller lets it go, or gives it to a load."""
        return self._pending.pop(request_id, None)

    def release(self, request_id: str) -> None:
        """Forget the request's lookup, if it has one."""
        if lookup := self.take(request_id):
            self.let_go(lookup.lookup_id)

    def let_go(self, lookup_id: int) -> None:
        """Have the workers let go of what they hold for a lookup."""
        self._client.release(lookup_id)

    def reset(self) -> None:
        """Forget all lookups, and have the workers forget what they have cached."""
        for request_id in list(self._pending):
            self.release(request_id)
        self._client.reset()

    def close(self) -> None:
        self._client.close()

    def _ask(self, live: LiveRequest, *, again: bool = False) -> PendingLookup:
        if old := self._pending.get(live.id):
            self.let_go(old.lookup_id)
        tokens = live.tokens(live.request.num_tokens)
        lookup_id = self._client.acquire(tokens, live.tags, live.placeholders, live.passages, self.ranks, live.adapter)
        lookup = self._pending[live.id] = PendingLookup(lookup_id, time.monotonic(), again)
        return lookup

    def _answered(self, live: LiveRequest, local: int) -> PendingLookup:
        lookup = self._pending.get(live.id) or self._ask(live)
        fresh = lookup.matched is None
        if fresh:
            self._poll(live, lookup, local)
        if lookup.matched is not None and self._is_stale(lookup, fresh):
            lookup = self._ask(live, again=True)
            self._poll(live, lookup, local)
        return lookup

    def _is_stale(self, lookup: PendingLookup, fresh: bool) -> bool:
        now = time.monotonic()
        if lookup.matched:
            # A lease must outlive the step that loads it, and it runs since the lookup ended, not since it was seen.
            return now - lookup.asked_at > self._config.lease_timeout_s / 2
        if lookup.cut_at is not None or lookup.seen_at - (lookup.waits_since or now) > ASK_AGAIN_S:
            return False  # this request has waited for the tiers: one deadline is enough
        if fresh:
            # An old miss may be a hit by now; it is asked for once more, not for ever.
            return not lookup.again and now - lookup.asked_at > ASK_AGAIN_S
        return now - lookup.seen_at > ASK_AGAIN_S

    def _poll(self, live: LiveRequest, lookup: PendingLookup, local: int) -> None:
        if lookup.waits_since is None:
            lookup.waits_since = time.monotonic()
        answer = self._client.answer(lookup.lookup_id, self._budget.left_s)
        if answer is None:
            self._budget.spend()
            answer = self._out_of_patience(live, lookup, local)
        if answer is None:
            self._time_out(live, lookup)
        elif self._have_changed(answer.ranks):
            self._ask(live, again=lookup.again)
        else:
            lookup.matched, lookup.reach = max(0, answer.tokens), answer.reach
            lookup.seen_at = time.monotonic()
            self._timeouts = 0

    def _out_of_patience(self, live: LiveRequest, lookup: PendingLookup, local: int) -> Answer | None:
        """The end of a wait that would be longer than computing; None while there is more patience."""
        now = time.monotonic()
        if lookup.cut_at is None:
            held = max(local, self._client.so_far(lookup.lookup_id))
            patience_s = self._config.patience * max(0, live.request.num_tokens - held) / self._pace.rate
            if now - (lookup.waits_since or now) <= max(patience_s, LEAST_PATIENCE_S):
                return None
            lookup.cut_at = now
            metrics.LOOKUPS_CUT.inc()
            self._client.settle(lookup.lookup_id)
            return self._client.answer(lookup.lookup_id, BUSY_WAIT_S)
        if now - lookup.cut_at <= SETTLE_S:
            return None
        self.let_go(lookup.lookup_id)
        return Answer(0)

    def _time_out(self, live: LiveRequest, lookup: PendingLookup) -> None:
        """Count a lookup as a miss that has had no answer for longer than workers may take."""
        age = time.monotonic() - lookup.asked_at
        if age > self._config.read_timeout_s + self._config.lookup_timeout_s:
            logger.warning("lmcache: a lookup was not answered within %.1f s and counts as a miss", age)
            self.let_go(lookup.lookup_id)
            lookup.matched, lookup.again = 0, True
            live.readable = False
            self._timeouts += 1
            if self._timeouts >= TIMEOUTS:
                self._timeouts, self._muted_until = 0, time.monotonic() + MUTE_S

    def _have_changed(self, ranks: tuple[str, ...]) -> bool:
        """Whether several workers say that they have other weights than those they were asked for."""
        if len(ranks) < 2 or ranks == self.ranks:
            return False
        names = [token.partition("#")[0] for token in ranks]
        if self.ranks and names != [token.partition("#")[0] for token in self.ranks]:
            self._weights_changed()
        self.ranks = ranks
        return True
