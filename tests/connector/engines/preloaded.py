"""Scripts that drive vLLM, run in forks of a process that has imported it: the import takes longer than a tiny engine.

The process is multiprocessing's fork server. It does nothing but import (vllm_imports.py), so it has one thread and no
engine. Every script begins with those modules, and has its own environment, temporary folder and session. What is
decided when Python starts (PYTHONHASHSEED) or when vLLM is imported (its level of logging) needs a fresh interpreter.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO
from unittest import mock

HERE = Path(__file__).parent
AT_IMPORT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[2]}",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


class Script:
    """One that runs: `stdout` is a pipe, what it says on standard error goes to the file `log`."""

    def __init__(self, script: Path, text: str, environment: dict[str, str], log: Path) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["pytest", "vllm_imports"])  # pytest: a child imports what is __main__ here
        read, write = server.Pipe(duplex=False)
        with read, write, mock.patch.dict(os.environ, AT_IMPORT):  # the first start starts the server
            self._process = server.Process(target=_run, args=(script, text, environment, write, log))
            self._process.start()
            self.stdout: IO[str] = os.fdopen(os.dup(read.fileno()))

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit status, negative for a signal; None if it still runs then."""
        self._process.join(timeout_s)
        return self._process.exitcode

    def kill(self) -> None:
        """End it, if it still runs, and what it has started."""
        if self._process.is_alive() and self._process.pid:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self.stdout.close()


def _run(script: Path, text: str, environment: dict[str, str], stdout: Connection, log: Path) -> None:
    assert "vllm.v1.engine.core" in sys.modules, "the fork server could not import vllm_imports"
    os.setsid()
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stdin = io.StringIO(text)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may be another
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
