"""Loads that failed: vLLM is told of them, and nothing that was computed on top of them is stored.

``worker.py`` fills it; ``vllm.py`` hands it to vLLM (``get_block_ids_with_load_errors``, ``get_transfer_results``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lmcache.connector.metadata import Learn, Load, Store
from lmcache.engine.layout import Plane

# vLLM may have launched the next steps before it hears of a failed load: what they compute on top is not stored either.
TAINTED_STEPS = 3


class FailedLoads:
    """Those of one worker. vLLM hears of a load by its request (``whole_request``) or by its blocks."""

    def __init__(self, planes: Sequence[Plane]) -> None:
        self._planes = planes
        self._requests: set[str] = set()
        self._blocks: set[int] = set()
        self._tainted_requests: set[str] = set()
        self._tainted_blocks: deque[set[int]] = deque(maxlen=TAINTED_STEPS)

    def begin_step(self) -> None:
        self._tainted_blocks.append(set())

    def add(self, load: Load) -> None:
        """A load of this step has failed: its pages hold anything."""
        blocks: set[int] = set()
        for plane in self._planes:
            first, last = load.start // plane.block_tokens, -(-load.stop // plane.block_tokens)
            blocks.update(load.block_ids[plane.group][first:last])
        blocks -= {-1}
        self._tainted_requests.add(load.request_id)
        self._tainted_blocks[-1] |= blocks
        if load.whole_request:
            self._requests.add(load.request_id)
        else:
            self._blocks |= blocks

    def take_requests(self) -> set[str]:
        """The requests to tell vLLM of, since the last call."""
        requests, self._requests = self._requests, set()
        return requests

    def take_blocks(self) -> set[int]:
        """The blocks to tell vLLM of, since the last call."""
        blocks, self._blocks = self._blocks, set()
        return blocks

    def taints(self, store: Store | Learn) -> bool:
        """Whether what is to be stored was computed on top of a failed load."""
        if store.request_id in self._tainted_requests:
            return True
        tainted = set().union(*self._tainted_blocks)
        if tainted and any(tainted.intersection(ids) for ids in store.block_ids):
            self._tainted_requests.add(store.request_id)
            return True
        return False

    def finished(self, request_ids: set[str]) -> None:
        """These requests have ended."""
        self._tainted_requests -= request_ids
