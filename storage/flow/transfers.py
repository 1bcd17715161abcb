"""Chunks copied or moved from one tier to another, on an administrator's word."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

from lmcache.errors import ConfigError
from lmcache.keys import ChunkKey
from lmcache.storage.flow.tier import LowerTier
from lmcache.storage.memory.pool import PoolBuffer
from lmcache.storage.memory.tier import MemoryTier
from lmcache.storage.run.pace import SHARE

BATCH_CHUNKS = 256

Held = list[tuple[ChunkKey, PoolBuffer]]


class Transfers:
    """Between memory and the lower tiers, by name. What is not found, or does not answer in time, stays where it is."""

    def __init__(self, memory: MemoryTier, tiers: Sequence[LowerTier], batch_bytes: int) -> None:
        self._memory = memory
        self._tiers = {tier.name: tier for tier in tiers}
        self._batch_bytes = batch_bytes

    def copy(
        self, keys: Sequence[ChunkKey], source: str, target: str, timeout_s: float, *, forget: bool = False
    ) -> list[ChunkKey]:
        """Copy what tier ``source`` has of ``keys`` to ``target``; returns those that it is known to hold now.

        forget: remove those from ``source`` (a move).
        """
        self._check(source, target)
        ends_at = time.monotonic() + timeout_s
        done: list[ChunkKey] = []
        for held in self._from(keys, source, ends_at):
            copied = self._into(target, held, ends_at, settled=not forget)
            if forget and source == self._memory.name:
                self._memory.remove(copied)
            elif forget and copied:
                self._tiers[source].remove(copied, max(0.0, ends_at - time.monotonic()))
            done += copied
        return done

    def _check(self, source: str, target: str) -> None:
        known = [self._memory.name, *self._tiers]
        for name in (source, target):
            if name not in known:
                raise ConfigError(f"unknown tier {name!r}; known: {', '.join(known)}")
        if source == target:
            raise ConfigError(f"source and target are the same tier, {source!r}")

    def _from(self, keys: Sequence[ChunkKey], source: str, ends_at: float) -> Iterator[Held]:
        """Batches of chunks that are there; whoever takes one releases its handles."""
        first = 0
        while first < len(keys) and time.monotonic() < ends_at:
            wanted = keys[first : first + BATCH_CHUNKS]
            if source == self._memory.name:
                held = list(zip(wanted, self._memory.pin(wanted), strict=False))
            else:
                tier = self._tiers[source]
                left = max(0.0, ends_at - time.monotonic())
                most = tier.read_pace.batch_bytes(left * SHARE, self._batch_bytes)
                nothing: Held = []
                held = tier.transfer(partial(self._read, tier, wanted, most), nothing, left, self._release)
            if held:
                yield held
            # Behind a run that ended early lies a key that is not there, or a full batch.
            first += len(held) or 1

    def _read(self, tier: LowerTier, keys: Sequence[ChunkKey], most: int) -> Held:
        buffers: list[PoolBuffer] = []
        got = nbytes = 0
        try:
            for size in tier.sizes(keys):
                if (buffers and nbytes + size > most) or (buffer := self._memory.allocate(size)) is None:
                    break
                buffers.append(buffer)
                nbytes += size
            got = tier.get(keys[: len(buffers)], buffers) if buffers else 0
        finally:
            self._memory.pool.release_all(buffers[got:])
        return list(zip(keys, buffers[:got], strict=False))

    def _release(self, held: Held) -> None:
        self._memory.pool.release_all(buffer for _, buffer in held)

    def _into(self, target: str, held: Held, ends_at: float, *, settled: bool) -> list[ChunkKey]:
        """Put chunks, releasing their handles; returns the keys of those that are held there."""
        if target == self._memory.name:
            generation = self._memory.generation
            return [key for key, buffer in held if self._memory.insert(key, buffer, generation, settled=settled)]
        return _write(self._tiers[target], held, ends_at)


def _write(tier: LowerTier, held: Held, ends_at: float) -> list[ChunkKey]:
    """Write by the tier's queue, which keeps the handles even after ``ends_at``; returns what was written by then."""
    written: list[ChunkKey] = []
    settled = 0
    changed = threading.Condition()

    def on_settled(keys: Sequence[ChunkKey], held: bool) -> None:
        nonlocal settled
        with changed:
            settled += len(keys)
            written.extend(keys if held else ())
            changed.notify()

    queued = sum([tier.writes.put(key, buffer, settled=on_settled, wait_until=ends_at) for key, buffer in held])
    with changed:
        changed.wait_for(lambda: settled == queued, max(0.0, ends_at - time.monotonic()))
        return list(written)
