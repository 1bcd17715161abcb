"""L1's lines of storage_bench: the hit path, its latency while others store, and the copy out of pooled memory."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator

from experiments.bench.storage.case import Case
from lmcache.config import load_config
from lmcache.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey
from lmcache.storage.manager import StorageManager
from lmcache.storage.memory.pool import PinnedPool

CHUNKS = 512
SMALL = 64 << 10
CHUNK = 4 << 20
COPIED_CHUNKS = 16


def cases() -> Iterator[Case]:
    """Each builds what it needs when it is reached, and gives it back in ``close``."""
    yield hit_path()
    yield hit_path_beside_stores()
    yield miss_path()
    yield copy_out()
    yield allocate_and_evict("auto")
    yield allocate_and_evict("slots")


def keys_from(first: int, count: int) -> list[ChunkKey]:
    # New objects each time, as a request's keys are: no comparison may be saved by identity.
    return [ChunkKey(bytes(NAMESPACE_BYTES), (first + n).to_bytes(DIGEST_BYTES, "big")) for n in range(count)]


def open_manager(capacity: int, **memory: object) -> StorageManager:
    return StorageManager(load_config(overrides={"memory": {"capacity": capacity, **memory}}), tiers=[])


def fill(manager: StorageManager, keys: list[ChunkKey], nbytes: int) -> None:
    for key in keys:
        buffer = manager.allocate(nbytes)
        assert buffer is not None
        manager.put(key, buffer)


def _hit(manager: StorageManager) -> Callable[[], None]:
    sizes = [SMALL] * CHUNKS
    requests = itertools.cycle([keys_from(0, CHUNKS) for _ in range(8)])

    def run() -> None:
        keys = next(requests)
        assert manager.contains(keys) == CHUNKS
        lease = manager.acquire(keys, sizes)
        assert lease.ready == CHUNKS
        lease.close()

    return run


def hit_path() -> Case:
    """contains, acquire and release of a request that is whole in memory."""
    manager = open_manager(CHUNKS * SMALL)
    fill(manager, keys_from(0, CHUNKS), SMALL)
    return Case("L1 hit path", f"{CHUNKS} chunks", 0, _hit(manager), most_s=1e-3, close=manager.close, repeats=51)


def hit_path_beside_stores() -> Case:
    """The same while another thread copies 1 MiB chunks in, evicting others: what lookups lose to stores."""
    stored = 1 << 20
    manager = open_manager(2 * CHUNKS * SMALL + 64 * stored)
    fill(manager, keys_from(0, CHUNKS), SMALL)
    hit, stop, source = _hit(manager), threading.Event(), ctypes.create_string_buffer(stored)

    def store() -> None:
        for number in itertools.count(1 << 20):
            if stop.is_set() or (buffer := manager.allocate(stored)) is None:
                return
            ctypes.memmove(buffer.address, source, stored)
            manager.put(keys_from(number, 1)[0], buffer)

    thread = threading.Thread(target=store, daemon=True)

    def run() -> None:
        if not thread.ident:
            thread.start()
        hit()

    def close() -> None:
        stop.set()
        thread.join()
        manager.close()

    return Case("L1 hit path beside stores", f"{CHUNKS} chunks", 0, run, most_s=2e-3, close=close, repeats=101)


def miss_path() -> Case:
    """contains of 10,000 keys of which the last is missing."""
    manager = open_manager(10_000 * 4096)
    fill(manager, keys_from(0, 9_999), 4096)
    keys = keys_from(0, 10_000)

    def run() -> None:
        assert manager.contains(keys) == 9_999

    return Case("L1 lookup", "10000 keys", 0, run, most_s=1e-2, close=manager.close, repeats=21)


def copy_out() -> Case:
    """Chunks copied out of leased buffers, against memcpy out of one block of the same kind of memory."""
    total = COPIED_CHUNKS * CHUNK
    manager = open_manager(total)
    keys, sizes = keys_from(0, COPIED_CHUNKS), [CHUNK] * COPIED_CHUNKS
    fill(manager, keys, CHUNK)
    target, source = PinnedPool(total), PinnedPool(total)

    def run() -> None:
        with manager.acquire(keys, sizes) as lease:
            for index, buffer in enumerate(lease.buffers):
                ctypes.memmove(target.address + index * CHUNK, buffer.address, CHUNK)

    def memcpy() -> None:
        for start in range(0, total, CHUNK):
            ctypes.memmove(target.address + start, source.address + start, CHUNK)

    def close() -> None:
        for each in (manager, target, source):
            each.close()

    size = f"{COPIED_CHUNKS} x {CHUNK >> 20} MiB"
    return Case("L1 copy", size, total, run, memcpy, "memcpy", floor=0.85, close=close, repeats=81)


def allocate_and_evict(allocator: str) -> Case:
    """Storing into a full memory: allocation, eviction, insertion, without the copy."""
    manager = open_manager(CHUNKS * SMALL, allocator=allocator, slot=SMALL)
    firsts = itertools.count(0, CHUNKS)
    fill(manager, keys_from(next(firsts), CHUNKS), SMALL)

    def run() -> None:
        fill(manager, keys_from(next(firsts), CHUNKS), SMALL)

    name = f"L1 store, evicting ({allocator})"
    return Case(name, f"{CHUNKS} chunks", 0, run, most_s=2e-2, close=manager.close, repeats=21)
