"""What is asked of the manager beside put and acquire: prefetch, hold, copy, move, clear, freeze, quotas, policies."""

from __future__ import annotations

import threading
import time

import pytest
from managers import NBYTES, Open, acquire, contents, in_memory, keys, open_manager, plant, read, settle, store
from scripted import WAIT_S, Gate, ScriptedBackend, raising

from lmcache.errors import ConfigError, StorageError
from lmcache.keys import ChunkKey, tenant_id
from lmcache.storage.testing import make_key

__all__ = ["open_manager"]
TIER = ScriptedBackend.name


def test_prefetch_brings_chunks_into_memory_and_holds_none(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, promote="never")
    plant(tier, *range(6))
    prefetch = manager.prefetch(keys(*range(8)), [NBYTES] * 8)
    assert prefetch.wait(WAIT_S)
    assert (prefetch.done, prefetch.found) == (True, 6)
    assert in_memory(manager, *range(8)) == list(range(6))
    assert manager.stats()["leases"] == 0
    assert not any(buffer.shared for buffer in manager._memory._buffers.values())


def test_a_cancelled_prefetch_starts_no_further_read(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_batch=NBYTES, read_threads=1)
    plant(tier, *range(8))
    gate = tier.before["get"] = Gate()
    prefetch = manager.prefetch(keys(*range(8)), [NBYTES] * 8)
    tier.await_call("get")
    assert not prefetch.wait(0)
    prefetch.cancel()
    prefetch.cancel()
    assert prefetch.wait(0)
    gate.open()
    settle(lambda: in_memory(manager, *range(8)) == [0], "what was under way comes in")
    settle(lambda: manager.pool.used_bytes == NBYTES, "nothing else is held")
    assert tier.calls.count("get") == 1


def test_a_prefetch_of_what_is_in_memory_is_done_at_once(open_manager: Open) -> None:
    manager = open_manager()
    store(manager, 0, 1)
    prefetch = manager.prefetch(keys(0, 1, 2), [NBYTES] * 3)
    assert (prefetch.done, prefetch.found) == (True, 2)


def test_a_lease_has_its_own_timeout_and_can_be_renewed(open_manager: Open) -> None:
    manager = open_manager(lease_timeout_s=600)
    store(manager, 0)
    short = acquire(manager, 0, hold_s=0.05)
    long = acquire(manager, 0, hold_s=0.05)
    long.renew(600)
    settle(lambda: short.closed, "the lease never ends, though nobody needs its memory")
    assert not long.closed
    assert long.ready == 1
    long.close()
    assert manager.stats()["leases"] == 0


def test_the_first_batch_can_be_used_while_the_next_is_read(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_batch=2 * NBYTES, read_threads=2)
    plant(tier, *range(8))
    gate, second = Gate(), threading.Event()

    def hold_all_but_the_first() -> None:
        if tier.calls.count("get") > 1:
            second.set()
            gate()

    tier.before["get"] = hold_all_but_the_first
    lease = manager.acquire(keys(*range(8)), [NBYTES] * 8)
    assert lease.wait_ready(2, WAIT_S)
    assert [bytes(buffer.view) for buffer in lease.buffers[:2]] == [contents(0), contents(1)]
    assert second.wait(WAIT_S), "the next batch is in flight"
    assert not lease.done
    gate.open()
    assert lease.wait(WAIT_S)
    assert lease.ready == 8
    lease.close()


def test_batches_that_come_in_out_of_order_are_held_in_order(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_batch=2 * NBYTES, read_threads=3)
    plant(tier, *range(10))
    gate, lock, arrived = Gate(), threading.Lock(), []

    def hold_the_first() -> None:
        with lock:
            arrived.append(None)
            first = len(arrived) == 1
        if first:
            gate()

    tier.before["get"] = hold_the_first
    lease = manager.acquire(keys(*range(10)), [NBYTES] * 10)
    settle(lambda: len(in_memory(manager, *range(10))) == 8, "the others go on")
    # Which batch the held call carries is up to the threads: what is ready is a prefix, and right, in any case.
    ready = lease.buffers
    assert [bytes(buffer.view) for buffer in ready] == [contents(number) for number in range(len(ready))]
    gate.open()
    assert lease.wait(WAIT_S)
    assert [bytes(buffer.view) for buffer in lease.buffers] == [contents(number) for number in range(10)]
    lease.close()


def test_a_batch_that_comes_in_short_ends_the_prefix(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, read_batch=2 * NBYTES)
    plant(tier, *range(8))
    header, data = tier.chunks[make_key(3)]
    tier.chunks[make_key(3)] = header, data[:-1] + b"?"
    with acquire(manager, *range(8)) as lease:
        assert [bytes(buffer.view) for buffer in lease.buffers] == [contents(number) for number in range(3)]
    assert make_key(3) not in tier.chunks


def test_allocation_waits_for_leases_and_writes_but_not_longer_than_it_may(open_manager: Open) -> None:
    manager = open_manager(chunks=2)
    store(manager, 0, 1)
    lease = acquire(manager, 0, 1)
    start = time.monotonic()
    assert manager.allocate(NBYTES) is None
    assert manager.allocate(NBYTES, timeout_s=0.05) is None
    assert manager.allocate(100 * NBYTES, timeout_s=600) is None, "what can never fit is not waited for"
    assert time.monotonic() - start < 5
    threading.Timer(0.02, lease.close).start()
    buffer = manager.allocate(NBYTES, timeout_s=WAIT_S)
    assert buffer is not None
    buffer.release()


@pytest.mark.parametrize(("source", "target"), [("memory", TIER), (TIER, "memory"), (TIER, f"{TIER}-2")])
@pytest.mark.parametrize("move", [False, True])
def test_chunks_are_copied_and_moved_between_tiers(open_manager: Open, source: str, target: str, move: bool) -> None:
    near, far = ScriptedBackend(), ScriptedBackend()
    manager = open_manager(near, far, demotion="on_evict")
    places = {TIER: near, f"{TIER}-2": far}
    if source == "memory":
        store(manager, 0, 1, 3)
    else:
        plant(places[source], 0, 1, 3)

    def there(name: str) -> list[int]:
        if name == "memory":
            return in_memory(manager, *range(5))
        return [number for number in range(5) if make_key(number) in places[name].chunks]

    do = manager.move if move else manager.copy
    assert do(keys(0, 1, 2, 3, 4), source, target) == 3
    assert there(target) == [0, 1, 3]
    assert there(source) == ([] if move else [0, 1, 3])
    assert read(manager, 0, 1) == 2


def test_what_a_tier_cannot_take_is_not_moved(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, demotion="on_evict")
    store(manager, 0, 1)
    tier.before["put"] = raising(StorageError("refused"))
    assert manager.move(keys(0, 1), "memory", TIER) == 0
    assert in_memory(manager, 0, 1) == [0, 1]


def test_a_copy_from_a_tier_that_hangs_ends_in_time(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    plant(tier, 0)
    tier.before["get"] = Gate()
    start = time.monotonic()
    assert manager.copy(keys(0), TIER, "memory", timeout_s=0.05) == 0
    assert time.monotonic() - start < 5


def test_unknown_tiers_are_named(open_manager: Open) -> None:
    manager = open_manager(ScriptedBackend())
    for call in (
        lambda: manager.copy(keys(0), "memory", "dsik"),
        lambda: manager.remove(keys(0), tier="dsik"),
        lambda: manager.clear(tier="dsik"),
    ):
        with pytest.raises(ConfigError, match=f"unknown tier 'dsik'; known: memory, {TIER}"):
            call()
    with pytest.raises(ConfigError, match="same tier"):
        manager.move(keys(0), "memory", "memory")


def test_keys_are_removed_also_from_the_queue_and_from_one_tier(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    gate = tier.before["put"] = Gate()
    store(manager, 0)
    tier.await_call("put")
    store(manager, 1, 2)
    manager.remove(keys(0, 1))
    gate.open()
    assert manager.flush(WAIT_S)
    assert tier.holds() == set(keys(2))
    manager.remove(keys(2), tier="memory")
    assert in_memory(manager, 2) == []
    assert read(manager, 2) == 1
    manager.remove(keys(2), tier=TIER)
    assert in_memory(manager, 2) == [2]
    assert not tier.chunks


@pytest.mark.parametrize("lists_keys", [True, False])
def test_a_tenant_is_cleared_from_every_tier(open_manager: Open, lists_keys: bool) -> None:
    tier = ScriptedBackend(lists_keys=lists_keys)
    manager = open_manager(tier)
    for tenant in ("a", "b", ""):
        store(manager, 0, 1, tenant=tenant)
        store(manager, 1, tenant=tenant, tags=5)  # with an adapter, say
        store(manager, 0, format=7, tenant=tenant)
    manager.flush(WAIT_S)
    assert manager.clear(tenant="a") >= 4
    assert not [key for key in manager._memory._buffers if key.tenant == tenant_id("a")]
    assert in_memory(manager, 0, 1, tenant="b") == in_memory(manager, 0, 1) == [0, 1]
    # A place that cannot list its keys loses more, for what must go is gone.
    left = {
        key
        for tenant in ("b", "")
        for key in (
            *keys(0, 1, tenant=tenant),
            make_key(1, tenant=tenant, tags=5),
            make_key(0, tenant=tenant, format=7),
        )
    }
    assert tier.holds() == (left if lists_keys else set())
    manager.clear(tenant="")
    assert in_memory(manager, 0, 1, tenant="b") == [0, 1]
    assert in_memory(manager, 0, 1) == []


def test_one_format_of_a_tenant_is_cleared_from_one_tier(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    store(manager, 0, tenant="a")
    store(manager, 0, format=7, tenant="a")
    manager.flush(WAIT_S)
    assert manager.clear(make_key(0).fingerprint, tenant="a", tier=TIER) == 1
    assert in_memory(manager, 0, tenant="a") == [0]
    assert tier.holds() == {make_key(0, format=7, tenant="a")}
    assert manager.clear(tier="memory") == 2
    assert tier.holds() == {make_key(0, format=7, tenant="a")}


def test_frozen_storage_takes_nothing_and_serves_what_it_has(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier)
    store(manager, 0)
    buffer = manager.allocate(NBYTES)
    assert buffer is not None
    manager.flush(WAIT_S)
    plant(tier, 1)
    manager.freeze()
    manager.put(make_key(5), buffer)
    assert manager.allocate(NBYTES) is None
    assert manager.allocate(NBYTES, timeout_s=600) is None
    assert manager.health().frozen
    assert read(manager, 0, 1, 5) == 2
    assert tier.holds() == set(keys(0, 1))
    manager.thaw()
    store(manager, 5)
    assert read(manager, 0, 1, 5) == 3


def test_a_quota_bounds_a_tenants_memory_also_by_promotion(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, quotas={"small": 3 * NBYTES})
    store(manager, *range(6), tenant="small")
    manager.flush(WAIT_S)
    settle(lambda: not any(buffer.shared for buffer in manager._memory._buffers.values()), "written")
    store(manager, *range(6, 12), tenant="small")
    manager.flush(WAIT_S)
    assert manager.health().tenant_bytes["small"] <= 3 * NBYTES
    assert tier.holds() == set(keys(*range(12), tenant="small")), "lower tiers have no quota"
    assert read(manager, *range(12), tenant="small") == 12
    assert manager.health().tenant_bytes["small"] <= 3 * NBYTES
    store(manager, *range(20, 30), tenant="other")
    assert in_memory(manager, *range(20, 30), tenant="other") == list(range(20, 30))


@pytest.mark.parametrize(("promote", "kept_after"), [("always", 1), ("second_hit", 2), ("never", None)])
def test_promotion(open_manager: Open, promote: str, kept_after: int | None) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, promote=promote)
    plant(tier, 0, 1)
    for times in range(1, 4):
        assert read(manager, 0, 1) == 2
        settle(lambda: manager.pool.used_bytes in (0, 2 * NBYTES), "what is not kept is let go of")
        kept = kept_after is not None and times >= kept_after
        assert in_memory(manager, 0, 1) == ([0, 1] if kept else [])


def test_write_back_writes_before_it_evicts_and_not_at_once(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, chunks=16, demotion="on_evict", memory__low_watermark=0.25)
    store(manager, *range(12))
    assert manager.flush(WAIT_S)
    assert not tier.chunks, "there is room"
    for number in range(12, 60):
        store(manager, number)
        assert manager.flush(WAIT_S)
    assert len(tier.chunks) < 60
    for number in range(60):
        assert read(manager, number) == 1, f"chunk {number} was evicted before it was written"


def test_write_back_loses_nothing_that_a_quota_turns_out(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, demotion="on_evict", quotas={"small": 2 * NBYTES, "tiny": NBYTES // 2})
    for number in range(6):
        store(manager, number, tenant="small")
        store(manager, number, tenant="tiny")
        assert manager.flush(WAIT_S)
    store(manager, 0)
    assert manager.flush(WAIT_S)
    assert manager.health().tenant_bytes == {"small": 2 * NBYTES, "tiny": 0}
    assert tier.holds() == {*keys(*range(6), tenant="small"), *keys(*range(6), tenant="tiny")}
    assert read(manager, *range(6), tenant="tiny") == 6


def test_write_back_writes_the_rest_at_the_end(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, demotion="on_evict")
    store(manager, *range(10))
    manager.close()
    assert tier.holds() == set(keys(*range(10)))


def test_write_back_never_waits_for_a_tier_that_hangs(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, chunks=16, demotion="on_evict", memory__low_watermark=0.25, close_timeout_s=0.2)
    tier.before["put"] = Gate()
    start = time.monotonic()
    store(manager, *range(100))
    assert time.monotonic() - start < 5
    assert read(manager, 99) == 1


def test_health_says_how_a_tier_fares(open_manager: Open) -> None:
    tier = ScriptedBackend()
    manager = open_manager(tier, breaker__failures=2, breaker__cooldown_s=600)
    store(manager, 0)
    assert manager.flush(WAIT_S)
    (health,) = manager.health().tiers
    assert (health.name, health.breaker, health.failures, health.last_error) == (TIER, "closed", 0, None)
    assert health.latency_s is not None
    assert health.latency_s < 5
    assert (health.queue_bytes, health.hung_threads, health.owes_clear) == (0, 0, False)
    tier.before["sizes"] = raising(StorageError("refused"))
    for _ in range(2):
        read(manager, 5)
    (health,) = manager.health().tiers
    assert (health.breaker, health.failures, health.last_error) == ("open", 2, "refused")
    assert health.last_error_age_s is not None
    assert manager.health().used_bytes == NBYTES


def test_a_removed_chunk_is_not_seen_again_when_its_write_ends(
    open_manager: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache.storage.manager.ASK_TIMEOUT_S", 2 * WAIT_S)
    tier, gate = ScriptedBackend(), Gate()
    tier.before["put"] = gate
    manager = open_manager(tier)
    store(manager, 1)
    tier.await_call("put")
    remover = threading.Thread(target=manager.remove, args=(keys(1),))
    remover.start()
    remover.join(0.1)
    assert remover.is_alive(), "remove() returned while a write of the chunk was under way"
    gate.open()
    remover.join(WAIT_S)
    assert not remover.is_alive()
    assert tier.holds() == set()


def test_a_tier_that_hangs_while_it_lists_its_keys_does_not_hold_up_a_clear(
    open_manager: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, gate = ScriptedBackend(), Gate()
    manager = open_manager(tier, read_timeout_s=0.5)
    plant(tier, 1)

    def hanging() -> list[ChunkKey]:
        gate()
        return list(tier.chunks)

    monkeypatch.setattr(tier, "keys", hanging)
    (key,) = keys(1)
    cleared = threading.Thread(target=manager.clear, args=(key.fingerprint,), kwargs={"tenant": ""})
    cleared.start()
    cleared.join(WAIT_S / 2)
    hung = cleared.is_alive()
    gate.open()
    cleared.join(WAIT_S)
    assert not hung, "clear() waited for a tier that lists its keys"
