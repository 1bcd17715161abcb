"""Chunks as files that NIXL reads and writes straight from and into the buffers it is given."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lmcache.storage.backends.indexed.files import FileMedium, Item, Operation
from lmcache.storage.backends.nixl.agent import Agent, NixlError
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PoolBuffer

logger = logging.getLogger(__name__)


class NixlFiles(FileMedium):
    """The kernel does not give back a transfer that it has begun, so one that is slower than ``timeout_s`` is reported
    and waited for, as any other read of a disk is; the deadline of a request is the manager's.
    """

    def __init__(self, plugin: str, path: Path, parameters: dict[str, str], timeout_s: float, direct: bool) -> None:
        super().__init__(path, "nixl", direct=direct, timeout_s=timeout_s)
        self._agent = Agent(plugin, parameters)

    def close(self) -> None:
        self._agent.close()
        super().close()

    def move(self, operation: Operation, items: Sequence[Item], headers: PoolBuffer) -> list[Exception | None]:
        """One transfer for all; each alone when that fails, as NIXL does not say which of them it was."""
        memory, remote = [], []
        for item in items:
            memory += [(item.header_address, HEADER_BYTES, 0), (item.buffer.address, item.buffer.nbytes, 0)]
            remote += [(0, HEADER_BYTES, item.file), (HEADER_BYTES, item.buffer.nbytes, item.file)]
        try:
            with self._agent.registrations.of([*(item.buffer for item in items), headers]):
                transfer = self._agent.begin(operation, memory, remote, [""] * len(remote))
                while not transfer.wait(self._timeout_s):
                    logger.warning("NIXL's %s of %d files is slower than %s s", operation, len(items), self._timeout_s)
            return [None] * len(items)
        except NixlError as error:
            if len(items) == 1:
                return [error]
        return [self.move(operation, [item], headers)[0] for item in items]
