"""Random work with restarts by two processes' worth of backends, against a dict; also while their place fails."""

from __future__ import annotations

import itertools
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

pytest.importorskip("obstore", reason="obstore is not installed")

from object_places import QUICK, azure, seaweed
from redis_places import REDIS, VALKEY

from lmcache.errors import StorageError
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key, take
from lmcache.testing.objects import ACCESS_KEY, SECRET_KEY, Azurite, SeaweedFS
from lmcache.testing.processes import wait_until
from lmcache.testing.proxy import FaultyProxy
from lmcache.testing.redis import RedisServer

__all__ = ["azure", "seaweed"]
KEYS = 6
_serial = itertools.count()


class Machine(RuleBasedStateMachine):
    """Two backends on one place. What one has put, both have, until one removes it; the first payload stays."""

    options: ClassVar[Any]
    exact: ClassVar[bool] = True
    """Whether both always know what the other did; else a miss, or an older payload, is as good."""
    blows: ClassVar[Sequence[Callable[[], object]]] = ()
    """What the place may suffer between two steps; it is over when the call returns, and nobody sees an error."""
    faults: ClassVar[Sequence[Callable[[], object]]] = ()
    """What the place may suffer until ``mend``; meanwhile anything may raise StorageError."""
    mend: ClassVar[Callable[[], object]]
    hasty: ClassVar[bool] = False
    """Whether a busy machine may let its deadlines pass although nothing is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.place = type(self).options(Path(self.folder.name), f"machine-{next(_serial)}")
        self.pool = PinnedPool(1 << 20)
        self.backends = [self.open(), self.open()]
        self.model: dict[int, bytes] = {}
        self.ever: dict[int, set[bytes]] = {}
        self.hurt = False

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
        except StorageError as error:
            self.excuse(error)
            held = 0
        buffer.release()
        self.ever.setdefault(n, set()).add(data)
        if held and self.exact:
            self.model.setdefault(n, data)

    @rule(who=who, n=what)
    def get(self, who: int, n: int) -> None:
        try:
            got = BackendTests.get(self.backends[who], self.pool, make_key(n), self.length(n))
        except StorageError as error:
            self.excuse(error)
            return
        if self.exact:
            assert got == self.model.get(n)
        else:
            assert got is None or got in self.ever[n]

    @rule(who=who, order=st.permutations(range(KEYS)))
    def sizes(self, who: int, order: list[int]) -> None:
        try:
            sizes = self.backends[who].sizes([make_key(n) for n in order])
        except StorageError as error:
            self.excuse(error)
            return
        # A network that changes bytes changes sizes too, which nothing protects; a chunk of that size is then a miss.
        assert self.hurt or sizes == [self.length(n) for n in order][: len(sizes)]
        if self.exact:
            assert len(sizes) == next((i for i, n in enumerate(order) if n not in self.model), KEYS)

    @rule(who=who, n=what)
    def remove(self, who: int, n: int) -> None:
        try:
            count = self.backends[who].remove([make_key(n)])
        except StorageError as error:
            self.excuse(error)
            return
        if self.exact:
            assert count == (n in self.model)
        self.model.pop(n, None)

    @rule(who=who)
    def clear(self, who: int) -> None:
        try:
            count = self.backends[who].clear(make_key(0).fingerprint)
        except StorageError as error:
            self.excuse(error)
            return
        if self.exact:
            assert count == len(self.model)
        self.model.clear()

    @rule(who=who)
    def keys(self, who: int) -> None:
        if self.exact and (listed := self.backends[who].keys()) is not None:
            assert sorted(listed) == [make_key(n) for n in sorted(self.model)]

    def works(self, who: int) -> bool:
        """Whether it stores and loads, as it must when nothing is wrong."""
        self.put(who, 4, 1)
        got = BackendTests.get(self.backends[who], self.pool, make_key(4), self.length(4))
        assert got is None or got in self.ever[4]
        return got is not None

    @rule(who=who)
    def restart(self, who: int) -> None:
        self.backends[who].close()
        self.backends[who] = self.open()

    @precondition(lambda self: self.blows)
    @rule(which=st.integers(0, 100))
    def blow(self, which: int) -> None:
        self.blows[which % len(self.blows)]()

    @precondition(lambda self: self.faults)
    @rule(which=st.integers(0, 100), who=who, n=what)
    def fault(self, which: int, who: int, n: int) -> None:
        type(self).mend()
        which %= len(self.faults) + 1
        self.hurt = which < len(self.faults)
        if self.hurt:
            self.put(who, n, which)  # so that there is something to read wrong
            self.faults[which]()
            self.get(1 - who, n)

    @invariant()
    def all_buffers_are_returned(self) -> None:
        assert self.pool.used_bytes == 0

    def excuse(self, error: StorageError) -> None:
        """Raise it, unless it is what a place that fails, or a deadline that passes, may lead to."""
        late = self.hasty and re.search(r"(?i)time[d ]*out|within|deadline", str(error))
        if not late and (self.exact or ((self.blows or self.faults) and not self.hurt)):
            raise error

    def teardown(self) -> None:
        type(self).mend()
        self.hurt = False
        if self.blows or self.faults:
            wait_until(lambda: all(self.works(who) for who in (0, 1)))
        for backend in self.backends:
            backend.close()
        assert self.pool.used_bytes == 0
        self.pool.close()
        self.folder.cleanup()


def run(
    options: Any,
    exact: bool,
    examples: int = 25,
    blows: Sequence[Callable[[], object]] = (),
    faults: Sequence[Callable[[], object]] = (),
    mend: Callable[[], object] = lambda: None,
    hasty: bool = False,
) -> None:
    fields = {"options": staticmethod(options), "exact": exact, "blows": blows, "faults": faults, "hasty": hasty}
    machine = type("TheMachine", (Machine,), {**fields, "mend": staticmethod(mend)})
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=20, deadline=None, suppress_health_check=checks),
    )


def run_behind(proxy: FaultyProxy, options: Any, flips: Sequence[int], examples: int = 20) -> None:
    """Behind a network that cuts, hangs, slows down, resets midway and changes bytes at these places of an answer."""

    def changing(**fields: object) -> Callable[[], None]:
        return lambda: proxy.__dict__.update(fields)

    def mend() -> None:
        proxy.drop()  # what hangs must not arrive later
        proxy.mend()

    # The first ones come most often, and those that only cost time the least.
    faults = [changing(flip_after=place) for place in flips]
    faults += [changing(reset_after=6000), changing(reset_after=0), changing(slow_s=0.02), changing(hang=True)]
    try:
        run(options, exact=False, examples=examples, blows=[proxy.drop], faults=faults, mend=mend, hasty=True)
    finally:
        proxy.close()


def folder(path: Path, _: str) -> dict[str, Any]:
    return {"type": "remote", "url": f"fs://{path}"}


def packed(path: Path, name: str) -> dict[str, Any]:
    key = path / "key"
    key.write_bytes(random.Random(1).randbytes(32))
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


def test_a_bucket_behind_a_network_that_fails(seaweed: SeaweedFS) -> None:
    proxy = FaultyProxy(seaweed.port)
    quick = {**QUICK, "timeout_s": 0.5, "endpoint": proxy.endpoint}
    run_behind(proxy, lambda _, name: seaweed.options(name, **quick), flips=[1500, 5000])


def test_azure(azure: Azurite) -> None:
    run(lambda _, name: azure.options(name, index_ttl_s=0, lookups=2), exact=True, examples=12)


def test_azure_behind_a_network_that_fails(azure: Azurite) -> None:
    proxy = FaultyProxy(azure.port)
    quick = {**QUICK, "timeout_s": 0.5, "endpoint": f"{proxy.endpoint}/{azure.account}"}
    run_behind(proxy, lambda _, name: azure.options(name, **quick), flips=[1500, 5000])


@pytest.fixture(scope="module", params=["valkey", "redis"])
def binary(request: pytest.FixtureRequest) -> str:
    found = {"valkey": VALKEY, "redis": REDIS}[request.param]
    if found is None:
        pytest.skip(f"{request.param} is not installed")
    return found


@pytest.fixture(scope="module")
def redis(binary: str) -> Iterator[RedisServer]:
    """Keeps what it acknowledged."""
    with RedisServer(binary, "--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


@pytest.fixture(scope="module")
def forgetful(binary: str) -> Iterator[RedisServer]:
    with RedisServer(binary) as server:
        yield server


def on(port: int, **more: Any) -> Callable[[Path, str], dict[str, Any]]:
    return lambda _, name: {"type": "remote", "url": f"redis://127.0.0.1:{port}", "prefix": f"{name}:", **more}


def test_redis(redis: RedisServer) -> None:
    run(on(redis.port), exact=True)


def test_redis_that_is_killed_and_restarted_between_steps_forgets_nothing(redis: RedisServer) -> None:
    def restart() -> None:
        redis.kill()
        redis.start()

    # It listens before it has loaded what it keeps, and says LOADING.
    run(on(redis.port, retry={"attempts": 10}), exact=True, examples=20, blows=[restart])


def test_redis_that_is_down_for_some_steps_and_forgets(forgetful: RedisServer) -> None:
    def mend() -> None:
        forgetful.kill()
        forgetful.start()

    options = on(forgetful.port, retry={"base_s": 0.01})
    run(options, exact=False, examples=20, blows=[mend], faults=[forgetful.kill], mend=mend)


def test_redis_behind_a_network_that_fails(redis: RedisServer) -> None:
    proxy = FaultyProxy(redis.port)
    quick = {"timeout_s": 0.3, "connect_timeout_s": 0.3, "retry": {"base_s": 0.01}}
    run_behind(proxy, on(proxy.port, **quick), flips=[300, 4300])


def test_a_bucket_through_nixl(seaweed: SeaweedFS) -> None:
    pytest.importorskip("nixl", reason="NIXL is not installed")

    def options(path: Path, name: str) -> dict[str, Any]:
        place = {"bucket": seaweed.bucket, "endpoint": seaweed.endpoint, "prefix": f"{name}/"}
        keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        return {"type": "nixl", "plugin": "OBJ", "path": str(path / "index"), **place, **keys}

    run(options, exact=False, examples=8)
