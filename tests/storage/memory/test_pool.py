"""The pool: buffers never overlap, each handle is released once, everything comes back."""

from __future__ import annotations

import itertools
import mmap
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache.errors import BufferStateError, ClosedError, ConfigError
from lmcache.storage.memory import host_memory
from lmcache.storage.memory.allocators import BestFit
from lmcache.storage.memory.pool import PAGE, PinnedPool, PoolBuffer

PAGES = 32


class PoolMachine(RuleBasedStateMachine):
    """Random allocations, shares and releases against a list of what must be held."""

    allocator: ClassVar[str] = "auto"
    slot: ClassVar[int | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.pool = PinnedPool(PAGES * PAGE, allocator=self.allocator, slot=self.slot)
        self.held: list[tuple[PoolBuffer, int]] = []
        self.stamp = 0

    @rule(nbytes=st.integers(1, 12 * PAGE))
    def allocate(self, nbytes: int) -> None:
        before = self.pool.free_bytes
        buffer = self.pool.allocate(nbytes)
        if buffer is None:
            assert self.held or nbytes > self.pool.largest, "an empty pool must serve anything that fits it"
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
        blocks = {buffer.address: self.slot or -(-buffer.nbytes // PAGE) * PAGE for buffer, _ in self.held}
        assert self.pool.used_bytes == sum(blocks.values())
        edges = sorted((start, start + size) for start, size in blocks.items())
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(edges)), "blocks must not overlap"
        if not isinstance(self.pool._allocator, BestFit) or self.stamp % 3:
            return  # looking at the runs merges what waits: not always, or waiting blocks would never be tested
        runs = self.pool._allocator.runs()
        assert sum(length for _, length in runs) == self.pool.free_bytes
        assert all(a + length < b for (a, length), (b, _) in itertools.pairwise(runs)), "runs must merge"

    def teardown(self) -> None:
        for buffer, _ in self.held:
            buffer.release()
        assert self.pool.used_bytes == 0
        whole = self.pool.allocate(self.pool.largest)
        assert whole is not None
        whole.release()
        self.pool.close()


class BestFitMachine(PoolMachine):
    allocator = "best_fit"


class SlotsMachine(PoolMachine):
    allocator = "slots"
    slot = 5 * PAGE


for machine in (PoolMachine, BestFitMachine, SlotsMachine):
    machine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
TestBestFitPool = BestFitMachine.TestCase
TestSlotsPool = SlotsMachine.TestCase


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


@pytest.mark.parametrize("allocator", ["auto", "best_fit"])
def test_what_fits_when_everything_merges_is_served(allocator: str) -> None:
    pool = PinnedPool(12 * PAGE, allocator=allocator)
    small = [pool.allocate(PAGE) for _ in range(12)]
    for buffer in small[::2] + small[1::2]:
        assert buffer is not None
        buffer.release()
    for nbytes in (5 * PAGE, 7 * PAGE):
        assert pool.allocate(nbytes) is not None
    assert pool.free_bytes == 0


def test_a_freed_block_goes_to_the_next_request_of_its_size() -> None:
    pool = PinnedPool(12 * PAGE)
    first, second = pool.allocate(3 * PAGE), pool.allocate(3 * PAGE)
    assert first is not None
    assert second is not None
    address = first.address
    first.release()
    again = pool.allocate(3 * PAGE - 1)
    assert again is not None
    assert again.address == address


def test_slots_are_of_one_size_and_what_is_larger_is_refused_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pool = PinnedPool(10 * PAGE, allocator="slots", slot=3 * PAGE)
    buffers = [pool.allocate(nbytes) for nbytes in (1, PAGE, 3 * PAGE)]
    assert None not in buffers
    assert pool.used_bytes == 9 * PAGE
    assert pool.allocate(1) is None
    assert pool.allocate(3 * PAGE + 1) is None
    assert pool.allocate(3 * PAGE + 1) is None
    assert [record.message for record in caplog.records] == [
        f"a buffer of {3 * PAGE + 1} bytes can never be had: the largest is {3 * PAGE}"
    ]


def test_slots_that_cannot_be_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"needs memory\.slot"):
        PinnedPool(4 * PAGE, allocator="slots")
    with pytest.raises(ConfigError, match=r"more than memory\.capacity"):
        PinnedPool(4 * PAGE, allocator="slots", slot=5 * PAGE)


def test_a_batch_is_shared_up_to_the_first_that_was_released() -> None:
    pool = PinnedPool(4 * PAGE)
    buffers = [buffer for _ in range(4) if (buffer := pool.allocate(PAGE))]
    buffers[2].release()
    shared = pool.share_leading(buffers)
    assert [handle.address for handle in shared] == [buffer.address for buffer in buffers[:2]]
    with pytest.raises(BufferStateError):
        pool.release_all([*shared, buffers[2]])
    assert not buffers[0].shared, "those before the one that was refused are released"


def test_waiting_for_a_release_ends_with_the_release_or_the_timeout() -> None:
    pool = PinnedPool(PAGE)
    buffer = pool.allocate(1)
    assert buffer is not None
    seen = pool.releases
    assert not pool.wait_released(seen, 0.01)
    threading.Timer(0.01, buffer.release).start()
    assert pool.wait_released(seen, 20)
    assert pool.wait_released(seen, 0), "a release between the look and the wait is not missed"


def test_memory_of_a_closed_pool_stays_until_the_last_handle_goes() -> None:
    pool = PinnedPool(4 * PAGE)
    buffer = pool.allocate(10)
    assert buffer is not None
    pool.close()
    buffer.view[:] = b"0123456789"
    assert not pool._map.closed
    buffer.release()
    assert pool._map.closed


def test_reserved_huge_pages_that_are_refused_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = mmap.mmap

    def refuse(fileno: int, length: int, *, flags: int) -> mmap.mmap:
        if flags & host_memory.MAP_HUGETLB:
            assert length % (2 << 20) == 0
            raise OSError(12, "Cannot allocate memory")
        return real(fileno, length, flags=flags)

    monkeypatch.setattr(mmap, "mmap", refuse)
    pool = PinnedPool(3 << 20, huge_pages="hugetlb")
    assert pool.capacity == 3 << 20
    assert "reserved huge pages of 2048 KiB were refused" in caplog.text
    pool.close()


def test_transparent_huge_pages_that_are_switched_off_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    switch = tmp_path / "enabled"
    monkeypatch.setattr(host_memory, "TRANSPARENT", switch)
    switch.write_text("always madvise [never]\n")
    PinnedPool(1 << 20, huge_pages=True).close()
    assert "transparent huge pages were refused" in caplog.text
    caplog.clear()
    switch.write_text("always [madvise] never\n")
    PinnedPool(1 << 20, huge_pages="transparent").close()
    PinnedPool(1 << 20, huge_pages=False).close()
    assert not caplog.text


def two_nodes(folder: Path) -> Path:
    (folder / "online").write_text("0-1\n")
    for node, processors in enumerate(("0-3,8", "4-7,9-11")):
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(processors + "\n")
    return folder


@pytest.mark.parametrize(
    ("text", "numbers"), [("0", [0]), ("0-2,5\n", [0, 1, 2, 5]), ("", []), ("\n", []), ("3,1-1", [3, 1])]
)
def test_the_kernels_lists_are_read(text: str, numbers: list[int]) -> None:
    assert host_memory.parse_list(text) == numbers


def test_the_node_is_that_of_all_processors_or_none(tmp_path: Path) -> None:
    nodes = two_nodes(tmp_path)
    assert host_memory.online_nodes(nodes) == [0, 1]
    assert host_memory.node_of_processors({0, 3, 8}, nodes) == 0
    assert host_memory.node_of_processors({9, 11}, nodes) == 1
    assert host_memory.node_of_processors({3, 4}, nodes) is None
    assert host_memory.online_nodes(tmp_path / "absent") == []


def test_memory_is_bound_before_it_is_touched_to_the_node_of_the_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []
    monkeypatch.setattr(host_memory, "online_nodes", lambda: [0, 1])
    monkeypatch.setattr(host_memory, "node_of_processors", lambda processors: 1)
    bind, touch = host_memory.bind_to_node, host_memory.touch

    def spy_bind(address: int, nbytes: int, node: int | None, *, cuda: bool) -> int | None:
        did.append("bind")
        return bind(address, nbytes, node, cuda=cuda)

    monkeypatch.setattr(host_memory, "bind_to_node", spy_bind)
    monkeypatch.setattr(host_memory, "touch", lambda *where: (did.append("touch"), touch(*where)))
    calls: list[tuple[int, ...]] = []

    class Library:
        def syscall(self, *arguments: object) -> int:
            calls.append(tuple(argument.value for argument in arguments))  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda *_, **__: Library())
    monkeypatch.setattr(host_memory.platform, "machine", lambda: "x86_64")
    pool = PinnedPool(4 * PAGE)
    assert pool.numa_node == 1
    assert did == ["bind", "touch"]
    number, address, nbytes, mode, _, most, flags = calls[0]
    assert (number, address, nbytes, mode, most, flags) == (237, pool.address, 4 * PAGE, 1, 65, 0)
    pool.close()


def test_one_node_is_left_as_it_is_and_a_refusal_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_memory, "online_nodes", lambda: [0])
    pools = [PinnedPool(PAGE), PinnedPool(PAGE, numa_node=host_memory.ANYWHERE)]
    assert [pool.numa_node for pool in pools] == [None, None]
    assert not caplog.text
    pools.append(PinnedPool(PAGE, numa_node=1000))
    assert pools[-1].numa_node is None
    assert "memory on NUMA node 1000 was refused" in caplog.text
    for pool in pools:
        pool.close()


def test_node_0_can_be_asked_for_here(caplog: pytest.LogCaptureFixture) -> None:
    pool = PinnedPool(4 * PAGE, numa_node=0)
    if "Function not implemented" in caplog.text:
        pytest.skip("this kernel has no mbind")
    assert pool.numa_node == 0
    place = next(line for line in Path("/proc/self/numa_maps").read_text().splitlines() if f"{pool.address:x}" in line)
    assert "prefer" in place
    pool.close()
