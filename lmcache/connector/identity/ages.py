"""When each of vLLM's blocks was last begun, to tell which weights computed what it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BlockAges:
    """Steps, by block. block_tokens: of a block of each cache group; block ids are unique over all groups.

    A block keeps the step of its first token: what is added to it later is younger, and does not count.
    """

    def __init__(self, block_tokens: Sequence[int]) -> None:
        self._block_tokens = tuple(block_tokens)
        self._steps = np.full(1024, -1, dtype=np.int64)  # -1: never

    def begins(self, start: int, count: int) -> bool:
        """Whether ``count`` tokens from position ``start`` on begin a block in some group."""
        return any(-(-start // size) * size < start + count for size in self._block_tokens)

    def begun(self, block_ids: tuple[list[int], ...], start: int, stop: int, step: int) -> None:
        """Token positions ``[start, stop)`` are written in ``step``. block_ids: of every group, as vLLM has them."""
        for ids, size in zip(block_ids, self._block_tokens, strict=True):
            fresh = np.asarray(ids[-(-start // size) : -(-stop // size)], dtype=np.int64)
            if len(fresh):
                if (most := int(fresh.max())) >= len(self._steps):
                    more = np.full(2 * most, -1, dtype=np.int64)
                    more[: len(self._steps)] = self._steps
                    self._steps = more
                self._steps[fresh[fresh > 0]] = step  # block 0 is nobody's

    def oldest(self, block_ids: tuple[list[int], ...], stop: int) -> int:
        """The step of the oldest block that holds token positions ``[0, stop)``; -1: one was never seen to be begun."""
        oldest = []
        for ids, size in zip(block_ids, self._block_tokens, strict=True):
            held = np.asarray(ids[: -(-stop // size)], dtype=np.int64)
            held = held[held > 0]
            if len(held):
                oldest.append(-1 if int(held.max()) >= len(self._steps) else int(self._steps[held].min()))
        return min(oldest, default=-1)
