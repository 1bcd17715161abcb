"""A real ``lmcache server`` process on a free port of loopback."""

from __future__ import annotations

import signal
import subprocess
import sys

from lmcache.testing.processes import environment as child_environment


class ServerProcess:
    """Started on construction; ``port`` stays the same over ``restart``."""

    def __init__(self, *overrides: str, environment: dict[str, str] | None = None) -> None:
        self._overrides = overrides
        self._environment = environment or {}
        self.port = self.http_port = 0
        self.start()

    def start(self) -> None:
        ports = (f"port={self.port}", f"http_port={self.http_port}")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lmcache.cli", "server", *ports, *self._overrides],
            env=child_environment(**self._environment),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "listening on" in line:
                self.port = int(line.split(" over ")[0].split(":")[-1])
            if "metrics and health on" in line:
                self.http_port = int(line.split(":")[-1])
                return
        raise OSError("the server did not start: " + "".join(said))

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def terminate(self) -> tuple[int, str]:
        """Exit status and what it said since it started."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> tuple[int, str]:
        if self.process.stderr is None or self.process.stderr.closed:
            return self.process.returncode, ""
        self.process.send_signal(number)
        said = self.process.stderr.read()
        self.process.stderr.close()
        return self.process.wait(30), said
