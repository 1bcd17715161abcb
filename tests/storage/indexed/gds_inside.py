"""What test_gds.py runs beside a stand-in for libcuda.so.1: KvikIO's host path, against real files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from chunk_file_tests import ChunkFileTests, files_machine
from managers import open_manager
from odd_file_tests import OddFileTests

from lmcache.storage.base import StorageBackend

if not os.environ.get("LMCACHE_TEST_GDS"):
    pytest.skip("run by test_gds.py", allow_module_level=True)

__all__ = ["open_manager"]


class TestGds(ChunkFileTests):
    options: ClassVar[dict[str, Any]] = {"type": "gds"}


TestGdsMachine = files_machine(TestGds).TestCase


class TestGdsOddFiles(OddFileTests):
    tier = "gds"

    def open(self, path: Path, **options: Any) -> StorageBackend:
        return TestGds.open(path, **options)
