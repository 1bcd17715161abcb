"""Which chunks that were read from a lower tier stay in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from lmcache.keys import ChunkKey

REMEMBERED_KEYS = 1 << 16


def promotion(name: str) -> Callable[[ChunkKey], bool]:
    """``always``, ``never``, or ``second_hit``: a function that says of each chunk that was read whether it stays."""
    if name == "second_hit":
        return SecondHit(REMEMBERED_KEYS)
    return lambda key: name == "always"


class SecondHit:
    """Keeps what is read a second time while its key is among the last ``most`` that were read once.

    So what is read only once does not push out what is read often. Thread-safe.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._once: OrderedDict[ChunkKey, None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: ChunkKey) -> bool:
        with self._lock:
            if key in self._once:
                del self._once[key]
                return True
            self._once[key] = None
            if len(self._once) > self._most:
                self._once.popitem(last=False)
            return False
