"""Chunks as objects of an S3 service, by NIXL's OBJ plugin.

An object is header and payload in one, so that it is there whole or not at all; it goes through memory of our own. That
is also where a late transfer may go on to write, which nobody can stop once NIXL has begun it. NIXL can neither list
nor delete objects: a journal remembers them, and a removed one is overwritten with a single byte.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmcache.errors import ClosedError, CorruptChunkError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.indexed.backend import Medium
from lmcache.storage.backends.nixl.agent import Agent, NixlError, Transfer
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.files.journal import Journal
from lmcache.storage.memory.pool import PoolBuffer
from lmcache.storage.memory.staging import Staging
from lmcache.storage.naming import chunk_path
from lmcache.storage.run.threads import Threads

logger = logging.getLogger(__name__)

TOMBSTONE = b"-"
QUERIES = 2
_hanging: set[NixlObjects] = set()
"""Those with late transfers. NIXL goes on to use their memory and their agents, so these may never be given back."""


@atexit.register
def _leave_to_nixl() -> None:
    """To destroy an agent that has transfers under way would crash the process as it ends."""
    for medium in _hanging:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(medium))


class NixlObjects(Medium):
    """One object a chunk: ``<prefix><format fingerprint>/<tenant and tags>/<digest>.kv``."""

    def __init__(self, journal: Path, prefix: str, parameters: dict[str, str], timeout_s: float, staging: int) -> None:
        self._agent = Agent("OBJ", parameters)
        self._journal = Journal(journal)
        self._staging = Staging(staging)
        self._queries = Threads("nixl", QUERIES)
        self._prefix, self._timeout_s = prefix, timeout_s
        self._numbers = itertools.count(1)
        self._late: list[tuple[Transfer, list[PoolBuffer]]] = []
        self._lock = threading.Lock()

    def scan(self) -> list[tuple[ChunkKey, int]]:
        return self._journal.items()

    def find(self, key: ChunkKey) -> int:
        return self._journal.size(key)

    def delete(self, key: ChunkKey) -> bool:
        if not self._journal.remove(key):
            return False
        stage = self._staging.take(len(TOMBSTONE), self._timeout_s)
        stage.view[:] = TOMBSTONE
        failure = self._move("WRITE", [key], [stage])
        if failure is not None:
            raise StorageError(f"cannot remove {self._name(key)}: {failure}")
        return True

    def close(self) -> None:
        self._reap()
        self._journal.close()
        if not self._queries.close(0) or self._late:
            logger.warning(
                "closed while %d transfers hang: %d bytes are left to them", len(self._late), self._staging.capacity
            )
            _hanging.add(self)
            return
        self._agent.close()
        self._staging.close()

    def read(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[bool | StorageError]:
        outcomes: list[bool | StorageError] = []
        wanted = [HEADER_BYTES + buffer.nbytes for buffer in into]
        right = next((i for i, key in enumerate(keys) if self._journal.size(key) != wanted[i]), len(keys))
        for stages in self._stages(wanted[:right]):
            part = slice(len(outcomes), len(outcomes) + len(stages))
            for stage in stages:
                stage.view[:HEADER_BYTES] = bytes(HEADER_BYTES)  # a short object leaves what was here before
            outcomes += self._read_staged(keys[part], into[part], stages)
            if outcomes[-1] is not True:
                return outcomes
        return outcomes if right == len(keys) else [*outcomes, False]

    def write(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> list[StorageError | None]:
        outcomes: list[StorageError | None] = []
        for stages in self._stages([HEADER_BYTES + buffer.nbytes for buffer in buffers]):
            part = slice(len(outcomes), len(outcomes) + len(stages))
            for key, buffer, stage in zip(keys[part], buffers[part], stages, strict=True):
                stage.view[:HEADER_BYTES] = encode_header(key, buffer.view)
                stage.view[HEADER_BYTES:] = buffer.view
            failure = self._move("WRITE", keys[part], stages)
            for key, buffer in zip(keys[part], buffers[part], strict=True):
                if failure is None:
                    self._journal.add(key, HEADER_BYTES + buffer.nbytes)
                    outcomes.append(None)
                else:
                    outcomes.append(StorageError(f"cannot write {self._name(key)}: {failure}"))
        return outcomes

    def _read_staged(
        self, keys: Sequence[ChunkKey], into: Sequence[Buffer], stages: list[PoolBuffer]
    ) -> list[bool | StorageError]:
        held = [stage.share() for stage in stages]  # as _move gives the stages back
        try:
            failure = self._move("READ", keys, stages)
            if isinstance(failure, NixlError) and len(keys) > 1:
                return self._read_singly(keys, into)
            if failure is not None:
                return [self._explain(keys[0], failure)]
            outcomes: list[bool | StorageError] = []
            for key, buffer, stage in zip(keys, into, held, strict=True):
                buffer.view[:] = stage.view[HEADER_BYTES:]
                try:
                    check_chunk(stage.view[:HEADER_BYTES], key, buffer.view)
                except CorruptChunkError as error:
                    return [*outcomes, error]
                outcomes.append(True)
            return outcomes
        finally:
            self._staging.give(*held)

    def _read_singly(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[bool | StorageError]:
        """NIXL does not say which object of a batch failed."""
        outcomes: list[bool | StorageError] = []
        for key, buffer in zip(keys, into, strict=True):
            stage = self._staging.take(HEADER_BYTES + buffer.nbytes, self._timeout_s)
            stage.view[:HEADER_BYTES] = bytes(HEADER_BYTES)
            outcomes += self._read_staged([key], [buffer], [stage])
            if outcomes[-1] is not True:
                break
        return outcomes

    def _explain(self, key: ChunkKey, failure: StorageError) -> bool | StorageError:
        """False when the object is not there any more; otherwise it is the service that failed."""
        error = StorageError(f"cannot read {self._name(key)}: {failure}")
        if not isinstance(failure, NixlError):
            return error
        try:
            names = [self._name(key)]
            there = self._queries.call(lambda: self._agent.exists(names), self._timeout_s, "NIXL's query")
        except (StorageError, ClosedError):
            return error
        if there != [False]:
            return error
        self._journal.remove(key)
        return False

    def _move(self, operation: str, keys: Sequence[ChunkKey], stages: list[PoolBuffer]) -> StorageError | None:
        """Transfer whole objects; gives the stages back, those of a late transfer when it has ended."""
        self._reap()
        numbers = [next(self._numbers) for _ in keys]
        late = False
        try:
            with self._agent.registrations.of(stages):
                transfer = self._agent.begin(
                    operation,
                    [(stage.address, stage.nbytes, 0) for stage in stages],
                    [(0, stage.nbytes, number) for stage, number in zip(stages, numbers, strict=True)],
                    [self._name(key) for key in keys],
                )
                if not transfer.wait(self._timeout_s):
                    late = True
                    with self._lock:
                        self._late.append((transfer, stages))
                        _hanging.add(self)
                    return StorageError(f"no answer within {self._timeout_s} s")
            return None
        except NixlError as error:
            return error
        finally:
            if not late:
                self._staging.give(*stages)

    def _stages(self, sizes: Sequence[int]) -> Iterator[list[PoolBuffer]]:
        """Staging memory for runs of consecutive sizes, as many at a time as there is memory for."""
        index = 0
        while index < len(sizes):
            self._reap()
            stages = [self._staging.take(sizes[index], self._timeout_s)]
            while index + len(stages) < len(sizes):
                more = self._staging.take_now(sizes[index + len(stages)])
                if more is None:
                    break
                stages.append(more)
            index += len(stages)
            yield stages

    def _reap(self) -> None:
        """Take back the memory of late transfers that have ended."""
        with self._lock:
            late, self._late = self._late, []
        for transfer, stages in late:
            try:
                over = transfer.wait(0)
            except NixlError:
                over = True
            if over:
                self._staging.give(*stages)
            else:
                with self._lock:
                    self._late.append((transfer, stages))
                    _hanging.add(self)
        with self._lock:
            if not self._late:
                _hanging.discard(self)

    def _name(self, key: ChunkKey) -> str:
        return self._prefix + chunk_path(key)
