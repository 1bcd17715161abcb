"""What every tier must stand, whatever it keeps chunks in."""

from __future__ import annotations

import itertools
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from managers import Open, keys, read, settle, store
from scripted import ScriptedBackend

from lmcache.errors import ClosedError, StorageError
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import make_key, take

CHUNK = 20_480
FEW = {
    "read_timeout_s": 2.0,
    "breaker__failures": 2,
    "breaker__cooldown_s": 0.05,
    "retry__attempts": 2,
    "retry__backoff_s": 0.001,
}


def freeze(process: subprocess.Popen[Any]) -> None:
    """SIGSTOP, and wait until it has stopped: its threads do not at once."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    settle(
        lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()),
        "the process does not stop",
    )


def check_manager_goes_on(
    open_manager: Open,
    tier: StorageBackend,
    break_tier: Callable[[], None],
    mend_tier: Callable[[], None],
    *,
    forgets: bool = False,
    **options: object,
) -> None:
    """A tier that fails is a miss in time, another serves; its breaker opens, and closes when the tier works again.

    forgets: what the tier held is gone when it works again.
    """
    other = ScriptedBackend()
    manager = open_manager(tier, other, **{**FEW, **options})
    store(manager, *range(4))
    assert manager.flush(10)

    def read_below() -> int:
        manager.remove(keys(*range(4)), tier="memory")
        began = time.monotonic()
        found = read(manager, *range(4))
        assert time.monotonic() - began < 10
        return found

    assert read_below() == 4
    break_tier()

    def opens() -> bool:
        assert read_below() == 4, "the tier behind it serves"
        return manager.stats()["open_breakers"] == 1

    settle(opens, "the breaker never opens")
    mend_tier()
    other.chunks.clear()
    number = itertools.cycle(range(100, 150))  # few, as writes go on while reads are left alone

    def closes() -> bool:
        new = next(number)
        store(manager, new)
        manager.flush(10)
        manager.remove(keys(new), tier="memory")
        other.chunks.clear()
        return read(manager, new) == 1 and manager.stats()["open_breakers"] == 0

    settle(closes, "the tier never serves again")
    assert forgets or read_below() == 4
    settle(lambda: manager.health().tiers[0].hung_threads == 0, "its calls never come back")


def work_until_closed(
    backend: StorageBackend, pool: PinnedPool, busy: Callable[[], bool]
) -> list[type[BaseException] | None]:
    """Close a backend that three threads use, once it is ``busy``; how each of them ended."""
    ends: list[type[BaseException] | None] = []

    def work(first: int) -> None:
        buffers = [take(pool, CHUNK) for _ in range(3)]
        try:
            for number in range(first, first + 10**6, 3):
                numbers = [make_key(number + n) for n in range(3)]
                for index, buffer in enumerate(buffers):
                    buffer.view[:8] = (number + index).to_bytes(8, "big")
                assert backend.put(numbers, buffers) == 3
                assert backend.get(numbers, buffers) == 3
                for index, buffer in enumerate(buffers):
                    assert bytes(buffer.view[:8]) == (number + index).to_bytes(8, "big")
        except (ClosedError, StorageError, AssertionError) as error:
            ends.append(type(error))
        finally:
            for buffer in buffers:
                buffer.release()

    threads = [threading.Thread(target=work, args=(n * 10**7,)) for n in range(3)]
    for thread in threads:
        thread.start()
    settle(busy, "nothing is written")
    backend.close()
    for thread in threads:
        thread.join(10)
    return ends
