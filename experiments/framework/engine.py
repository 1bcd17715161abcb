"""A real vLLM in a process of its own: started, sent steps, shut down; its requests come back as rows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from experiments.framework.config import ROOT, EngineConfig
from experiments.framework.model import PACKAGES, folder_of
from experiments.framework.workloads import Request

RESETS = ("none", "vllm", "all")


@dataclass(frozen=True)
class Step:
    """Requests sent one after another, each timed, and what is emptied before each of them.

    reset: ``vllm`` empties vLLM's own prefix cache, ``all`` the connector's caches too, ``none`` nothing.
    """

    phase: str
    requests: list[Request]
    reset: str = "none"

    def __post_init__(self) -> None:
        if self.reset not in RESETS:
            raise ValueError(f"reset is {self.reset!r}; known: {', '.join(RESETS)}")


@dataclass(frozen=True)
class Row:
    """One request: what was sent, what came back, how long it took."""

    phase: str
    document: str
    question: int
    run: int
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float  # vLLM's own: from the request's arrival in the engine's front end to its first token
    total_s: float
    tokens: list[int]
    text: str

    @property
    def key(self) -> str:
        return f"{self.document}#{self.question}"


@dataclass(frozen=True)
class Job:
    """How the engine of one child process is started."""

    model: str
    engine: dict[str, Any]
    kv_transfer: dict[str, Any] | None
    max_tokens: int
    seed: int
    run: int = 0


class EngineFailed(RuntimeError):
    """vLLM did not start, or died; the message ends with the end of its log."""


class Child:
    """A vLLM process: reads messages from its stdin, a JSON document a line, and writes events to its stdout likewise.

    Leaving the ``with`` block ends its input and waits for it; by an exception, kills it and whatever it started.
    Raises EngineFailed when the child ends before it is told to, or with another status than 0.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start ``command`` in the repository; what it writes to stderr goes to ``log``."""
        self._log = log
        with log.open("w") as err:
            self._child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def event(self) -> dict[str, Any]:
        """The next one; waits for it."""
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise self._died()
        event: dict[str, Any] = json.loads(line)
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._shut_down()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the child, and whatever it started, if it still runs."""
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _shut_down(self) -> None:
        assert self._child.stdin
        self._child.stdin.close()
        if self._child.wait():
            raise self._died()

    def _died(self) -> EngineFailed:
        status = self._child.wait()
        return EngineFailed(f"vLLM's process ended with {status}; the end of {self._log}:\n{tail(self._log)}")


class Engine(Child):
    """One vLLM that computes requests one after another (engine_process.py); each comes back as a row."""

    def __init__(self, job: Job, log: Path) -> None:
        command = [sys.executable, "-m", "experiments.framework.engine_process"]
        super().__init__(command, environment(EngineConfig(**job.engine)), log)
        try:
            self.send(asdict(job))
            self.told = self.event()  # {"started": seconds, "hardware": ..., "cores": ..., "versions": ...}
        except BaseException:
            self.kill()
            raise

    def run(self, step: Step) -> Iterator[Row]:
        """Send ``step``; yields a row as each of its requests finishes."""
        self.send(asdict(step))
        for _ in step.requests:
            yield Row(**self.event())


def environment(engine: EngineConfig) -> dict[str, str]:
    """Of a vLLM process that is configured like that."""
    threads = str(engine.threads)
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1" if engine.model in PACKAGES else os.environ.get("HF_HUB_OFFLINE", "0"),
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_space_gib),
        # With a connector vLLM would reserve another core: other threads, other speed, other rounding.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{engine.threads - 1}" if engine.threads > 1 else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if engine.processes else "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def model_path(engine: EngineConfig) -> str:
    """Folder or name for vLLM; a model out of packages is fetched when it is missing."""
    if engine.model in PACKAGES:
        return str(folder_of(PACKAGES[engine.model]))
    local = ROOT / engine.model
    return str(local) if local.is_dir() else engine.model


def forget_page_cache(folder: Path) -> None:
    """Make the next reads of the files in ``folder`` come from the device, not from the kernel's memory."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
