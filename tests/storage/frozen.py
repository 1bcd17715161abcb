"""What must hold when a real server is frozen (SIGSTOP) while it is written to."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from managers import NBYTES, keys, settle, store
from tier_faults import freeze

from lmcache.config import load_config
from lmcache.storage.manager import StorageManager
from lmcache.storage.registry import build_backend

DEADLINE_S = 1.0
Forget = Callable[[StorageManager], object]
FORGET: dict[str, Forget] = {
    "remove": lambda manager: manager.remove(keys(*range(1, 9))),
    "clear": lambda manager: manager.clear(),
}


def check_a_removal_holds(
    process: subprocess.Popen[Any],
    options: dict[str, Any],
    forget: Forget,
    sends: str = "put",
) -> None:
    """Chunks whose write ran out of time at a frozen server, which then were forgotten, do not come back with it.

    sends: the method of the backend that sends them; the server is frozen just before.
    """
    values = {"memory.capacity": 64 * NBYTES, "memory.huge_pages": False, "close_timeout_s": 2}
    limits = {"read_timeout_s": DEADLINE_S, "breaker.failures": 100, "retry.attempts": 1}
    backend = build_backend(options, "test")
    manager = StorageManager(load_config(overrides={**values, **limits}), tiers=[backend])
    numbers = range(1, 9)
    send = getattr(backend, sends)

    def send_to_the_frozen(*arguments: object) -> object:
        freeze(process)
        return send(*arguments)

    with contextlib.closing(manager), contextlib.closing(build_backend(options, "test")) as other:
        store(manager, 0)
        assert manager.flush(20)
        try:
            setattr(backend, sends, send_to_the_frozen)
            store(manager, *numbers)
            settle(lambda: manager.health().tiers[0].failures > 0, "the write does not fail")
            assert manager.flush(20)
            setattr(backend, sends, send)
            forget(manager)
            assert manager.contains(keys(1)) == 0
        finally:
            process.send_signal(signal.SIGCONT)

        def paid() -> bool:
            assert not any(manager.contains([key]) for key in keys(*numbers)), "it came back"
            return manager.health().tiers[0].owed_removals == 0 and not manager.health().tiers[0].owes_clear

        settle(paid, "it is owed for ever")
        assert [number for number in numbers if other.contains(keys(number))] == []
        store(manager, 1)
        assert manager.flush(20)
        assert other.contains(keys(1)) == 1, "afterwards it can be stored again"
