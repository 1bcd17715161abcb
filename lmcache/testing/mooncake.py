"""Mooncake's master, and processes that give memory to its store.

Its data ports listen on every address: use it in a network namespace that has loopback only, where ports are free.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from lmcache.testing.processes import environment, listens, wait_until

_OWNER = """
import json, sys
from lmcache.storage.registry import build_backend
backend = build_backend(json.loads(sys.argv[1]), "test")
print("ready" if backend._client is not None else "failed", flush=True)
sys.stdin.read()
"""


class MooncakeMaster:
    """A mooncake_master at ``port`` and the one above; its log is ``folder``/log. ``kill`` and ``start`` restart it."""

    def __init__(self, port: int, folder: Path, *flags: str) -> None:
        self._port, self._folder, self._flags = port, folder, flags
        self.start()

    def start(self) -> None:
        program = Path(sys.executable).parent / "mooncake_master"
        flags = f"-rpc_port={self._port} -rpc_address=127.0.0.1 -metrics_host=127.0.0.1 -metrics_port={self._port + 1}"
        flags += " -rpc_thread_num=2 -default_kv_lease_ttl=5000"
        for _ in range(2):  # now and then one ends, or hangs, before it listens
            with (self._folder / "log").open("ab") as log:
                self.process = subprocess.Popen([program, *flags.split(), *self._flags], stdout=log, stderr=log)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: listens(self._port) or self.process.poll() is not None)
            if self.process.poll() is None and listens(self._port):
                return
            self.kill()
        raise OSError(f"mooncake_master does not start: {(self._folder / 'log').read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> MooncakeMaster:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class MooncakeOwner:
    """A process that gives ``segment`` bytes of memory to the store of the master at ``port``."""

    def __init__(self, port: int, segment: int = 64 << 20) -> None:
        options = {"type": "remote", "url": f"mooncake://127.0.0.1:{port}", "segment": segment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWNER, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            self.kill()
            raise OSError(f"no memory could be given to the Mooncake master at port {port}")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> MooncakeOwner:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
