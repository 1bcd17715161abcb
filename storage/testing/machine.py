"""Random work on a backend against a dict, with restarts and faults (needs hypothesis)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lmcache.errors import StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing.buffers import fill, make_key, take

if TYPE_CHECKING:
    from hypothesis.stateful import RuleBasedStateMachine

T = TypeVar("T")


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
        data = [fill(buffer, 100 * seed + at) for at, buffer in enumerate(buffers)]
        absent = {number for number in numbers if not self.attempt(lambda: self.holds(number), True)}  # noqa: B023
        held = self.attempt(lambda: self.backend.put([self.key(number) for number in numbers], buffers), 0)
        for buffer in buffers:
            buffer.view[:] = bytes(buffer.nbytes)  # the backend may not have kept the buffer
            buffer.release()
        assert 0 <= held <= len(numbers)
        assert held == len(numbers) or not self.must_hit
        first: set[int] = set()
        for number, new in zip(numbers, data, strict=True):
            sure = number in absent and self.exact and not self.faulted
            if sure and number not in first:
                self.may[number] = {new}
            elif not (sure and self.lossless):  # there a key that stands in the batch twice holds the first bytes
                self.may[number] = self.may.get(number, set()) | {new}
            first.add(number)

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
        present = sum(self.attempt(lambda: self.holds(number), False) for number in set(numbers))  # noqa: B023
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

    some = st.lists(st.integers(0, 9), min_size=1, max_size=4)

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
