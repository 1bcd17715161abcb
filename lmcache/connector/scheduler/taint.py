"""Which requests may have been computed on top of a load that failed, so that nothing of them is stored yet.

step      n        n + 1 .. n + hold_steps               later
request   loads    computes, nothing is stored           stores, unless a failure was reported meanwhile
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.connector.metadata import Load
from lmcache.connector.scheduler.blocks import block_ids_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Taint:
    """Holds back stores on top of loads. hold_steps: as of SchedulerHalf; 0: one worker, which tells by itself."""

    def __init__(self, hold_steps: float) -> None:
        self._hold_steps = hold_steps
        self._recent: list[tuple[float, frozenset[int]]] = []  # step until which to hold, and blocks that were loaded
        self._until: dict[str, float] = {}  # by request

    def hold(self, load: Load, step: int) -> None:
        """Hold back what is computed on top of a load that is done in this step."""
        if self._hold_steps:
            until = step + self._hold_steps
            self._recent = [entry for entry in self._recent if entry[0] > step]
            self._recent.append((until, frozenset(block for ids in load.block_ids for block in ids if block > 0)))
            self._until[load.request_id] = until

    def is_held(self, request_id: str, output: SchedulerOutput, step: int) -> bool:
        """Whether nothing of a request is to be stored in this step."""
        # Also a request that found blocks in vLLM's own prefix cache while they were being loaded for another.
        recent = [entry for entry in self._recent if entry[0] > step]
        if recent and self._until.get(request_id, 0) <= step:
            own = {block for ids in block_ids_of(output, request_id) for block in ids}
            self._until[request_id] = max((until for until, blocks in recent if blocks & own), default=0)
        return self._until.get(request_id, 0) > step

    def held_back(self, step: int) -> list[str]:
        """The requests of which nothing is stored now."""
        return [request_id for request_id, until in self._until.items() if until > step]

    def forget(self, request_id: str) -> None:
        self._until.pop(request_id, None)
