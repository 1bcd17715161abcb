"""What the tests of a storage backend need: the contract in executable form (docs/storage_plugins.md).

suite.py      BackendTests: subclass it in your tests
machine.py    BackendMachine: random work, restarts and faults against a dict (needs hypothesis)
reference.py  FolderBackend: a backend that is plainly right
mutants.py    that backend with one defect each: what the suite finds, and what it cannot
buffers.py    keys, bytes, buffers
"""

import pytest

pytest.register_assert_rewrite("lmcache.storage.testing.suite", "lmcache.storage.testing.machine")

from lmcache.storage.testing.buffers import fill, make_key, take  # noqa: E402
from lmcache.storage.testing.machine import BackendMachine, MachineModel  # noqa: E402
from lmcache.storage.testing.suite import SIZES, BackendTests, OpenBackend  # noqa: E402

__all__ = ["SIZES", "BackendMachine", "BackendTests", "MachineModel", "OpenBackend", "fill", "make_key", "take"]
