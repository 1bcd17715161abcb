"""A real vLLM in a process of its own: started, taken through steps, shut down; its requests come back as rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.config import ROOT, EngineConfig
from experiments.workloads import Request

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
    """What the child process is told."""

    model: str
    engine: dict[str, Any]
    kv_transfer: dict[str, Any] | None
    steps: list[Step]
    max_tokens: int
    seed: int
    run: int = 0
    system: dict[str, str] = field(default_factory=dict)


class EngineFailed(RuntimeError):
    """vLLM did not start, or died; the message ends with the end of its log."""


def run_engine(job: Job, log: Path, on_row: Callable[[Row], None]) -> dict[str, Any]:
    """Run ``job`` in a fresh process, with ``on_row`` called as each request finishes.

    Returns what the child tells of itself: seconds to start, hardware, versions. Raises EngineFailed.
    """
    told: dict[str, Any] = {}
    for event in events(job, log):
        if "row" in event:
            on_row(Row(**event["row"]))
        else:
            told.update(event)
    if "closed" not in told:
        raise EngineFailed(f"vLLM ended before its work was done; see {log}")
    return told


def events(job: Job, log: Path) -> Iterator[dict[str, Any]]:
    """The child's events: {"started": seconds, ...}, {"row": ...} for each request, {"closed": seconds}."""
    command = [sys.executable, "-m", "experiments.engine_process"]
    with log.open("w") as err:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(EngineConfig(**job.engine)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        assert child.stdin
        assert child.stdout
        try:
            with child.stdin:
                json.dump(asdict(job), child.stdin)
            for line in child.stdout:
                yield json.loads(line)
            status = child.wait()
        except BrokenPipeError:
            status = child.wait()
        finally:
            stop(child)
    if status:
        raise EngineFailed(f"vLLM's process ended with {status}; the end of {log}:\n{tail(log)}")


def stop(child: subprocess.Popen[str]) -> None:
    """End the child and whatever it started, if it still runs (an interrupt, an error on our side)."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.stdout:
        child.stdout.close()


def environment(engine: EngineConfig) -> dict[str, str]:
    threads = str(engine.threads)
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1" if engine.model == "smollm2" else os.environ.get("HF_HUB_OFFLINE", "0"),
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
    """Folder or name for vLLM; the small model is fetched when it is missing."""
    if engine.model != "smollm2":
        local = ROOT / engine.model
        return str(local) if local.is_dir() else engine.model
    from experiments.model import smollm2

    return str(smollm2())


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
