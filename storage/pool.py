"""One block of host memory a process, handed out in 4 KiB-aligned buffers.

0        4K                                              capacity
├─ used ─┼──── free ────┼── used ──┼── used ──┼── free ──┤
a released block merges with the free runs at both sides; a request takes the smallest run that fits
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from bisect import bisect_left, insort

from lmcache.errors import BufferStateError, ClosedError, ConfigError

logger = logging.getLogger(__name__)

PAGE = 4096


class PinnedPool:
    """Preallocated, touched and (on CUDA) pinned host memory with a best-fit allocator. Thread-safe; never blocks.

    capacity: bytes, rounded down to whole pages. pin: register with CUDA. huge_pages: ask for transparent huge pages.
    """

    def __init__(self, capacity: int, *, pin: bool = False, huge_pages: bool = True) -> None:
        self.capacity = capacity // PAGE * PAGE
        if self.capacity <= 0:
            raise ConfigError(f"a pool needs at least {PAGE} bytes, got {capacity}")
        self._map = mmap.mmap(-1, self.capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages:
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                logger.warning("huge pages were refused (%s): small pages are used", error)
        self.view = memoryview(self._map)
        first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(first)
        # The first touch of fresh memory costs several times a copy, so it happens here and not in a request.
        ctypes.memset(self.address, 0, self.capacity)
        del first
        self._pinned = pin and _pin(self.address, self.capacity)
        self._lock = threading.Lock()
        self._free_by_start: dict[int, int] = {0: self.capacity}
        self._free_by_end: dict[int, int] = {self.capacity: 0}
        self._sizes: list[tuple[int, int]] = [(self.capacity, 0)]
        self._references: dict[int, int] = {}
        self.used_bytes = 0
        self._closed = False

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used_bytes

    def allocate(self, nbytes: int) -> PoolBuffer | None:
        """A buffer of ``nbytes``, or None when no free run is long enough."""
        size = -(-nbytes // PAGE) * PAGE
        if size <= 0:
            raise ValueError(f"nbytes must be positive, got {nbytes}")
        with self._lock:
            if self._closed:
                raise ClosedError("the pool is closed")
            index = bisect_left(self._sizes, (size, -1))
            if index == len(self._sizes):
                return None
            length, start = self._sizes[index]
            self._take(start, length)
            if length > size:
                self._give(start + size, length - size)
            self._references[start] = 1
            self.used_bytes += size
        return PoolBuffer(self, start, nbytes)

    def close(self) -> None:
        """Unpin; the memory goes back to the system when nobody views it any more. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._pinned:
            _unpin(self.address)
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            # A tensor or a memoryview still looks at it; the last one to go unmaps it.
            logger.debug("the pool is closed while buffers are still viewed")

    def _share(self, start: int) -> None:
        with self._lock:
            self._references[start] += 1

    def _release(self, start: int, nbytes: int) -> None:
        size = -(-nbytes // PAGE) * PAGE
        with self._lock:
            self._references[start] -= 1
            if self._references[start]:
                return
            del self._references[start]
            self.used_bytes -= size
            begin, length = start, size
            if (before := self._free_by_end.get(begin)) is not None:
                self._take(before, begin - before)
                begin, length = before, length + begin - before
            if (after := self._free_by_start.get(start + size)) is not None:
                self._take(start + size, after)
                length += after
            self._give(begin, length)

    def _take(self, start: int, length: int) -> None:
        del self._free_by_start[start], self._free_by_end[start + length]
        del self._sizes[bisect_left(self._sizes, (length, start))]

    def _give(self, start: int, length: int) -> None:
        self._free_by_start[start] = length
        self._free_by_end[start + length] = start
        insort(self._sizes, (length, start))


class PoolBuffer:
    """A handle on a block of a PinnedPool (see ``Buffer`` in storage/base.py)."""

    __slots__ = ("_pool", "_released", "_start", "nbytes")

    def __init__(self, pool: PinnedPool, start: int, nbytes: int) -> None:
        self._pool = pool
        self._start = start
        self._released = False
        self.nbytes = nbytes

    @property
    def view(self) -> memoryview:
        self._check()
        return self._pool.view[self._start : self._start + self.nbytes]

    @property
    def address(self) -> int:
        self._check()
        return self._pool.address + self._start

    @property
    def region(self) -> tuple[int, int]:
        """Address and bytes of the whole pool: what a transfer library registers once for all its buffers."""
        self._check()
        return self._pool.address, self._pool.capacity

    @property
    def shared(self) -> bool:
        """Whether other handles on the same bytes exist."""
        self._check()
        return self._pool._references[self._start] > 1

    def share(self) -> PoolBuffer:
        self._check()
        self._pool._share(self._start)
        return PoolBuffer(self._pool, self._start, self.nbytes)

    def release(self) -> None:
        self._check()
        self._released = True
        self._pool._release(self._start, self.nbytes)

    def _check(self) -> None:
        if self._released:
            raise BufferStateError("this buffer handle was already released: each handle is released once")


def _pin(address: int, nbytes: int) -> bool:
    import torch

    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
    if code:
        logger.warning("cudaHostRegister failed with code %d: copies will go through pageable memory", code)
    return code == 0


def _unpin(address: int) -> None:
    import torch

    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
