"""The pool: buffers never overlap, each handle is released once, everything comes back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache.errors import BufferStateError, ClosedError, ConfigError
from lmcache.storage.allocators import BestFit
from lmcache.storage.pool import PAGE, PinnedPool, PoolBuffer

PAGES = 32


class PoolMachine(RuleBasedStateMachine):
    """Random allocations, shares and releases against a list of what must be held."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PinnedPool(PAGES * PAGE)
        self.held: list[tuple[PoolBuffer, int]] = []
        self.stamp = 0

    @rule(nbytes=st.integers(1, 12 * PAGE))
    def allocate(self, nbytes: int) -> None:
        before = self.pool.free_bytes
        buffer = self.pool.allocate(nbytes)
        if buffer is None:
            assert self.held, "an empty pool must serve anything that fits it"
            assert self.pool.free_bytes == before
            return
        self.stamp = (self.stamp + 1) % 256
        buffer.view[:] = bytes([self.stamp]) * nbytes
        self.held.append((buffer, self.stamp))

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.held:
            buffer, stamp = data.draw(st.sampled_from(self.held))
            self.held.append((buffer.share(), stamp))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            buffer, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            buffer.release()
            with pytest.raises(BufferStateError):
                buffer.release()

    @invariant()
    def contents_are_untouched(self) -> None:
        for buffer, stamp in self.held:
            assert buffer.address % PAGE == 0
            assert bytes(buffer.view) == bytes([stamp]) * buffer.nbytes

    @invariant()
    def free_runs_and_used_bytes_add_up(self) -> None:
        blocks = {buffer.address: -(-buffer.nbytes // PAGE) * PAGE for buffer, _ in self.held}
        assert self.pool.used_bytes == sum(blocks.values())
        assert isinstance(self.pool._allocator, BestFit)
        runs = self.pool._allocator.runs()
        assert sum(length for _, length in runs) == self.pool.free_bytes
        assert all(a + length < b for (a, length), (b, _) in itertools.pairwise(runs)), "runs must merge"

    def teardown(self) -> None:
        for buffer, _ in self.held:
            buffer.release()
        assert self.pool.used_bytes == 0
        whole = self.pool.allocate(PAGES * PAGE)
        assert whole is not None
        whole.release()
        self.pool.close()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_what_does_not_fit_is_none() -> None:
    pool = PinnedPool(4 * PAGE)
    assert pool.allocate(5 * PAGE) is None
    first = pool.allocate(3 * PAGE)
    assert first is not None
    assert pool.allocate(2 * PAGE) is None
    first.release()
    pool.close()


def test_a_released_handle_is_refused_and_its_twin_is_not() -> None:
    pool = PinnedPool(4 * PAGE)
    one = pool.allocate(100)
    assert one is not None
    two = one.share()
    assert one.shared
    one.release()
    with pytest.raises(BufferStateError, match="already released"):
        _ = one.view
    assert not two.shared
    assert len(two.view) == 100
    two.release()
    assert pool.used_bytes == 0
    pool.close()


def test_closing_tolerates_views_and_refuses_new_buffers() -> None:
    pool = PinnedPool(4 * PAGE)
    buffer = pool.allocate(10)
    assert buffer is not None
    view = buffer.view
    pool.close()
    pool.close()
    assert bytes(view) == bytes(10)
    with pytest.raises(ClosedError):
        pool.allocate(1)


def test_a_pool_smaller_than_a_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4096"):
        PinnedPool(100)
