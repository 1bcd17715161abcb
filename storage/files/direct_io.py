"""A chunk between a file and a buffer, past the page cache where the file system lets us.

    file     0          4096                                       4096 + nbytes
             │ header   │ whole pages of the payload    │ its rest │
    memory   │ our page │ the buffer itself             │ our page │

O_DIRECT moves whole pages, to and from addresses that are multiples of a page. So the rest of a payload that does not
end with a page goes through a page of ours: nothing outside a buffer's bytes is read, written, or left on the disk, and
any buffer will do whose first byte is page-aligned. The file is cut to its exact length afterwards.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Sequence

from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.files.regular_files import Spot

PAGE = 4096
Transfer = Callable[[int, Sequence[memoryview], int], int]


class _Pages(threading.local):
    """The two page-aligned pages of one thread."""

    def __init__(self) -> None:
        view = memoryview(mmap.mmap(-1, HEADER_BYTES + PAGE))
        self.header, self.rest = view[:HEADER_BYTES], view[HEADER_BYTES:]


_pages = _Pages()


def write_chunk(file: int, header: bytes, payload: memoryview, *, direct: bool, old_size: int) -> None:
    """Write a file, whatever its ``old_size`` bytes are. direct: O_DIRECT is on, and ``payload`` is page-aligned."""
    _pages.header[:] = header
    parts, whole = _parts(payload, direct)
    if rest := payload.nbytes - whole:
        _pages.rest[:rest] = payload[whole:]
        _pages.rest[rest:] = bytes(PAGE - rest)
    total = sum(part.nbytes for part in parts)
    _transfer(os.pwritev, file, parts, total)
    size = HEADER_BYTES + payload.nbytes
    if max(old_size, total) != size:
        os.ftruncate(file, size)


def read_chunk(file: int, payload: memoryview, *, direct: bool) -> memoryview:
    """Fill ``payload``; returns the header, valid until this thread's next call. OSError when the file ends early."""
    parts, whole = _parts(payload, direct)
    _transfer(os.preadv, file, parts, HEADER_BYTES + payload.nbytes)
    if rest := payload.nbytes - whole:
        payload[whole:] = _pages.rest[:rest]
    return _pages.header


def read_header(file: int) -> memoryview:
    """The header alone, valid until this thread's next call."""
    _transfer(os.preadv, file, [_pages.header], HEADER_BYTES)
    return _pages.header


def probe_direct(probe: Spot) -> OSError | None:
    """Whether an (empty, existing) file can be written with O_DIRECT: None, or the refusal."""
    try:
        file, _ = probe.open(os.O_RDWR | os.O_DIRECT)
        try:
            os.pwritev(file, [_pages.rest], 0)
        finally:
            os.close(file)
    except OSError as error:
        # Anything else, such as a full disk, says nothing about it.
        return error if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) else None
    return None


def _parts(payload: memoryview, direct: bool) -> tuple[list[memoryview], int]:
    """What is transferred, in order, and how many bytes of the payload are so in place."""
    whole = payload.nbytes // PAGE * PAGE if direct else payload.nbytes
    parts = [_pages.header]
    if whole:
        parts.append(payload[:whole])
    if whole < payload.nbytes:
        parts.append(_pages.rest)
    return parts, whole


def _transfer(call: Transfer, file: int, parts: Sequence[memoryview], wanted: int) -> None:
    """``transfer``; OSError when the file ends before."""
    if (done := transfer(call, file, parts, wanted)) < wanted:
        raise OSError(errno.EIO, f"the file ended after {done} of {wanted} bytes")


def transfer(call: Transfer, file: int, parts: Sequence[memoryview], wanted: int) -> int:
    """``call`` (preadv, pwritev) until ``wanted`` bytes are done or the file ends; returns how many were done."""
    done = call(file, parts, 0)
    while done < wanted:
        skip, rest = done, []
        for part in parts:
            if skip < part.nbytes:
                rest.append(part[skip:])
            skip = max(0, skip - part.nbytes)
        if done % PAGE:
            # Stopped within a page, by a limit say: O_DIRECT cannot go on from there, nor tell why.
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)
        more = call(file, rest, done)
        if more <= 0:
            break
        done += more
    return done
