"""The conformance suite itself: what is right passes it, what is wrong does not, and the documentation says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings
from reference_tests import FolderTests

from lmcache.storage.testing import BackendMachine, BackendTests
from lmcache.storage.testing.mutants import MUTANTS, UNSEEN
from lmcache.storage.testing.reference import FolderBackend, FolderConfig

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


class TestFolder(FolderTests):
    """Every test, none skipped."""


class FolderMachine(BackendMachine(lambda folder: FolderBackend(FolderConfig(path=folder / "kv")))):
    lossless = True


class SmallFolderMachine(BackendMachine(lambda folder: FolderBackend(FolderConfig(path=folder, capacity=40_000)))):
    pass


FolderMachine.TestCase.settings = SmallFolderMachine.TestCase.settings = settings(max_examples=20, deadline=None)
TestFolderMachine, TestSmallFolderMachine = FolderMachine.TestCase, SmallFolderMachine.TestCase


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Why the named test of each mutant failed, and each test of those that cannot be seen; empty where it passed."""
    report = tmp_path_factory.mktemp("mutants") / "report.xml"
    wanted = [f"Test{mutant.__name__}::{test}" for mutant, test in MUTANTS.items()]
    wanted += [f"Test{mutant.__name__}" for mutant in UNSEEN]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"),
            *(f"{HERE / 'mutants_inside.py'}::{name}" for name in wanted),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=550,  # 14 s on an idle machine
        check=False,
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        mutant = str(case.get("classname")).rpartition(".Test")[2]
        problems = [str(each.get("message")) for each in case if each.tag in ("failure", "error", "skipped")]
        test = str(case.get("name"))
        found[mutant][test] = found[mutant].get(test, "") + "; ".join(problems)
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_suite_finds(outcomes: dict[str, dict[str, str]], mutant: type[FolderBackend]) -> None:
    assert any(outcomes[mutant.__name__].values()), f"{MUTANTS[mutant]} passes with {mutant.__name__}: {mutant.__doc__}"


@pytest.mark.parametrize("mutant", UNSEEN, ids=lambda mutant: mutant.__name__)
def test_the_suite_cannot_see(outcomes: dict[str, dict[str, str]], mutant: type[FolderBackend]) -> None:
    """If it can, the mutant belongs to the others."""
    assert len(outcomes[mutant.__name__]) > 40
    assert not any(outcomes[mutant.__name__].values())


def test_the_documentation_tells_of_every_mutant() -> None:
    page = (ROOT / "docs" / "storage_plugins.md").read_text()
    rows = {tuple(row) for row in re.findall(r"^\| `(\w+)` \| .* \| `(\w+)` \|$", page, re.MULTILINE)}
    assert rows == {(mutant.__name__, test) for mutant, test in MUTANTS.items()}
    assert set(re.findall(r"^\| `(\w+)` \| .* \| cannot", page, re.MULTILINE)) == {m.__name__ for m in UNSEEN}
    assert {test for test in MUTANTS.values()} <= set(dir(BackendTests))
