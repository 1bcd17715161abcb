"""L1: lookups that wait for nobody, eviction in batches, quotas, chunks that are written before they go."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lmcache import metrics
from lmcache.keys import ChunkKey
from lmcache.storage.eviction.base import LRU
from lmcache.storage.memory.pool import PAGE, PinnedPool, PoolBuffer
from lmcache.storage.memory.tier import MemoryTier
from lmcache.storage.testing import make_key

WAIT_S = 20.0


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(64 * PAGE)
    yield pool
    pool.close()


def insert(tier: MemoryTier, *numbers: int, tenant: str = "", settled: bool = False) -> list[bool]:
    came = []
    for number in numbers:
        buffer = tier.allocate(PAGE)
        assert buffer is not None
        came.append(tier.insert(make_key(number, tenant=tenant), buffer, settled=settled))
    return came


def held(tier: MemoryTier, tenant: str = "") -> set[int]:
    return {number for number in range(200) if make_key(number, tenant=tenant) in tier}


def let_go(handles: list[PoolBuffer]) -> None:
    for handle in handles:
        handle.release()


def test_lookups_do_not_wait_for_whoever_evicts(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU())
    insert(tier, *range(4))
    keys = [make_key(number) for number in range(5)]
    found: list[int] = []
    with tier._lock:  # as an eviction holds it

        def look() -> None:
            found.append(tier.leading(keys))
            handles = tier.pin(keys[1:3])
            found.append(len(handles))
            let_go(handles)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(WAIT_S)
        assert found == [4, 2]
    # What was looked up meanwhile counts for the next eviction, the head of the prefix last.
    tier.allocate(61 * PAGE)
    assert held(tier) == {1, 2}, "0 and 3 were not touched"


def test_one_eviction_frees_the_watermark(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU(), low_watermark=1 / 8)
    insert(tier, *range(64))
    insert(tier, 100)
    assert held(tier) == {*range(8, 64), 100}
    insert(tier, *range(101, 108))
    assert held(tier) == {*range(8, 64), *range(100, 108)}, "what the eviction freed is used up first"


def test_held_chunks_stay_and_nothing_goes_for_a_request_that_cannot_fit(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU())
    insert(tier, *range(64))
    handles = tier.pin([make_key(number) for number in range(60)])
    assert tier.allocate(5 * PAGE) is None
    assert len(tier) == 64
    assert tier.allocate(4 * PAGE) is not None
    assert held(tier) == set(range(60))
    let_go(handles)


def test_a_quota_evicts_the_tenants_own_chunks_only(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU(), quotas={"small": 4 * PAGE})
    insert(tier, *range(100, 110))
    assert insert(tier, *range(10), tenant="small") == [True] * 10
    assert held(tier, "small") == set(range(6, 10))
    assert held(tier) == set(range(100, 110))
    assert tier.tenant_bytes == {"small": 4 * PAGE}
    insert(tier, *range(110, 120), tenant="unknown")
    assert tier.tenant_bytes == {"small": 4 * PAGE}


def test_a_quota_goes_by_use_and_looks_at_no_chunks_of_others(pool: PinnedPool) -> None:
    class NotAsked(LRU):
        def victims(self) -> Iterator[ChunkKey]:
            raise AssertionError("all chunks are gone through")

    tier = MemoryTier(pool, NotAsked(), quotas={"small": 4 * PAGE})
    insert(tier, *range(40))
    insert(tier, *range(4), tenant="small")
    let_go(tier.pin([make_key(0, tenant="small")]))
    insert(tier, 4, 5, tenant="small")
    assert held(tier, "small") == {0, 3, 4, 5}
    tier.remove([make_key(0, tenant="small")])
    insert(tier, 6, 7, tenant="small")
    assert held(tier, "small") == {4, 5, 6, 7}
    assert held(tier) == set(range(40))


def test_a_quota_smaller_than_a_chunk_is_said_once(pool: PinnedPool, caplog: pytest.LogCaptureFixture) -> None:
    tier = MemoryTier(pool, LRU(), quotas={"a": PAGE // 2})
    assert insert(tier, 1, 2, tenant="a") == [False, False]
    assert [record.getMessage() for record in caplog.records] == [
        f"quotas: the quota of 'a', {PAGE // 2} bytes, is less than a chunk of {PAGE}: memory keeps no such chunk of it"
    ]


def test_a_quota_whose_chunks_are_held_refuses(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU(), quotas={"small": 2 * PAGE})
    insert(tier, 0, 1, tenant="small")
    refused = metrics.QUOTA_REFUSED_BYTES.labels("small")._value.get()
    handles = tier.pin([make_key(0, tenant="small"), make_key(1, tenant="small")])
    assert insert(tier, 2, tenant="small") == [False]
    assert metrics.QUOTA_REFUSED_BYTES.labels("small")._value.get() == refused + PAGE
    let_go(handles)
    large = tier.allocate(3 * PAGE)
    assert large is not None
    assert not tier.insert(make_key(3, tenant="small"), large), "larger than the quota"
    assert held(tier, "small") == {0, 1}
    tier.clear()
    assert tier.tenant_bytes == {"small": 0}
    assert pool.used_bytes == 0


def test_what_was_read_before_a_removal_does_not_come_back(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU())
    for undo in (lambda: tier.remove([make_key(0)]), tier.clear):
        generation, buffer = tier.generation, tier.allocate(PAGE)
        assert buffer is not None
        undo()
        assert not tier.insert(make_key(0), buffer, generation)
    assert pool.used_bytes == 0


def test_written_chunks_are_evicted_before_unwritten_ones(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU(), low_watermark=1 / 64, demotes=True)
    insert(tier, *range(60))
    insert(tier, *range(60, 64), settled=True)
    lost = metrics.EVICTED_UNWRITTEN_CHUNKS._value.get()
    insert(tier, 100, 101)
    assert held(tier) == {*range(60), 62, 63, 100, 101}
    assert metrics.EVICTED_UNWRITTEN_CHUNKS._value.get() == lost
    insert(tier, 102, 103, 104)
    assert metrics.EVICTED_UNWRITTEN_CHUNKS._value.get() == lost + 1
    assert 0 not in held(tier)


def test_what_should_be_written_is_named_in_the_order_of_eviction(pool: PinnedPool) -> None:
    tier = MemoryTier(pool, LRU(), low_watermark=1 / 8, demotes=True)
    insert(tier, *range(56))
    assert tier.to_write(4 * PAGE) == [], "the reserve is free"
    insert(tier, 56)
    due = tier.to_write(4 * PAGE)
    assert [key for key, _ in due] == [make_key(number) for number in range(4)]
    let_go([handle for _, handle in due])
    tier.settle([key for key, _ in due], True)
    assert tier.to_write(4 * PAGE) == []
    assert [key for key, _ in _released(tier.to_write())] == [make_key(number) for number in range(4, 57)]


def _released(due: list[tuple[ChunkKey, PoolBuffer]]) -> list[tuple[ChunkKey, PoolBuffer]]:
    let_go([handle for _, handle in due])
    return due
