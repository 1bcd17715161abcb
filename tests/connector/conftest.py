"""Fixtures that start real vLLM engines in processes of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from harness import DRIVE, DRIVE_MANY, drive, environment
from preloaded import Script


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model, by family; another seed, other weights."""
    root = tmp_path_factory.mktemp("models")
    return lambda family, seed=0: tiny_models.make(family, root / f"{family}-{seed}", seed)


@pytest.fixture(scope="session")
def vllm_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Run a scenario in a new vLLM; returns the results of its steps. Failed with the log when it ends badly.

    In a fork of a process that has imported vLLM, or, on request, in a fresh interpreter (see preloaded.py).
    """

    def run(
        model: Path,
        kv: dict[str, Any] | None,
        steps: list[Any],
        processes: bool = False,
        fresh: bool = False,
        **options: Any,
    ) -> Any:
        scenario = {"model": str(model), "connector": kv, "steps": steps, "options": options}
        log = tmp_path_factory.mktemp("vllm") / "log"
        results = drive(DRIVE, scenario, environment(processes=processes), log, fresh=fresh or processes)
        run.log = log.read_text()  # type: ignore[attr-defined]
        return results

    return run


@pytest.fixture(scope="session")
def vllm_many(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any]], list[Any]]:
    """Run engines one after the other in one new process (see drive_many.py); returns what each had to say."""

    def run(engines: list[Any]) -> list[Any]:
        log = tmp_path_factory.mktemp("vllm") / "log"
        results: list[Any] = drive(DRIVE_MANY, engines, environment(), log)
        run.log = log.read_text()  # type: ignore[attr-defined]
        return results

    return run


@pytest.fixture
def vllm_process(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Start a scenario without waiting for it; whatever still runs at the end of the test is killed."""
    started: list[Script] = []

    def start(model: Path, kv: dict[str, Any], steps: list[Any], **options: Any) -> Script:
        scenario = {"model": str(model), "connector": kv, "steps": steps, "options": options}
        started.append(Script(DRIVE, json.dumps(scenario), environment(), tmp_path / "log"))
        return started[-1]

    yield start
    for process in started:
        process.kill()


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
