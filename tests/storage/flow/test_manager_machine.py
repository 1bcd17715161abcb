"""The manager against a dict: random stores, reads, leases, evictions, removals, transfers and faults."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from managers import NBYTES, open_gates, settle
from scripted import WAIT_S, Gate, ScriptedBackend, raising

from lmcache.config import load_config
from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.testing import make_key

CAPACITY = 10
PLACES = ("memory", "scripted", "scripted-2")
numbers = st.integers(0, 5)
WORLDS: list[dict[str, Any]] = [{}, {}, {"format": 1}, {"tags": 1}, {"tenant": "small"}, {"tenant": "small", "tags": 1}]
worlds = st.sampled_from(WORLDS)


class ManagerMachine(RuleBasedStateMachine):
    """``allowed`` says what a read of a key may bring; a miss is always right.

    What is removed gets other bytes when it is stored again, so that nothing that comes back goes unseen.
    """

    @initialize(
        demotion=st.sampled_from(["write_all", "on_evict"]),
        promote=st.sampled_from(["always", "second_hit", "never"]),
        allocator=st.sampled_from(["auto", "best_fit", "slots"]),
    )
    def open(self, demotion: str, promote: str, allocator: str) -> None:
        self.tiers = [ScriptedBackend(), ScriptedBackend(lists_keys=False)]
        options = {
            "memory": {"capacity": CAPACITY * NBYTES, "huge_pages": False, "allocator": allocator, "slot": NBYTES},
            "demotion": demotion,
            "promote": promote,
            "quotas": {"small": 3 * NBYTES},
            "read_batch": 2 * NBYTES,
            "read_timeout_s": 5.0,
            "close_timeout_s": 1.0,
            "breaker": {"failures": 3, "cooldown_s": 0.001},
            "retry": {"backoff_s": 0.0001},
        }
        self.manager = StorageManager(load_config(overrides=options), tiers=self.tiers)
        self.allowed: defaultdict[ChunkKey, set[bytes]] = defaultdict(set)
        self.versions: defaultdict[ChunkKey, int] = defaultdict(int)
        self.leases: list[tuple[Lease, list[bytes]]] = []
        self.frozen = False
        self.clears = 0

    def forget(self, keys: list[ChunkKey]) -> None:
        for key in keys:
            if self.allowed.pop(key, None):
                self.versions[key] += 1

    def contents(self, key: ChunkKey) -> bytes:
        return random.Random(key.to_bytes() + self.versions[key].to_bytes(4, "big")).randbytes(NBYTES)

    def healthy(self) -> bool:
        health = self.manager.health().tiers
        return not any(tier.before for tier in self.tiers) and all(
            tier.breaker == "closed" and not tier.hung_threads for tier in health
        )

    @rule(first=numbers, count=st.integers(1, 6), world=worlds)
    def put(self, first: int, count: int, world: dict[str, Any]) -> None:
        for number in range(first, first + count):
            key = make_key(number, **world)
            buffer = self.manager.allocate(NBYTES)
            if buffer is None:
                assert self.frozen or self.leases or self.manager.stats()["pending_write_bytes"] or not self.healthy()
                return
            data = self.contents(key)
            buffer.view[:] = data
            self.manager.put(key, buffer)
            self.allowed[key].add(data)
            assert world.get("tenant") or self.manager.contains([key]) == 1, "what was put is visible at once"

    @rule(first=numbers, world=worlds)
    def store_and_evict(self, first: int, world: dict[str, Any]) -> None:
        """What is below has to be read again."""
        self.put(first, 4, world)
        self.evict_all()

    @rule()
    def evict_all(self) -> None:
        self.manager.flush(0.05)
        for tier in PLACES[1:]:
            self.manager.copy(list(self.allowed), "memory", tier, timeout_s=0.05)
        self.manager.clear(tier="memory")

    @rule(first=numbers, world=worlds)
    def evict_and_read(self, first: int, world: dict[str, Any]) -> None:
        self.evict_all()
        self.read(first, 6, world, hold=False, late=False)

    @rule(first=numbers, count=st.integers(1, 8), world=worlds, hold=st.booleans(), late=st.booleans())
    def read(self, first: int, count: int, world: dict[str, Any], hold: bool, late: bool) -> None:
        keys = [make_key(number, **world) for number in range(first, first + count)]
        hangs = any(isinstance(fault, Gate) for tier in self.tiers for fault in tier.before.values())
        timeout_s = 0.01 if late or hangs else WAIT_S
        lease = self.manager.acquire(keys, [NBYTES] * count, timeout_s=timeout_s)
        assert lease.wait(WAIT_S)
        found = [bytes(buffer.view) for buffer in lease.buffers]
        for key, data in zip(keys, found, strict=False):
            assert data in self.allowed[key], "wrong bytes, or a chunk that was removed"
        if hold and len(self.leases) < 2:
            self.leases.append((lease, found))
        else:
            lease.close()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.close()

    @rule(first=numbers, world=worlds, cancel=st.booleans())
    def prefetch(self, first: int, world: dict[str, Any], cancel: bool) -> None:
        keys = [make_key(number, **world) for number in range(first, first + 4)]
        prefetch = self.manager.prefetch(keys, [NBYTES] * 4, timeout_s=0.05)
        if cancel:
            prefetch.cancel()
        assert prefetch.wait(WAIT_S)

    @rule(first=numbers, count=st.integers(1, 3), world=worlds)
    def remove(self, first: int, count: int, world: dict[str, Any]) -> None:
        keys = [make_key(number, **world) for number in range(first, first + count)]
        healthy = self.healthy()
        self.manager.remove(keys)
        if healthy and self.healthy():  # a tier that is not asked, or does not answer, may keep what it has
            self.forget(keys)

    @rule(
        world=worlds,
        by=st.sampled_from(["all", "format", "tenant"]),
        refuse=st.sampled_from([True, False, False]),
        wait=st.booleans(),
    )
    def clear(self, world: dict[str, Any], by: str, refuse: bool, wait: bool) -> None:
        self.clears += 1
        if self.clears % 3:
            return  # not so often that there is never anything
        key = make_key(0, **world)
        if refuse:
            self.tiers[0].before["clear"] = raising(StorageError("refused"))
        if by == "all":
            self.manager.clear(wait=wait)
            gone = list(self.allowed)
        elif by == "format":
            self.manager.clear(key.fingerprint, wait=wait)
            gone = [each for each in self.allowed if each.fingerprint == key.fingerprint]
        else:
            self.manager.clear(tenant=world.get("tenant", ""), wait=wait)
            gone = [each for each in self.allowed if each.tenant == key.tenant]
        # Also when a tier refuses: it is cleared before it is read again.
        self.forget(gone)

    @rule(first=numbers, world=worlds)
    def clear_what_refuses(self, first: int, world: dict[str, Any]) -> None:
        self.store_and_evict(first, world)
        self.tiers[0].before["clear"] = raising(StorageError("refused"))
        self.manager.clear()
        self.forget(list(self.allowed))
        self.read(first, 4, world, hold=False, late=False)

    @rule(
        first=numbers,
        world=worlds,
        way=st.permutations(PLACES).map(lambda places: places[:2]),
        move=st.booleans(),
    )
    def transfer(self, first: int, world: dict[str, Any], way: list[str], move: bool) -> None:
        keys = [make_key(number, **world) for number in range(first, first + 3)]
        do = self.manager.move if move else self.manager.copy
        assert 0 <= do(keys, way[0], way[1], timeout_s=0.05) <= 3

    @rule(frozen=st.sampled_from([True, False, False, False]))
    def freeze(self, frozen: bool) -> None:
        (self.manager.freeze if frozen else self.manager.thaw)()
        self.frozen = frozen

    @rule(
        index=st.integers(0, 1),
        operation=st.sampled_from(["sizes", "get", "put"]),
        fault=st.sampled_from(["error", "hang", "mend", "mend"]),
    )
    def fault(self, index: int, operation: str, fault: str) -> None:
        tier = self.tiers[index]
        if fault == "mend":
            open_gates(tier)
        elif fault == "error":
            tier.before[operation] = raising(ConnectionResetError("on purpose"))
        elif operation == "get":
            # Hung writes are in the fault matrix: between their end and their undoing a chunk may be seen again.
            tier.before["get"] = Gate()

    @rule(index=st.integers(0, 1), number=numbers, world=worlds, how=st.sampled_from(["evict", "garble", "cut"]))
    def damage(self, index: int, number: int, world: dict[str, Any], how: str) -> None:
        chunks, key = self.tiers[index].chunks, make_key(number, **world)
        found = chunks.get(key)
        if found is not None:
            header, data = found
            if how == "evict":
                chunks.pop(key, None)
            else:
                chunks[key] = header, b"?" + data[1:] if how == "garble" else data[:-1]

    @rule()
    def flush(self) -> None:
        self.manager.flush(0.05)

    @invariant()
    def held_chunks_are_untouched(self) -> None:
        for lease, found in getattr(self, "leases", ()):
            assert [bytes(buffer.view) for buffer in lease.buffers] == found

    @invariant()
    def quotas_and_capacity_hold(self) -> None:
        if hasattr(self, "manager"):
            health = self.manager.health()
            assert health.tenant_bytes["small"] <= 3 * NBYTES
            assert 0 <= health.used_bytes <= CAPACITY * NBYTES
            assert self.manager._memory._clean_bytes >= 0

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for tier in self.tiers:
            open_gates(tier)
        for lease, _ in self.leases:
            lease.close()
        self.manager.flush(WAIT_S)
        settle(
            lambda: self.manager.pool.used_bytes == len(self.manager._memory) * NBYTES, "something is held by nobody"
        )
        self.manager.close()
        settle(lambda: self.manager.pool.used_bytes == 0, "a buffer leaked")


ManagerMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestManager = ManagerMachine.TestCase
