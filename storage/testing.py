"""The conformance suite of storage backends: subclass ``BackendTests`` in your tests, against the real thing.

    class TestMine(BackendTests):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return lambda: MyBackend(MyConfig(path=tmp_path))

``durable = False`` for a backend that forgets when it is closed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest

from lmcache.keys import DIGEST_BYTES, FINGERPRINT_BYTES, NAMESPACE_BYTES, ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.pool import PinnedPool, PoolBuffer

OpenBackend = Callable[[], StorageBackend]
SIZES = (1, 4095, 4096, 4097, 100_003, 1 << 20)


def make_key(number: int, *, format: int = 0, tags: int = 0) -> ChunkKey:
    """A distinct key for every number, format and tag."""
    fingerprint = format.to_bytes(FINGERPRINT_BYTES, "big")
    namespace = fingerprint + tags.to_bytes(NAMESPACE_BYTES - FINGERPRINT_BYTES, "big")
    return ChunkKey(namespace, number.to_bytes(DIGEST_BYTES, "big"))


def fill(buffer: PoolBuffer, seed: int) -> bytes:
    """Random bytes, the same for the same seed; returns a copy."""
    data = random.Random(seed).randbytes(buffer.nbytes)
    buffer.view[:] = data
    return data


class BackendTests:
    """What every backend must do."""

    durable = True

    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        raise NotImplementedError("return a function that opens the backend on the same place each time")

    @pytest.fixture
    def backend(self, open_backend: OpenBackend) -> Iterator[StorageBackend]:
        backend = open_backend()
        yield backend
        backend.close()

    @pytest.fixture
    def pool(self) -> Iterator[PinnedPool]:
        pool = PinnedPool(64 << 20)
        yield pool
        assert pool.used_bytes == 0, "a test of the suite leaked a buffer"
        pool.close()

    @staticmethod
    def put(backend: StorageBackend, pool: PinnedPool, key: ChunkKey, nbytes: int, seed: int) -> bytes:
        buffer = take(pool, nbytes)
        data = fill(buffer, seed)
        assert backend.put([key], [buffer]) == 1
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

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_what_was_put_comes_back_bit_for_bit(self, backend: StorageBackend, pool: PinnedPool, nbytes: int) -> None:
        data = self.put(backend, pool, make_key(1), nbytes, seed=nbytes)
        assert self.get(backend, pool, make_key(1), nbytes) == data

    def test_an_unknown_key_is_a_miss(self, backend: StorageBackend, pool: PinnedPool) -> None:
        assert backend.contains([make_key(1)]) == 0
        assert self.get(backend, pool, make_key(1), 4096) is None
        assert backend.remove([make_key(1)]) == 0

    def test_keys_that_differ_in_one_field_are_different(self, backend: StorageBackend, pool: PinnedPool) -> None:
        self.put(backend, pool, make_key(1), 4096, seed=1)
        for other in (make_key(2), make_key(1, format=1), make_key(1, tags=1)):
            assert backend.contains([other]) == 0
            assert self.get(backend, pool, other, 4096) is None

    def test_contains_and_get_stop_at_the_first_miss(self, backend: StorageBackend, pool: PinnedPool) -> None:
        data = {n: self.put(backend, pool, make_key(n), 5000, seed=n) for n in (0, 1, 3)}
        keys = [make_key(n) for n in range(4)]
        assert backend.contains(keys) == 2
        assert backend.sizes(keys) == [5000, 5000]
        buffers = [take(pool, 5000) for _ in keys]
        assert backend.get(keys, buffers) == 2
        assert [bytes(b.view) for b in buffers[:2]] == [data[0], data[1]]
        for buffer in buffers:
            buffer.release()

    def test_empty_batches_are_nothing(self, backend: StorageBackend) -> None:
        assert (backend.contains([]), backend.get([], []), backend.put([], []), backend.remove([])) == (0, 0, 0, 0)

    @pytest.mark.parametrize("wanted", [4095, 4097, 1, 8192])
    def test_another_length_is_a_miss(self, backend: StorageBackend, pool: PinnedPool, wanted: int) -> None:
        self.put(backend, pool, make_key(1), 4096, seed=1)
        assert self.get(backend, pool, make_key(1), wanted) is None

    def test_putting_again_is_held_once(self, backend: StorageBackend, pool: PinnedPool) -> None:
        data = self.put(backend, pool, make_key(1), 4096, seed=1)
        assert self.put(backend, pool, make_key(1), 4096, seed=1) == data
        assert self.get(backend, pool, make_key(1), 4096) == data
        assert backend.remove([make_key(1)]) == 1
        assert backend.contains([make_key(1)]) == 0

    def test_remove_counts_what_was_there(self, backend: StorageBackend, pool: PinnedPool) -> None:
        self.put(backend, pool, make_key(1), 4096, seed=1)
        assert backend.remove([make_key(2), make_key(1)]) == 1
        assert self.get(backend, pool, make_key(1), 4096) is None

    def test_clear_by_format_leaves_the_others(self, backend: StorageBackend, pool: PinnedPool) -> None:
        for n in range(3):
            self.put(backend, pool, make_key(n, tags=n), 4096, seed=n)
        kept = self.put(backend, pool, make_key(0, format=7), 4096, seed=9)
        assert backend.clear(make_key(0).fingerprint) == 3
        assert backend.contains([make_key(0)]) == 0
        assert self.get(backend, pool, make_key(0, format=7), 4096) == kept
        assert backend.clear() == 1
        assert backend.contains([make_key(0, format=7)]) == 0

    def test_what_is_durable_survives_closing(
        self, backend: StorageBackend, open_backend: OpenBackend, pool: PinnedPool
    ) -> None:
        data = self.put(backend, pool, make_key(1), 70_000, seed=1)
        backend.close()
        again = open_backend()
        assert self.get(again, pool, make_key(1), 70_000) == (data if self.durable else None)
        again.close()

    def test_close_is_idempotent(self, backend: StorageBackend) -> None:
        backend.close()
        backend.close()

    def test_many_threads_read_and_write_one_key(self, backend: StorageBackend, pool: PinnedPool) -> None:
        expected = random.Random(5).randbytes(50_000)
        wrong: list[bytes] = []

        def work() -> None:
            for _ in range(10):
                buffer = take(pool, 50_000)
                fill(buffer, 5)
                backend.put([make_key(1)], [buffer])
                buffer.view[:] = bytes(50_000)
                if backend.get([make_key(1)], [buffer]) and bytes(buffer.view) != expected:
                    wrong.append(bytes(buffer.view))
                buffer.release()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert self.get(backend, pool, make_key(1), 50_000) == expected


def take(pool: PinnedPool, nbytes: int) -> PoolBuffer:
    """A buffer that the test knows to fit."""
    buffer = pool.allocate(nbytes)
    assert buffer is not None
    return buffer
