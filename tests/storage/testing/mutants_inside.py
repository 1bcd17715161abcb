"""A class of tests for each mutant, run by test_conformance.py in a process of its own, as most of them fail."""

from __future__ import annotations

from reference_tests import FolderTests

from lmcache.storage.testing.mutants import MUTANTS, UNSEEN

for _kind in (*MUTANTS, *UNSEEN):
    globals()[f"Test{_kind.__name__}"] = type(f"Test{_kind.__name__}", (FolderTests,), {"kind": _kind})
