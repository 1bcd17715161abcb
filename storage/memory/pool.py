"""One block of host memory a process, handed out in 4 KiB-aligned, reference-counted buffers."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmcache.errors import BufferStateError, ClosedError, ConfigError
from lmcache.forks import Home
from lmcache.storage.memory import host_memory
from lmcache.storage.memory.allocators import PAGE, build_allocator

__all__ = ["PAGE", "PinnedPool", "PoolBuffer"]

logger = logging.getLogger(__name__)


class PinnedPool:
    """Preallocated, touched and (on CUDA) pinned host memory. Thread-safe.

    Its lock is held for bookkeeping only, never for a copy; a batch of buffers is shared or released under one hold.

    capacity: bytes, rounded down to whole pages. pin: register with CUDA.
    huge_pages: False, True or "transparent", or "hugetlb" for reserved pages.
    numa_node: see ``host_memory.bind_to_node``. allocator, slot: see ``allocators.build_allocator``.
    """

    def __init__(
        self,
        capacity: int,
        *,
        pin: bool = False,
        huge_pages: host_memory.HugePages = True,
        numa_node: int | None = None,
        allocator: str = "auto",
        slot: int | None = None,
    ) -> None:
        self.capacity = capacity // PAGE * PAGE
        if self.capacity <= 0:
            raise ConfigError(f"memory.capacity: a pool needs at least {PAGE} bytes, got {capacity}")
        self._allocator = build_allocator(allocator, self.capacity, slot)
        self.largest = self._allocator.largest
        """Bytes of the largest buffer that there can be."""
        self._map, reserved = host_memory.map_memory(self.capacity, huge_pages)
        self.view = memoryview(self._map)[: self.capacity]
        first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(first)
        del first
        self.numa_node = host_memory.bind_to_node(self.address, self.capacity, numa_node, cuda=pin)
        host_memory.touch(self.address, self.capacity, reserved)
        self._pinned = pin and host_memory.pin(self.address, self.capacity)
        self._home = Home("this pool")
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._waiting = 0
        self.releases = 0
        """Goes up with every release of a handle; ``wait_released`` waits for the next one."""
        self.used_bytes = 0
        self._closed = False
        self._warned = False

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used_bytes

    def allocate(self, nbytes: int) -> PoolBuffer | None:
        """A buffer of ``nbytes``, or None when nothing free is long enough. Never waits."""
        if nbytes <= 0:
            raise ValueError(f"nbytes must be positive, got {nbytes}")
        self._home.check()
        size = self._allocator.rounded(nbytes)
        if size > self.largest and not self._warned:
            self._warned = True
            logger.warning("a buffer of %d bytes can never be had: the largest is %d", nbytes, self.largest)
        with self._lock:
            if self._closed:
                raise ClosedError("the pool is closed")
            start = self._allocator.take(size)
            if start is None:
                return None
            self.used_bytes += size
        return PoolBuffer(self, _Block(start, size), nbytes)

    def share_leading(self, buffers: Sequence[PoolBuffer]) -> list[PoolBuffer]:
        """New handles on the leading run of ``buffers`` that nobody has released meanwhile."""
        self._home.check()
        with self._lock:
            for count, buffer in enumerate(buffers):
                if buffer._released:
                    buffers = buffers[:count]
                    break
                buffer._block.holders += 1
        return [PoolBuffer(self, buffer._block, buffer.nbytes) for buffer in buffers]

    def release_all(self, buffers: Iterable[PoolBuffer]) -> None:
        """Release many handles. BufferStateError at the first that already was; those before it are released."""
        if self._home.left:
            return
        with self._lock:
            try:
                for buffer in buffers:
                    if buffer._released:
                        buffer._check()
                    buffer._released = True
                    block = buffer._block
                    block.holders -= 1
                    if not block.holders:
                        self._allocator.give(block.start, block.size)
                        self.used_bytes -= block.size
            finally:
                self.releases += 1
                if self._waiting:
                    self._released.notify_all()
                last = self._closed and not self.used_bytes
        if last:
            self._unmap()

    def wait_released(self, seen: int, timeout_s: float) -> bool:
        """Wait until ``releases`` is no longer ``seen``; False when it still is after ``timeout_s``."""
        self._home.check()
        with self._released:
            self._waiting += 1
            try:
                return self._released.wait_for(lambda: self.releases != seen or self._closed, timeout_s)
            finally:
                self._waiting -= 1

    def close(self) -> None:
        """Give the memory back; while a buffer is held, or a view looks at it, that waits for them. Idempotent."""
        if self._home.left:
            return
        with self._released:
            if self._closed:
                return
            self._closed = True
            self._released.notify_all()
            # A call that hangs in a tier may still write by address: the last handle to go takes the mapping with it.
            last = not self.used_bytes
        if last:
            self._unmap()

    def _unmap(self) -> None:
        if self._pinned:
            host_memory.unpin(self.address)
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            # A tensor or a memoryview still looks at it; the last one to go unmaps it.
            logger.debug("the pool is closed while buffers are still viewed")


@dataclass(slots=True, eq=False)
class _Block:
    """Bytes ``[start, start + size)`` of the pool, and how many handles there are on them."""

    start: int
    size: int
    holders: int = 1


class PoolBuffer:
    """A handle on a block of a PinnedPool (see ``Buffer`` in storage/base.py)."""

    __slots__ = ("_block", "_pool", "_released", "nbytes")

    def __init__(self, pool: PinnedPool, block: _Block, nbytes: int) -> None:
        self._pool = pool
        self._block = block
        self._released = False
        self.nbytes = nbytes

    @property
    def view(self) -> memoryview:
        self._check()
        start = self._block.start
        return self._pool.view[start : start + self.nbytes]

    @property
    def address(self) -> int:
        self._check()
        return self._pool.address + self._block.start

    @property
    def region(self) -> tuple[int, int]:
        """Address and bytes of the whole pool: what a transfer library registers once for all its buffers."""
        self._check()
        return self._pool.address, self._pool.capacity

    @property
    def shared(self) -> bool:
        """Whether other handles on the same bytes exist."""
        self._check()
        return self._block.holders > 1

    def share(self) -> PoolBuffer:
        handles = self._pool.share_leading((self,))
        if not handles:
            self._check()
        return handles[0]

    def release(self) -> None:
        self._pool.release_all((self,))

    def _check(self) -> None:
        if self._released:
            raise BufferStateError("this buffer handle was already released: each handle is released once")
