"""The conformance suite of storage backends: subclass ``BackendTests`` in your tests, against the real thing.

    class TestMine(BackendTests):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return lambda: MyBackend(MyConfig(path=tmp_path))

``durable = False`` for a backend that forgets when it is closed. Three more fixtures, where your place allows them; the
tests that need one of them are skipped without it:

    open_small_backend    opens it with room for some 1 MiB: capacity
    damage                changes bytes of a chunk where it lies: checksums
    broken                a context in which the place fails: errors

docs/storage_plugins.md says which defects the suite finds, and which cannot be seen from outside.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NoReturn, TypeVar

import pytest

from lmcache import metrics
from lmcache.errors import ClosedError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PAGE, PinnedPool, PoolBuffer
from lmcache.storage.testing.buffers import WatchedBuffer, fill, make_key, similar_keys, take

T = TypeVar("T")
OpenBackend = Callable[[], StorageBackend]
SIZES = (1, 4095, 4096, 4097, 100_003, 1 << 20)
SMALL_BYTES = 1 << 20
"""Room of ``open_small_backend``."""
_NOT_OF_A_BACKEND = (__file__, random.__file__)
END_S = 60.0
"""By when a thread of a test must have ended: for ever, to whoever waits."""


class BackendTests:
    """What every backend must do."""

    durable = True
    selects_tenants = False  # True where clear_tenant is exact although keys() is None

    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        raise NotImplementedError("return a function that opens the backend on the same place each time")

    @pytest.fixture
    def open_small_backend(self) -> OpenBackend:
        """The same, of a place that has room for some 1 MiB, and gives up what it held for what is put."""
        return _lacking("open_small_backend", "capacity")

    @pytest.fixture
    def damage(self) -> Callable[[ChunkKey], None]:
        """Changes a byte of a chunk that ``open_backend`` put, where it lies."""
        return _lacking("damage", "that damaged bytes are a miss")

    @pytest.fixture
    def broken(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes a context in which ``open_backend``'s place fails. What was held before may be lost by that."""
        return _lacking("broken", "what comes out of a place that fails")

    @pytest.fixture
    def backend(self, open_backend: OpenBackend) -> Iterator[StorageBackend]:
        backend = open_backend()
        yield backend
        backend.close()

    @pytest.fixture
    def pool(self) -> Iterator[PinnedPool]:
        pool = PinnedPool(24 << 20)
        yield pool
        assert pool.used_bytes == 0, "a buffer was not given back"
        pool.close()

    @staticmethod
    def put(backend: StorageBackend, pool: PinnedPool, key: ChunkKey, nbytes: int, seed: int) -> bytes:
        buffer = take(pool, nbytes)
        data = fill(buffer, seed)
        assert backend.put([key], [buffer]) == 1
        assert same(bytes(buffer.view), data), "put changed the caller's buffer"
        buffer.view[:] = bytes(nbytes)  # the backend may not have kept the buffer
        buffer.release()
        return data

    @staticmethod
    def get(backend: StorageBackend, pool: PinnedPool, key: ChunkKey, nbytes: int) -> bytes | None:
        buffer = take(pool, nbytes)
        try:
            return bytes(buffer.view) if backend.get([key], [buffer]) else None
        finally:
            buffer.release()

    # -- one key -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_what_was_put_comes_back_bit_for_bit(self, backend: StorageBackend, pool: PinnedPool, nbytes: int) -> None:
        data = self.put(backend, pool, make_key(1), nbytes, seed=nbytes)
        assert backend.sizes([make_key(1)]) == [nbytes]
        assert same(self.get(backend, pool, make_key(1), nbytes), data)

    def test_an_unknown_key_is_a_miss(self, backend: StorageBackend, pool: PinnedPool) -> None:
        assert backend.contains([make_key(1)]) == 0
        assert backend.sizes([make_key(1)]) == []
        assert self.get(backend, pool, make_key(1), 4096) is None
        assert backend.remove([make_key(1)]) == 0
        assert (backend.clear(make_key(1).fingerprint), backend.clear()) == (0, 0)

    @pytest.mark.parametrize("wanted", [4095, 4097, 1, 8192])
    def test_another_length_is_a_miss(self, backend: StorageBackend, pool: PinnedPool, wanted: int) -> None:
        self.put(backend, pool, make_key(1), 4096, seed=1)
        assert self.get(backend, pool, make_key(1), wanted) is None

    def test_putting_again_is_held_once(self, backend: StorageBackend, pool: PinnedPool) -> None:
        data = self.put(backend, pool, make_key(1), 4096, seed=1)
        assert self.put(backend, pool, make_key(1), 4096, seed=1) == data
        assert same(self.get(backend, pool, make_key(1), 4096), data)
        assert backend.remove([make_key(1)]) == 1
        assert backend.contains([make_key(1)]) == 0

    @pytest.mark.parametrize("nbytes", [4096, 100, 9000])
    def test_putting_other_bytes_leaves_the_old_or_the_new(
        self, backend: StorageBackend, pool: PinnedPool, nbytes: int
    ) -> None:
        old = self.put(backend, pool, make_key(1), 4096, seed=1)
        new = self.put(backend, pool, make_key(1), nbytes, seed=2)
        (size,) = backend.sizes([make_key(1)])
        assert same(self.get(backend, pool, make_key(1), size), old, new)

    @pytest.mark.parametrize("forget", ["remove", "clear", "clear a format"])
    def test_what_is_put_after_a_removal_is_what_comes_back(
        self, backend: StorageBackend, pool: PinnedPool, forget: str
    ) -> None:
        self.put(backend, pool, make_key(1), 4096, seed=1)
        assert backend.sizes([make_key(1)]) == [4096]
        assert self.get(backend, pool, make_key(1), 4096) is not None
        if forget == "remove":
            assert backend.remove([make_key(1)]) == 1
        else:
            assert backend.clear(None if forget == "clear" else make_key(1).fingerprint) == 1
        assert backend.sizes([make_key(1)]) == []
        assert self.get(backend, pool, make_key(1), 4096) is None
        for nbytes in (4096, 5000):
            data = self.put(backend, pool, make_key(1), nbytes, seed=nbytes)
            assert backend.sizes([make_key(1)]) == [nbytes]
            assert same(self.get(backend, pool, make_key(1), nbytes), data)
            assert backend.remove([make_key(1)]) == 1

    # -- batches -------------------------------------------------------------------------------------------------------

    def test_keys_that_are_alike_are_different(self, backend: StorageBackend, pool: PinnedPool) -> None:
        keys = similar_keys()
        with buffers_of(pool, [64] * len(keys)) as buffers:
            data = [fill(buffer, seed) for seed, buffer in enumerate(buffers)]
            assert backend.put(keys[:1], buffers[:1]) == 1
            assert not any(backend.contains([key]) for key in keys[1:])
            assert backend.put(keys, buffers) == len(keys)
            blank(buffers)
            assert backend.get(keys, buffers) == len(keys)
            assert same([bytes(buffer.view) for buffer in buffers], data)
            assert backend.remove(keys[1:]) == len(keys) - 1
            assert same(self.get(backend, pool, keys[0], 64), data[0])

    def test_contains_and_get_stop_at_the_first_miss(self, backend: StorageBackend, pool: PinnedPool) -> None:
        data = {n: self.put(backend, pool, make_key(n), 5000, seed=n) for n in (0, 1, 3)}
        keys = [make_key(n) for n in range(4)]
        assert backend.contains(keys) == 2
        assert backend.sizes(keys) == [5000, 5000]
        with buffers_of(pool, [5000] * 4) as buffers:
            assert backend.get(keys, buffers) == 2
            assert same([bytes(b.view) for b in buffers[:2]], [data[0], data[1]])
            assert (backend.contains(keys[2:]), backend.get(keys[2:], buffers[2:])) == (0, 0)

    def test_a_batch_is_answered_in_its_order(self, backend: StorageBackend, pool: PinnedPool) -> None:
        sizes = {5: 9000, 2: 1, 7: 4096, 0: 100, 6: 20_000, 1: 4097, 3: 50_001, 4: 9000}
        with buffers_of(pool, list(sizes.values())) as buffers:
            data = {number: fill(buffer, number) for number, buffer in zip(sizes, buffers, strict=True)}
            assert backend.put([make_key(number) for number in sizes], buffers) == len(sizes)
        order = [3, 7, 4, 1, 0, 5, 6, 2]
        keys = [make_key(number) for number in order]
        assert backend.sizes(keys) == [sizes[number] for number in order]
        with buffers_of(pool, [sizes[number] for number in order]) as buffers:
            assert backend.get(keys, buffers) == len(order)
            assert same([bytes(buffer.view) for buffer in buffers], [data[number] for number in order])

    def test_empty_batches_are_nothing(self, backend: StorageBackend) -> None:
        assert (backend.contains([]), backend.get([], []), backend.put([], []), backend.remove([])) == (0, 0, 0, 0)
        assert backend.sizes([]) == []

    def test_a_key_may_stand_in_a_batch_twice(self, backend: StorageBackend, pool: PinnedPool) -> None:
        one, two = make_key(1), make_key(2)
        keys = [one, two, one, one]
        with buffers_of(pool, [5000] * 4) as buffers:
            data = [fill(buffer, seed) for seed, buffer in enumerate(buffers)]
            assert backend.put(keys, buffers) == 4
            assert backend.put(keys[:1] * 2, buffers[:2]) == 2, "held before"
            assert backend.contains(keys) == 4
            assert backend.sizes(keys) == [5000] * 4
            blank(buffers)
            assert backend.get(keys, buffers) == 4
            held = [bytes(buffer.view) for buffer in buffers]
            assert same(held, [data[0], data[1], data[0], data[0]]), "the first bytes of a batch are held"
        assert backend.remove([one, two, one]) == 2
        assert backend.contains([one]) == backend.contains([two]) == 0

    def test_remove_counts_what_was_there(self, backend: StorageBackend, pool: PinnedPool) -> None:
        for n in (1, 3, 4):
            self.put(backend, pool, make_key(n), 4096, seed=n)
        assert backend.remove([make_key(2), make_key(1), make_key(0), make_key(3)]) == 2
        assert [backend.contains([make_key(n)]) for n in range(5)] == [0, 0, 0, 0, 1]
        assert self.get(backend, pool, make_key(1), 4096) is None

    def test_clear_by_format_leaves_the_others(self, backend: StorageBackend, pool: PinnedPool) -> None:
        for n in range(3):
            self.put(backend, pool, make_key(n, tags=n), 4096, seed=n)
        kept = self.put(backend, pool, make_key(0, format=7), 4096, seed=9)
        assert backend.clear(make_key(0, format=5).fingerprint) == 0
        assert backend.clear(make_key(0).fingerprint) == 3
        assert not any(backend.contains([make_key(n, tags=n)]) for n in range(3))
        assert same(self.get(backend, pool, make_key(0, format=7), 4096), kept)
        assert backend.clear() == 1
        assert backend.contains([make_key(0, format=7)]) == 0

    def test_clear_by_tenant_leaves_the_others(self, backend: StorageBackend, pool: PinnedPool) -> None:
        mine = [make_key(0, tenant="a"), make_key(0, tenant="a", tags=1), make_key(0, tenant="a", format=7)]
        others = [make_key(0), make_key(0, tenant="b"), make_key(1, tenant="b", format=7)]
        for key in (*mine, *others):
            self.put(backend, pool, key, 4096, seed=1)
        assert backend.clear_tenant(mine[0].tenant, mine[0].fingerprint) >= 2
        assert [backend.contains([key]) for key in mine[:2]] == [0, 0]
        exact = self.selects_tenants or backend.keys() is not None
        if exact:  # else more may go
            assert [backend.contains([key]) for key in (mine[2], *others)] == [1, 1, 1, 1]
        assert backend.clear_tenant(mine[0].tenant) == 1 or not exact
        assert backend.contains(mine[2:]) == 0
        if exact:
            assert [backend.contains([key]) for key in others] == [1, 1, 1]

    def test_keys_names_all_that_is_held(self, backend: StorageBackend, pool: PinnedPool) -> None:
        keys = [make_key(n, format=n % 3, tags=n % 2) for n in range(7)]
        for n, key in enumerate(keys):
            self.put(backend, pool, key, 4096, seed=n)
        backend.remove(keys[2:3])
        names = backend.keys()
        if names is not None:
            assert sorted(names, key=ChunkKey.to_bytes) == sorted(keys[:2] + keys[3:], key=ChunkKey.to_bytes)

    # -- buffers -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("nbytes", [1, 4095, 4097, 100_003])
    def test_nothing_is_written_beside_the_buffer(self, backend: StorageBackend, nbytes: int) -> None:
        with contextlib.closing(PinnedPool(1 << 18)) as pool:
            data = self.put(backend, pool, make_key(1), nbytes, seed=1)
            with buffers_of(pool, [PAGE, nbytes, PAGE]) as buffers:
                expected = bytearray(random.Random(3).randbytes(pool.capacity))
                pool.view[:] = expected
                assert backend.get([make_key(1)], buffers[1:2]) == 1
                start = buffers[1].address - pool.address
                expected[start : start + nbytes] = data
                assert same(bytes(pool.view), expected)

    def test_buffers_stay_their_callers(self, backend: StorageBackend, pool: PinnedPool) -> None:
        with buffers_of(pool, [5000, 5000]) as buffers:
            for number, buffer in enumerate(buffers):
                fill(buffer, number)
            backend.put([make_key(0), make_key(1)], buffers)
            backend.get([make_key(0), make_key(9)], buffers)
            assert not any(buffer.shared for buffer in buffers), "a handle was kept"

    # -- capacity ------------------------------------------------------------------------------------------------------

    def test_what_put_counts_is_what_is_held(self, open_small_backend: OpenBackend, pool: PinnedPool) -> None:
        with contextlib.closing(open_small_backend()) as backend, buffers_of(pool, [300_000] * 8) as buffers:
            keys = [make_key(n) for n in range(8)]
            for number, buffer in enumerate(buffers):
                fill(buffer, number)
            counted = backend.put(keys, buffers)
            held = [key for key in keys if backend.contains([key])]
            assert 1 <= counted == len(held) <= 4, "1 MiB holds three chunks of 300,000 bytes"
            # What was held before may have to go for what comes, and is not counted then.
            again = [held[0], *(make_key(n) for n in range(8, 12))]
            assert backend.put(again, buffers[:5]) == sum(backend.contains([key]) for key in again)

    def test_a_small_place_takes_new_chunks_and_never_too_many(
        self, open_small_backend: OpenBackend, pool: PinnedPool
    ) -> None:
        with contextlib.closing(open_small_backend()) as backend:
            for n in range(12):
                data = self.put(backend, pool, make_key(n), 200_000, seed=n)
                assert same(self.get(backend, pool, make_key(n), 200_000), data)
            assert sum(backend.contains([make_key(n)]) for n in range(12)) <= 6
        with contextlib.closing(open_small_backend()) as backend:
            for n in range(12, 16):
                self.put(backend, pool, make_key(n), 200_000, seed=n)
            assert sum(backend.contains([make_key(n)]) for n in range(16)) <= 6, "what a restart found is not counted"

    def test_room_that_was_given_back_is_used_again(self, open_small_backend: OpenBackend, pool: PinnedPool) -> None:
        with contextlib.closing(open_small_backend()) as backend:
            kept = self.put(backend, pool, make_key(0), 100_000, seed=0)
            for n in range(1, 8):
                self.put(backend, pool, make_key(n), 700_000, seed=n)
                assert backend.remove([make_key(n)]) == 1
            assert same(self.get(backend, pool, make_key(0), 100_000), kept), "evicted for room that was free"

    def test_a_chunk_that_is_too_large_does_no_harm(self, open_small_backend: OpenBackend, pool: PinnedPool) -> None:
        with contextlib.closing(open_small_backend()) as backend:
            before = self.put(backend, pool, make_key(0), 50_000, seed=0)
            with buffers_of(pool, [50_000, 3 * SMALL_BYTES, 50_000]) as buffers:
                data = [fill(buffer, n) for n, buffer in enumerate(buffers)]
                assert backend.put([make_key(n) for n in (1, 2, 3)], buffers) == 2
            assert [backend.contains([make_key(n)]) for n in range(4)] == [1, 1, 0, 1]
            assert same(self.get(backend, pool, make_key(0), 50_000), before)
            assert same(self.get(backend, pool, make_key(1), 50_000), data[0])
            assert same(self.get(backend, pool, make_key(3), 50_000), data[2])

    # -- faults --------------------------------------------------------------------------------------------------------

    def test_damaged_bytes_are_a_miss_counted_and_removed(
        self, backend: StorageBackend, pool: PinnedPool, damage: Callable[[ChunkKey], None]
    ) -> None:
        data = [self.put(backend, pool, make_key(n), 20_000, seed=n) for n in range(3)]
        damage(make_key(1))
        before = corrupt_chunks()
        with buffers_of(pool, [20_000] * 3) as buffers:
            assert backend.get([make_key(n) for n in range(3)], buffers) == 1
        assert corrupt_chunks() > before
        assert [backend.contains([make_key(n)]) for n in range(3)] == [1, 0, 1]
        self.put(backend, pool, make_key(1), 20_000, seed=1)
        assert same([self.get(backend, pool, make_key(n), 20_000) for n in range(3)], data)

    def test_a_place_that_fails_is_a_storage_error_or_a_miss(
        self,
        backend: StorageBackend,
        pool: PinnedPool,
        broken: Callable[[], AbstractContextManager[None]],
    ) -> None:
        old = self.put(backend, pool, make_key(1), 20_000, seed=1)
        with broken(), buffers_of(pool, [20_000]) as buffers:
            new = fill(buffers[0], 2)
            assert may_fail(lambda: backend.put([make_key(2)], buffers), 0) == 0, "counted what cannot be held"
            found = may_fail(lambda: backend.get([make_key(1)], buffers), 0)
            assert found == 0 or same(bytes(buffers[0].view), old)
            for call in calls_of(backend, [make_key(3)], buffers).values():
                may_fail(call, None)
        assert same(self.get(backend, pool, make_key(1), 20_000), old, None)
        assert same(self.get(backend, pool, make_key(2), 20_000), new, None)
        self.put(backend, pool, make_key(4), 20_000, seed=4)
        assert same(self.get(backend, pool, make_key(4), 20_000), random.Random(4).randbytes(20_000))

    # -- closing -------------------------------------------------------------------------------------------------------

    def test_what_is_durable_survives_closing(
        self, backend: StorageBackend, open_backend: OpenBackend, pool: PinnedPool
    ) -> None:
        keys = [make_key(n, format=n) for n in range(3)]
        data = [self.put(backend, pool, key, 70_000, seed=n) for n, key in enumerate(keys)]
        backend.remove(keys[2:])
        backend.close()
        with contextlib.closing(open_backend()) as again:
            assert again.contains([keys[2]]) == 0
            expected = data[:2] if self.durable else [None, None]
            assert same([self.get(again, pool, key, 70_000) for key in keys[:2]], expected)
            assert again.clear() == (2 if self.durable else 0)

    def test_close_is_idempotent(self, backend: StorageBackend) -> None:
        backend.close()
        backend.close()

    def test_after_close_every_call_raises_closed_error(
        self, backend: StorageBackend, open_backend: OpenBackend, pool: PinnedPool
    ) -> None:
        data = self.put(backend, pool, make_key(1), 5000, seed=1)
        backend.close()
        with buffers_of(pool, [5000]) as buffers:
            for name, call in calls_of(backend, [make_key(1)], buffers).items():
                try:
                    answer = call()
                except ClosedError:
                    continue
                assert (name, answer) == ("keys", None), f"{name} answered {answer!r} after close()"
        if self.durable:
            with contextlib.closing(open_backend()) as again:
                assert same(self.get(again, pool, make_key(1), 5000), data), "done after close()"

    @pytest.mark.parametrize("operation", ["put", "get"])
    def test_a_call_during_which_it_is_closed_ends(
        self, backend: StorageBackend, pool: PinnedPool, operation: str
    ) -> None:
        """Another thread closes it when the call touches its buffer."""
        data = self.put(backend, pool, make_key(1), 50_000, seed=1)
        with meanwhile(backend.close) as touched, buffers_of(pool, [50_000]) as buffers:
            watched = WatchedBuffer(buffers[0], touched)
            with contextlib.suppress(ClosedError, StorageError):
                if operation == "put":
                    assert backend.put([make_key(2)], [watched]) in (0, 1)
                elif backend.get([make_key(1)], [watched]):
                    assert same(bytes(buffers[0].view), data)

    def test_calls_that_run_while_it_is_closed_end(self, backend: StorageBackend, pool: PinnedPool) -> None:
        busy, closed = threading.Barrier(5), threading.Event()

        def use(buffers: list[PoolBuffer], key: ChunkKey) -> None:
            data = fill(buffers[0], 1)
            backend.put([key], buffers)
            blank(buffers)
            assert not backend.get([key], buffers) or same(bytes(buffers[0].view), data)
            backend.remove([key])

        def work(thread: int) -> None:
            with buffers_of(pool, [20_000]) as buffers:
                try:
                    use(buffers, make_key(0, format=thread))
                except BaseException:
                    busy.abort()
                    raise
                busy.wait(END_S)
                late = False
                with contextlib.suppress(ClosedError, StorageError):
                    while not late:
                        late = closed.is_set()
                        use(buffers, make_key(0, format=thread))
                    raise AssertionError("it goes on after close()")

        with side_by_side(work, range(4)):
            busy.wait(END_S)
            backend.close()
            closed.set()

    # -- threads -------------------------------------------------------------------------------------------------------

    def test_many_threads_read_and_write_one_key(self, backend: StorageBackend, pool: PinnedPool) -> None:
        possible = {random.Random(thread).randbytes(50_000) for thread in range(4)}

        def work(thread: int) -> None:
            with buffers_of(pool, [50_000]) as buffers:
                for _ in range(10):
                    fill(buffers[0], thread)
                    backend.put([make_key(1)], buffers)
                    blank(buffers)
                    assert not backend.get([make_key(1)], buffers) or bytes(buffers[0].view) in possible

        with side_by_side(work, range(4)):
            pass
        assert same(self.get(backend, pool, make_key(1), 50_000), *possible)

    def test_threads_keep_their_keys_apart(self, backend: StorageBackend, pool: PinnedPool) -> None:
        def work(thread: int) -> None:
            nbytes = 100_003 if thread % 2 else 100_000
            for turn in range(10):
                keys = [make_key(turn, format=thread), make_key(turn, tags=thread + 1)]
                with buffers_of(pool, [nbytes] * 2) as buffers:
                    data = [fill(buffer, 100 * thread + turn + 50 * n) for n, buffer in enumerate(buffers)]
                    assert backend.put(keys, buffers) == 2
                    blank(buffers)
                    assert backend.get(keys, buffers) == 2
                    assert same([bytes(buffer.view) for buffer in buffers], data)
                    assert backend.remove(keys[:1]) == 1
                    assert backend.contains(keys[:1]) == 0

        with side_by_side(work, range(4)):
            pass

    def test_threads_may_put_and_remove_the_same_keys(self, backend: StorageBackend, pool: PinnedPool) -> None:
        keys = [make_key(n, format=n % 2) for n in range(4)]
        data = [random.Random(n).randbytes(9000) for n in range(4)]

        def work(thread: int) -> None:
            dice = random.Random(thread)
            with buffers_of(pool, [9000] * 2) as buffers:
                for turn in range(15):
                    some = dice.sample(range(4), 2)
                    batch = [keys[n] for n in some]
                    for n, buffer in zip(some, buffers, strict=True):
                        buffer.view[:] = data[n]
                    assert 0 <= backend.put(batch, buffers) <= 2
                    blank(buffers)
                    got = backend.get(batch, buffers)
                    assert same([bytes(buffer.view) for buffer in buffers[:got]], [data[n] for n in some[:got]])
                    assert backend.sizes(batch) in ([], [9000], [9000] * 2)
                    assert 0 <= backend.remove(batch[:1]) <= 1
                    assert set(backend.keys() or ()) <= set(keys)
                    if turn % 5 == thread:
                        backend.clear(batch[0].fingerprint)

        with side_by_side(work, range(4)):
            pass
        backend.remove(keys)
        assert not any(backend.contains([key]) for key in keys)
        assert self.put(backend, pool, keys[0], 9000, seed=0) == self.get(backend, pool, keys[0], 9000)
        assert backend.clear() == 1

    @pytest.mark.parametrize("operation", ["put", "get"])
    def test_calls_on_other_keys_meanwhile_change_nothing(
        self, backend: StorageBackend, pool: PinnedPool, operation: str
    ) -> None:
        """Whenever a call touches its buffer, another thread puts and gets another chunk of that length."""
        data = {0: self.put(backend, pool, make_key(0), 50_000, seed=0)}

        def other() -> None:
            number = len(data)
            data[number] = self.put(backend, pool, make_key(number), 50_000, seed=number)
            assert same(self.get(backend, pool, make_key(number), 50_000), data[number])

        with meanwhile(other) as touched, buffers_of(pool, [50_000]) as buffers:
            watched = WatchedBuffer(buffers[0], touched)
            if operation == "get":
                assert backend.get([make_key(0)], [watched]) == 1
                assert same(bytes(buffers[0].view), data[0])
            else:
                mine = fill(buffers[0], 99)
                assert backend.put([make_key(99)], [watched]) == 1
                assert same(self.get(backend, pool, make_key(99), 50_000), mine)
        assert len(data) > 1, "the buffer was never touched"
        for number, expected in data.items():
            assert same(self.get(backend, pool, make_key(number), 50_000), expected)

    @pytest.mark.parametrize("held", [False, True])
    def test_a_chunk_is_seen_whole_or_not_at_all(self, backend: StorageBackend, pool: PinnedPool, held: bool) -> None:
        """Whenever put touches the buffer, another thread looks. What was held before is seen until it is replaced."""
        old = self.put(backend, pool, make_key(1), 50_000, seed=0) if held else None
        seen: list[bytes | None] = []

        def look() -> None:
            there = backend.sizes([make_key(1)]) == [50_000]
            seen.append(self.get(backend, pool, make_key(1), 50_000) if there else None)
            assert (seen[-1] is not None) or not there, "there, and a miss"

        with meanwhile(look) as touched, buffers_of(pool, [50_000]) as buffers:
            new = fill(buffers[0], 1)
            assert backend.put([make_key(1)], [WatchedBuffer(buffers[0], touched)]) == 1
        assert seen or held, "the buffer was never touched"
        assert all(data in (old, new) for data in seen)

    def test_a_chunk_that_is_being_written_is_seen_whole(self, backend: StorageBackend, pool: PinnedPool) -> None:
        def write(number: int) -> None:
            self.put(backend, pool, make_key(number), SMALL_BYTES, seed=number)

        for number in range(5):
            expected = random.Random(number).randbytes(SMALL_BYTES)
            with side_by_side(write, [number]) as running:
                sizes: list[int] = []
                while not sizes and not running[0].done():
                    sizes = backend.sizes([make_key(number)])
                if sizes:
                    assert sizes == [SMALL_BYTES]
                    assert same(self.get(backend, pool, make_key(number), SMALL_BYTES), expected)


def _lacking(fixture: str, what: str) -> NoReturn:
    pytest.skip(f"without a fixture {fixture} the suite does not see {what}")


def calls_of(
    backend: StorageBackend, keys: Sequence[ChunkKey], buffers: Sequence[PoolBuffer]
) -> dict[str, Callable[[], object]]:
    """Every call but close()."""
    return {
        "sizes": lambda: backend.sizes(keys),
        "contains": lambda: backend.contains(keys),
        "get": lambda: backend.get(keys, buffers),
        "put": lambda: backend.put(keys, buffers),
        "remove": lambda: backend.remove(keys),
        "clear of a format": lambda: backend.clear(keys[0].fingerprint),
        "clear": lambda: backend.clear(),
        "keys": lambda: backend.keys(),
    }


def may_fail(call: Callable[[], T], otherwise: T) -> T:
    """``call()``, or ``otherwise`` when it raises StorageError."""
    try:
        return call()
    except StorageError:
        return otherwise


def same(got: object, *possible: object) -> bool:
    """Whether bytes, or lists of them, are one of ``possible``.

    Not ``==`` in an assert: where CI is set, pytest writes out how long byte strings differ, which takes minutes.
    """
    return got in possible


@contextlib.contextmanager
def buffers_of(pool: PinnedPool, sizes: Sequence[int]) -> Iterator[list[PoolBuffer]]:
    buffers = [take(pool, nbytes) for nbytes in sizes]
    try:
        yield buffers
    finally:
        pool.release_all(buffers)


def blank(buffers: Sequence[PoolBuffer]) -> None:
    for buffer in buffers:
        buffer.view[:] = bytes(buffer.nbytes)


def corrupt_chunks() -> float:
    """How many were counted, whatever the tier is called."""
    samples = [sample for metric in metrics.CORRUPT_CHUNKS.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


@contextlib.contextmanager
def side_by_side(work: Callable[[int], object], numbers: Sequence[int]) -> Iterator[list[Future[object]]]:
    """``work`` of each number on a thread of its own while the block runs; raises what they raise.

    The threads stop now and then between two lines of the backend, so that each such place is seen by the others.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(len(numbers), initializer=_stop_now_and_then) as executor:
            running = [executor.submit(work, number) for number in numbers]
            yield running
            for future in running:
                future.result(END_S)
    finally:
        sys.setswitchinterval(interval)


def _stop_now_and_then() -> None:
    dice = random.Random(threading.get_ident())

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and dice.random() < 0.2:
            time.sleep(1e-6)
        return None if frame.f_code.co_filename in _NOT_OF_A_BACKEND else trace

    sys.settrace(trace)


@contextlib.contextmanager
def meanwhile(call: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """A function that has another thread run ``call`` and waits for it, but not long: it may wait for us."""
    running: list[Future[None]] = []
    with ThreadPoolExecutor(1) as executor:

        def touched() -> None:
            if len(running) < 20 and (not running or running[-1].done()):
                running.append(executor.submit(call))
                wait(running[-1:], 0.1)

        yield touched
        for future in running:
            future.result(END_S)
