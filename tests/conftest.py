"""Helpers that tests of several rooms use are imported by their plain names: managers, redis_places, ..."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOMS = (
    "connector",
    "connector/engines",
    "blend",
    "storage",
    "storage/disk",
    "storage/indexed",
    "storage/testing",
    "storage/flow",
    "storage/objects",
    "storage/redis",
)
sys.path[:0] = [str(HERE / room) for room in ROOMS]

ENGINES = {"vllm_run", "vllm_many", "vllm_process", "vllm_prefill"}
# What `make test-quick` leaves out besides real vLLM: real servers, processes that are killed, random work.
SLOW = (
    "experiments/cases/",
    "storage/disk/test_disk_shared.py",
    "storage/disk/test_odd_files.py",
    "storage/disk/test_shared_folder.py",
    "storage/eviction/",
    "storage/flow/test_frozen_servers.py",
    "storage/flow/test_manager_machine.py",
    "storage/indexed/",
    "storage/objects/",
    "storage/redis/",
    "storage/remote/",
    "storage/server/test_conformance.py",
    "storage/server/test_crowds.py",
    "storage/server/test_process.py",
    "storage/testing/test_conformance.py",
    "storage/testing/test_plugin.py",
    "storage/wrappers/",
    "test_package.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ENGINES & set(getattr(item, "fixturenames", ())):
            item.add_marker("vllm")
        if item.path.is_relative_to(HERE) and item.path.relative_to(HERE).as_posix().startswith(SLOW):
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of each file that takes five or more, and of the slowest test in it."""
    tests: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file, _, name = report.nodeid.partition("::")
                tests[file][name] += report.duration
    files = sorted(((sum(of.values()), file) for file, of in tests.items()), reverse=True)
    if files and files[0][0] >= 5:
        terminalreporter.section("seconds of files, and of the slowest test")
    for seconds, file in files:
        if seconds >= 5:
            name, most = max(tests[file].items(), key=lambda test: test[1])
            terminalreporter.write_line(f"{seconds:6.1f}  {file}  {most:.1f} {name}")
