"""Memory that a transfer library must know before it reads or writes it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar, runtime_checkable

from lmcache.errors import StorageError
from lmcache.storage.base import Buffer

H = TypeVar("H")
Range = tuple[int, int]
"""Address and length in bytes."""


@runtime_checkable
class Regional(Protocol):
    """A buffer that says which block of memory it is cut from."""

    @property
    def region(self) -> Range: ...


class Registrations(Generic[H]):
    """Registers blocks of memory on first use, one a pool where buffers say their pool, and keeps the latest.

    register, unregister: of the library; called under a lock, so they must not do I/O.
    most: registrations that are kept beside those in use.
    """

    def __init__(self, register: Callable[[int, int], H], unregister: Callable[[H], None], most: int = 64) -> None:
        self._register, self._unregister, self._most = register, unregister, most
        self._known: OrderedDict[Range, H] = OrderedDict()
        self._users: dict[Range, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    @contextmanager
    def of(self, buffers: Sequence[Buffer]) -> Iterator[None]:
        """While this lasts, the memory of ``buffers`` is registered."""
        ranges = {_range(buffer) for buffer in buffers}
        taken: list[Range] = []
        try:
            with self._lock:
                for memory in sorted(ranges):
                    self._take(memory)
                    taken.append(memory)
            yield
        finally:
            with self._lock:
                for memory in taken:
                    self._users[memory] -= 1
                    if not self._users[memory]:
                        del self._users[memory]

    def close(self) -> None:
        with self._lock:
            while self._known:
                self._unregister(self._known.popitem()[1])

    def _take(self, memory: Range) -> None:
        if memory not in self._known:
            # Memory that was given back and mapped again may lie across what is registered from before.
            for old in [known for known in self._known if _overlap(known, memory)]:
                if old in self._users:
                    raise StorageError(f"memory {memory} overlaps {old}, which is in a transfer")
                self._unregister(self._known.pop(old))
            self._known[memory] = self._register(*memory)
        self._known.move_to_end(memory)
        self._users[memory] = self._users.get(memory, 0) + 1
        idle = [known for known in self._known if known not in self._users]
        for old in idle[: max(0, len(idle) - self._most)]:
            self._unregister(self._known.pop(old))


def _range(buffer: Buffer) -> Range:
    return buffer.region if isinstance(buffer, Regional) else (buffer.address, buffer.nbytes)


def _overlap(one: Range, other: Range) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]
