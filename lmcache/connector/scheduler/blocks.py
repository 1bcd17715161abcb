"""vLLM's blocks as the scheduler sees them: which a request has, and when each was last begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmcache.connector.metadata import BlockIds

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


def block_ids_of(output: SchedulerOutput, request_id: str) -> BlockIds:
    """A request's blocks of every cache group at this step; () where vLLM names none."""
    state = output.kv_connector_block_state
    blocks = state.get_block_ids(request_id) if state is not None else None
    return tuple(list(ids) for ids in blocks) if blocks is not None else ()


def without_null(block_ids: BlockIds) -> BlockIds:
    """-1 for vLLM's null block, 0, which stands where a sliding window has given its block back."""
    return tuple([block if block > 0 else -1 for block in ids] for ids in block_ids)


class BlockAges:
    """The step in which each block was begun, to tell which weights computed what it holds.

    block_tokens: tokens of a block of each cache group; block ids are unique over all groups.

    A block keeps the step of its first token: what is added to it later is younger, and does not count.
    """

    def __init__(self, block_tokens: Sequence[int]) -> None:
        self._block_tokens = tuple(block_tokens)
        self._steps = np.full(1024, -1, dtype=np.int64)  # -1: never

    def begins(self, start: int, count: int) -> bool:
        """Whether ``count`` tokens from position ``start`` on begin a block in some group."""
        return any(-(-start // size) * size < start + count for size in self._block_tokens)

    def begun(self, block_ids: BlockIds, start: int, stop: int, step: int) -> None:
        """Token positions ``[start, stop)`` are written in ``step``. block_ids: of every group, as vLLM has them."""
        for ids, size in zip(block_ids, self._block_tokens, strict=True):
            fresh = np.asarray(ids[-(-start // size) : -(-stop // size)], dtype=np.int64)
            if len(fresh):
                if (most := int(fresh.max())) >= len(self._steps):
                    more = np.full(2 * most, -1, dtype=np.int64)
                    more[: len(self._steps)] = self._steps
                    self._steps = more
                self._steps[fresh[fresh > 0]] = step  # block 0 is nobody's

    def oldest(self, block_ids: BlockIds, stop: int) -> int:
        """The step of the oldest block that holds token positions ``[0, stop)``; -1: one was never seen to be begun."""
        oldest = []
        for ids, size in zip(block_ids, self._block_tokens, strict=True):
            held = np.asarray(ids[: -(-stop // size)], dtype=np.int64)
            held = held[held > 0]
            if len(held):
                oldest.append(-1 if int(held.max()) >= len(self._steps) else int(self._steps[held].min()))
        return min(oldest, default=-1)
