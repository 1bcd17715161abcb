"""The conformance suite of storage backends: subclass ``BackendTests`` in your tests, against the real thing.

    class TestMine(BackendTests):
        @pytest.fixture
        def open_backend(self, tmp_path):
            return lambda: MyBackend(MyConfig(path=tmp_path))

``durable = False`` for a backend that forgets when it is closed. A fixture ``open_small_backend`` opens it with room
for some 1 MiB, where it has a capacity. The suite does not see the place itself: header, checksum and damage in it
want tests of your own.

Random work against a dict, with restarts and faults (needs hypothesis):

    class MyMachine(BackendMachine(lambda folder: MyBackend(MyConfig(path=folder)))):
        ...                                 # rules, hooks and flags of your own
    TestMyMachine = MyMachine.TestCase
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from lmcache.errors import StorageError
from lmcache.keys import DIGEST_BYTES, FINGERPRINT_BYTES, TAGS_BYTES, ChunkKey, tenant_id
from lmcache.storage.base import StorageBackend
from lmcache.storage.pool import PinnedPool, PoolBuffer

if TYPE_CHECKING:
    from hypothesis.stateful import RuleBasedStateMachine

T = TypeVar("T")
OpenBackend = Callable[[], StorageBackend]
SIZES = (1, 4095, 4096, 4097, 100_003, 1 << 20)


def make_key(number: int, *, format: int = 0, tags: int = 0, tenant: str = "") -> ChunkKey:
    """A distinct key for every number, format, tag and tenant."""
    namespace = format.to_bytes(FINGERPRINT_BYTES, "big") + tenant_id(tenant) + tags.to_bytes(TAGS_BYTES, "big")
    return ChunkKey(namespace, number.to_bytes(DIGEST_BYTES, "big"))


def fill(buffer: PoolBuffer, seed: int) -> bytes:
    """Random bytes, the same for the same seed; returns a copy."""
    data = random.Random(seed).randbytes(buffer.nbytes)
    buffer.view[:] = data
    return data


class BackendTests:
    """What every backend must do."""

    durable = True
    selects_tenants = False  # True where clear_tenant is exact although keys() is None

    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        raise NotImplementedError("return a function that opens the backend on the same place each time")

    @pytest.fixture
    def open_small_backend(self, open_backend: OpenBackend) -> OpenBackend:
        """A place with room for some 1 MiB; unless overridden, the same as the other."""
        return open_backend

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

    def test_what_is_durable_survives_closing(
        self, backend: StorageBackend, open_backend: OpenBackend, pool: PinnedPool
    ) -> None:
        data = self.put(backend, pool, make_key(1), 70_000, seed=1)
        backend.close()
        again = open_backend()
        assert self.get(again, pool, make_key(1), 70_000) == (data if self.durable else None)
        again.close()

    def test_what_put_counts_is_what_is_held(self, open_small_backend: OpenBackend, pool: PinnedPool) -> None:
        backend = open_small_backend()
        keys, buffers = [make_key(n) for n in range(8)], [take(pool, 300_000) for _ in range(8)]
        for number, buffer in enumerate(buffers):
            fill(buffer, number)
        counted = backend.put(keys, buffers)
        for buffer in buffers:
            buffer.release()
        found = sum(backend.contains([key]) for key in keys)
        backend.close()
        assert counted == found

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


class MachineModel:
    """What a place may hold, and the work that ``BackendMachine`` makes rules of."""

    durable = True
    """What was held before a restart is held after it."""
    exact = True
    """Nobody else uses the place: ``contains`` is not stale, ``remove`` counts what it found."""
    lossless = False
    """There is room for everything, so what was put, and not removed, is a hit, until the first fault."""
    breakable = False
    """``break_place`` and ``mend_place`` do something. While broken, any call may raise StorageError."""

    LENGTHS = (1, 4097, 9000)

    def __init__(self, open_backend: Callable[[Path], StorageBackend]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lmcache-machine-"))
        self.pool = PinnedPool(1 << 20)
        self._open = open_backend
        self.backend = open_backend(self.folder)
        self.backend.clear()
        self.may: dict[int, set[bytes]] = {}
        """For each number of a key that may be held, what it may be."""
        self.broken = self.faulted = False

    @staticmethod
    def key(number: int) -> ChunkKey:
        return make_key(number, format=number % 2)

    def length(self, number: int) -> int:
        return self.LENGTHS[number % len(self.LENGTHS)]

    def break_place(self) -> None:
        """Make the place fail from now on."""

    def mend_place(self) -> None:
        """Let it work again. Also called at the end, broken or not."""

    def check(self) -> None:
        """Whatever else holds after every step."""

    def put_some(self, numbers: Sequence[int], seed: int) -> None:
        buffers = [take(self.pool, self.length(number)) for number in numbers]
        data = [fill(buffer, seed + number) for number, buffer in zip(numbers, buffers, strict=True)]
        absent = {number for number in numbers if not self.attempt(lambda: self.holds(number), True)}  # noqa: B023
        held = self.attempt(lambda: self.backend.put([self.key(number) for number in numbers], buffers), 0)
        for buffer in buffers:
            buffer.view[:] = bytes(buffer.nbytes)  # the backend may not have kept the buffer
            buffer.release()
        assert 0 <= held <= len(numbers)
        assert held == len(numbers) or not self.must_hit
        for number, new in zip(numbers, data, strict=True):
            sure = number in absent and self.exact and not self.faulted
            self.may[number] = {new} if sure else self.may.get(number, set()) | {new}

    def get_some(self, numbers: Sequence[int]) -> None:
        buffers = [take(self.pool, self.length(number)) for number in numbers]
        count = self.attempt(lambda: self.backend.get([self.key(number) for number in numbers], buffers), 0)
        found = [bytes(buffer.view) for buffer in buffers[:count]]
        for buffer in buffers:
            buffer.release()
        for number, data in zip(numbers, found, strict=False):
            assert data in self.may.get(number, ()), f"key {number} gave what was never put, or was removed"
            if self.exact:
                self.may[number] = {data}
        if self.must_hit:
            assert count == next((i for i, number in enumerate(numbers) if number not in self.may), len(numbers))

    def ask_sizes(self, numbers: Sequence[int]) -> None:
        keys = [self.key(number) for number in numbers]
        none: list[int] = []
        sizes = self.attempt(lambda: self.backend.sizes(keys), none)
        assert sizes == [self.length(number) for number in numbers[: len(sizes)]]
        if self.exact:
            assert all(number in self.may for number in numbers[: len(sizes)])

    def remove_some(self, numbers: Sequence[int]) -> None:
        present = sum(self.attempt(lambda: self.holds(number), False) for number in numbers)  # noqa: B023
        removed = self.attempt(lambda: self.backend.remove([self.key(number) for number in numbers]), None)
        if removed is None:
            return  # it raised: they may or may not be there
        assert removed == present or not self.exact or self.faulted
        for number in numbers:
            assert not self.attempt(lambda: self.holds(number), False)  # noqa: B023
            self.may.pop(number, None)

    def clear_format(self, format: int | None) -> None:
        fingerprint = None if format is None else make_key(0, format=format).fingerprint
        if self.attempt(lambda: self.backend.clear(fingerprint), None) is not None:
            self.may = {n: data for n, data in self.may.items() if format not in (None, n % 2)}

    def reopen(self) -> None:
        before = [self.holds(number) for number in range(10)]
        self.backend.close()
        self.backend = self._open(self.folder)
        if not self.durable:
            self.may.clear()
        elif self.exact and not self.faulted:
            assert [self.holds(number) for number in range(10)] == before

    def set_broken(self, broken: bool) -> None:
        self.broken = broken
        self.faulted |= broken
        (self.break_place if broken else self.mend_place)()

    def holds(self, number: int) -> bool:
        return self.backend.contains([self.key(number)]) == 1

    @property
    def must_hit(self) -> bool:
        return self.lossless and not self.faulted

    def attempt(self, call: Callable[[], T], otherwise: T) -> T:
        """``call()``, which may raise StorageError only while the place is broken."""
        try:
            return call()
        except StorageError:
            assert self.broken, "StorageError although nothing is wrong with the place"
            return otherwise

    def end(self) -> None:
        self.mend_place()
        self.backend.close()
        self.pool.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def BackendMachine(open_backend: Callable[[Path], StorageBackend]) -> type[RuleBasedStateMachine]:
    """A hypothesis state machine of put, get, remove, clear, restart and faults; subclass it (see ``MachineModel``).

    open_backend: opens the place in the given folder, fresh for each run; a place that has no folder ignores it.
    """
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

    some = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)

    class Machine(MachineModel, RuleBasedStateMachine):
        def __init__(self) -> None:
            RuleBasedStateMachine.__init__(self)
            MachineModel.__init__(self, open_backend)

        @rule(numbers=some, seed=st.integers(0, 1000))
        def put(self, numbers: list[int], seed: int) -> None:
            self.put_some(numbers, seed)

        @rule(numbers=some)
        def get(self, numbers: list[int]) -> None:
            self.get_some(numbers)

        @rule(numbers=some)
        def sizes(self, numbers: list[int]) -> None:
            self.ask_sizes(numbers)

        @rule(numbers=some)
        def remove(self, numbers: list[int]) -> None:
            self.remove_some(numbers)

        @rule(format=st.sampled_from([0, 1, None]))
        def clear(self, format: int | None) -> None:
            self.clear_format(format)

        @precondition(lambda self: not self.broken)
        @rule()
        def restart(self) -> None:
            self.reopen()

        @precondition(lambda self: self.breakable)
        @rule(broken=st.booleans())
        def fault(self, broken: bool) -> None:
            self.set_broken(broken)

        @invariant()
        def all_buffers_are_returned(self) -> None:
            assert self.pool.used_bytes == 0
            self.check()

        def teardown(self) -> None:
            self.end()

    return Machine
