"""What a step computes that is worth storing: chunks of prompts (and answers), and passages to be blended later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.connector.metadata import Learn, Load, Store
from lmcache.connector.scheduler.blocks import BlockAges, block_ids_of, without_null
from lmcache.connector.scheduler.requests import LiveRequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


@dataclass
class _Progress:
    """How many tokens of a request were handed to the workers to be stored, and to learn passages from."""

    stored: int = 0
    learned: int = 0


class Stores:
    """Plans the stores of each step; all of a request up to its progress has been planned before.

    block_tokens: tokens of a block of each cache group. store_generated: store answers, too.
    """

    def __init__(self, chunk_tokens: int, block_tokens: Sequence[int], *, store_generated: bool) -> None:
        self._chunk_tokens, self._store_generated = chunk_tokens, store_generated
        self._ages = BlockAges(block_tokens)
        self._progress: defaultdict[str, _Progress] = defaultdict(_Progress)
        self.since = 0
        """Nothing whose first block was begun in an earlier step is stored."""

    def skip(self, request_id: str, tokens: int) -> None:
        """The first ``tokens`` of a request need not be stored: a tier has them."""
        progress = self._progress[request_id]
        progress.stored = max(progress.stored, tokens)

    def loading(self, load: Load, step: int) -> None:
        """The load writes its blocks in this step."""
        self._ages.begun(load.block_ids, load.start, load.stop, step)

    def computing(self, output: SchedulerOutput, request_id: str, start: int, count: int, step: int) -> None:
        """The step computes ``count`` tokens of a request from position ``start`` on."""
        if self._ages.begins(start, count):
            self._ages.begun(block_ids_of(output, request_id), start, start + count, step)

    def plan(
        self, live: LiveRequest, computed: int, scheduled: int, output: SchedulerOutput, ranks: tuple[str, ...]
    ) -> tuple[Store | None, Learn | None]:
        """What to store of a request when the step has computed ``scheduled`` tokens behind ``computed``.

        ranks: the weights' token of every worker.
        """
        try:
            store = self._store(live, computed, scheduled, output, ranks)
            return store, self._learn(live, computed + scheduled, output)
        # A store that cannot be planned is a future miss.
        except Exception:
            live.give_up()
            return None, None

    def forget(self, request_id: str) -> None:
        self._progress.pop(request_id, None)

    def forget_all(self) -> None:
        """The workers have forgotten what they stored."""
        self._progress.clear()

    def _store(
        self, live: LiveRequest, computed: int, scheduled: int, output: SchedulerOutput, ranks: tuple[str, ...]
    ) -> Store | None:
        request, progress = live.request, self._progress[live.id]
        # After this step the prompt's KV is there as far as it was scheduled. Of generated tokens only those that
        # were computed before it count: the newest may be drafts that are rejected, or not yet known here.
        prompt = min(computed + scheduled, request.num_prompt_tokens)
        generated = min(computed, request.num_tokens) if self._store_generated else 0
        stop = max(prompt, generated)
        ends_prompt = progress.stored < request.num_prompt_tokens <= stop
        if stop // self._chunk_tokens <= progress.stored // self._chunk_tokens and not ends_prompt:
            return None
        blocks = block_ids_of(output, live.id)
        start = progress.stored // self._chunk_tokens * self._chunk_tokens
        oldest = self._ages.oldest(blocks, stop)
        if oldest < self.since:
            return None
        progress.stored = stop
        return Store(
            request_id=live.id,
            tokens=live.tokens(stop),
            block_ids=without_null(blocks),
            start=start,
            tail=ends_prompt,
            tags=live.tags,
            placeholders=live.placeholders,
            oldest=oldest,
            ranks=ranks,
            adapter=live.adapter,
        )

    def _learn(self, live: LiveRequest, stop: int, output: SchedulerOutput) -> Learn | None:
        """Passages whose last token this step computes."""
        progress, stop = self._progress[live.id], min(stop, live.request.num_prompt_tokens)
        if live.passages is None or stop <= progress.learned:
            return None
        start, progress.learned = progress.learned, stop
        blocks = block_ids_of(output, live.id)
        oldest = self._ages.oldest(blocks, stop)
        if oldest < self.since:
            return None
        return Learn(live.id, live.tokens(stop), without_null(blocks), start, live.passages, live.tags, oldest)
