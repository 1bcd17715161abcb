"""Fixtures that start real vLLM engines in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from harness import DRIVE, DRIVE_MANY, Failed, environment


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model, by family; another seed, other weights."""
    root = tmp_path_factory.mktemp("models")
    return lambda family, seed=0: tiny_models.make(family, root / f"{family}-{seed}", seed)


@pytest.fixture(scope="session")
def vllm_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Run a scenario in a fresh vLLM; returns the results of its steps. Failed with the log when it ends badly."""

    def run(model: Path, kv: dict[str, Any] | None, steps: list[Any], processes: bool = False, **options: Any) -> Any:
        scenario = {"model": str(model), "connector": kv, "steps": steps, "options": options}
        log = tmp_path_factory.mktemp("vllm") / "log"
        with log.open("w") as err:
            done = subprocess.run(
                DRIVE,
                input=json.dumps(scenario),
                env=environment(processes=processes),
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                timeout=300,
                check=False,
            )
        last = [line for line in done.stdout.splitlines() if line.startswith('@@{"results"')]
        if done.returncode or not last:
            raise Failed(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{log.read_text()[-6000:]}")
        run.log = log.read_text()  # type: ignore[attr-defined]
        return json.loads(last[-1][2:])["results"]

    return run


@pytest.fixture(scope="session")
def vllm_many(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any]], list[Any]]:
    """Run engines one after the other in one fresh process (see drive_many.py); returns what each had to say."""

    def run(engines: list[Any]) -> list[Any]:
        log = tmp_path_factory.mktemp("vllm") / "log"
        with log.open("w") as err:
            done = subprocess.run(
                DRIVE_MANY,
                input=json.dumps(engines),
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                timeout=600,
                check=False,
            )
        last = [line for line in done.stdout.splitlines() if line.startswith('@@{"results"')]
        if done.returncode or not last:
            raise Failed(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{log.read_text()[-6000:]}")
        run.log = log.read_text()  # type: ignore[attr-defined]
        results: list[Any] = json.loads(last[-1][2:])["results"]
        return results

    return run


@pytest.fixture
def vllm_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a scenario without waiting for it; whatever still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(model: Path, kv: dict[str, Any], steps: list[Any], **options: Any) -> subprocess.Popen[str]:
        scenario = {"model": str(model), "connector": kv, "steps": steps, "options": options}
        process = subprocess.Popen(
            DRIVE,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(scenario))
        process.stdin.close()
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
