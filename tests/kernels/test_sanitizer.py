"""The sanitizer (sanitizer.py) sees each kind of mistake, shown by kernels that make it, and accuses no good kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from lmcache.kernels.launch import lazy_jit

if TYPE_CHECKING:
    import triton.language as tl

pytestmark = pytest.mark.interpret
CPU = torch.device("cpu")
N = 16


@lazy_jit()
def _copy(source: tl.tensor, target: tl.tensor, ids: tl.tensor, limit, STEP: tl.constexpr, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * N + tl.arange(0, N)
    live = i < limit
    j = tl.load(ids + i, mask=live, other=0)
    tl.store(target + j * STEP, tl.load(source + i * STEP, mask=live), mask=live)


def copy(
    source: torch.Tensor, target: torch.Tensor, ids: list[int], *, step: int = 1, limit: int | None = None
) -> None:
    grid = (-(-len(ids) // N),)
    count = len(ids) if limit is None else limit
    _copy.launch(grid, CPU, source, target, torch.tensor(ids), count, STEP=step, N=N)


def test_a_good_kernel_passes_and_its_traffic_is_counted() -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    source, target = torch.arange(48, dtype=torch.float32), torch.zeros(48)
    with sanitized() as watched:
        copy(source, target, list(range(48)))
    assert torch.equal(source, target)
    assert watched.programs == 3
    # 48 ids of 8 bytes and 48 numbers of 4; torch aligns its storages to 64 bytes, so no sector is touched in part
    assert (watched.loads.bytes, watched.loads.sectors) == (48 * 12, 48 * 12 // 32)
    assert (watched.stores.bytes, watched.stores.sectors) == (48 * 4, 48 * 4 // 32)


def test_scattered_accesses_cost_a_sector_each() -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    source, target = torch.zeros(N * 8), torch.zeros(N * 8)
    with sanitized() as watched:
        copy(source, target, list(range(N)), step=8)
    assert (watched.stores.bytes, watched.stores.sectors) == (N * 4, N)


@pytest.mark.parametrize("wrong", [48, 10**6, -1])
def test_a_wrong_index_is_out_of_bounds(wrong: int) -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    ids = [*range(47), wrong]
    with (
        pytest.raises(Violation, match=r"out of bounds: store of 4 bytes by program \(2, 0, 0\): 1 of 16 lanes"),
        sanitized(),
    ):
        copy(torch.zeros(48), torch.zeros(48), ids)


def test_a_missing_mask_is_out_of_bounds() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    with (
        pytest.raises(Violation, match=r"out of bounds: load of 8 bytes by program \(1, 0, 0\): 15 of 16 lanes"),
        sanitized(),
    ):
        copy(torch.zeros(32), torch.zeros(32), list(range(17)), limit=32)


def test_the_gaps_of_a_strided_view_and_its_neighbours_are_out_of_bounds() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    storage = torch.zeros(5 * N)
    views = [storage[N : 3 * N : 2], storage[2 * N :]]
    with sanitized():
        copy(torch.zeros(N * 2), views[0], list(range(N)), step=2)
    for view in views:
        with pytest.raises(Violation, match="out of bounds"), sanitized():
            copy(torch.zeros(N), view, list(range(-1, N - 1)))


@lazy_jit()
def _store_through_a_table(table: tl.tensor, n, N: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    base = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, N)
    tl.store(base + i, i.to(tl.float32), mask=i < n)


def test_memory_behind_a_table_of_addresses_has_to_be_named() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    layers = [torch.zeros(8), torch.zeros(8)]
    table = torch.tensor([t.data_ptr() for t in layers])
    with sanitized(*layers):
        _store_through_a_table.launch((2,), CPU, table, 8, N=N)
    with pytest.raises(Violation, match="out of bounds"), sanitized(layers[0]):
        _store_through_a_table.launch((2,), CPU, table, 8, N=N)
    with pytest.raises(Violation, match="8 of 16 lanes"), sanitized(*layers):
        _store_through_a_table.launch((2,), CPU, table, N, N=N)


def test_two_programs_that_write_one_place_race() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    ids = [*range(47), 3]
    with pytest.raises(Violation, match=r"race: programs number 1 and 3 write .*, 1 places"), sanitized():
        copy(torch.zeros(48), torch.zeros(48), ids)


def test_a_program_that_reads_what_another_writes_races() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    data = torch.zeros(48)
    with sanitized():
        copy(data, data, list(range(48)))  # in place
    with pytest.raises(Violation, match="race: program number 1 reads"), sanitized():
        copy(data, data, list(range(47, -1, -1)))


def test_lanes_that_write_different_values_to_one_place_race() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    ids = [0, *range(15)]
    with sanitized():
        copy(torch.zeros(N), torch.zeros(N), ids)
    with pytest.raises(Violation, match=r"race: .*lanes write different values"), sanitized():
        copy(torch.arange(N).float(), torch.zeros(N), ids)


def test_launches_do_not_race_with_each_other() -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    with sanitized():
        for _ in range(2):
            copy(torch.zeros(48), torch.zeros(48), list(range(48)))


@lazy_jit()
def _count(counts: tl.tensor, N: tl.constexpr) -> None:
    tl.atomic_add(counts + tl.arange(0, N) // N, tl.full((N,), 1, tl.int32))


def test_atomic_operations_do_not_race_but_stay_in_bounds() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    counts = torch.zeros(2, dtype=torch.int32)
    with sanitized() as watched:
        _count.launch((3,), CPU, counts, N=N)
    assert counts.tolist() == [3 * N, 0]
    assert watched.stores.bytes == 3 * N * 4
    with pytest.raises(Violation, match="out of bounds: atomic"), sanitized():
        _count.launch((3,), CPU, counts[:0], N=N)


@lazy_jit(do_not_specialize=["stride"])
def _offset(out: tl.tensor, row, stride, WIDE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    first = row.to(tl.int64) if WIDE else row
    offset = first * stride
    tl.store(out + offset * 0, 1)


def test_an_offset_that_overflows_int32_is_seen() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    out = torch.zeros(1, dtype=torch.int32)
    with sanitized():
        _offset.launch((1,), CPU, out, 2**16, 2**16, WIDE=True)
    with pytest.raises(Violation, match="int32 overflow"), sanitized():
        _offset.launch((1,), CPU, out, 2**16, 2**16, WIDE=False)
    with sanitized(overflow=False):
        _offset.launch((1,), CPU, out, 2**16, 2**16, WIDE=False)


@lazy_jit()
def _promise(out: tl.tensor, STRIDE: tl.constexpr, MULTIPLE: tl.constexpr, N: tl.constexpr) -> None:
    rows = tl.multiple_of(out + tl.arange(0, N) * STRIDE, MULTIPLE)
    tl.store(rows, 0.0)


def test_a_false_promise_of_alignment_is_seen() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    out = torch.zeros(N * 8)
    with sanitized():
        _promise.launch((1,), CPU, out, STRIDE=4, MULTIPLE=16, N=N)
        _promise.launch((1,), CPU, out, STRIDE=1, MULTIPLE=16, N=N)  # it is about the first of a run
    for start, stride in ((0, 6), (1, 1)):
        with pytest.raises(Violation, match=r"broken promise: tl\.multiple_of says 16"), sanitized():
            _promise.launch((1,), CPU, out[start:], STRIDE=stride, MULTIPLE=16, N=N)


def test_a_misaligned_access_is_seen() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    raw = torch.zeros(N * 4 + 2, dtype=torch.uint8)
    table = torch.tensor([raw.data_ptr() + 2])
    with pytest.raises(Violation, match="misaligned"), sanitized(raw):
        _store_through_a_table.launch((1,), CPU, table, N, N=N)


@pytest.fixture
def _interpreter_is_as_before() -> Iterator[None]:
    from triton.runtime import interpreter

    def state() -> tuple[object, ...]:
        builder = interpreter.interpreter_builder
        return type(builder), builder.options, interpreter.GridExecutor.__call__, interpreter._patch_lang_core

    before = state()
    yield
    assert state() == before


@pytest.mark.usefixtures("_interpreter_is_as_before")
def test_nothing_is_watched_afterwards() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    target = torch.zeros(64)
    with pytest.raises(Violation), sanitized():
        copy(torch.zeros(48), target[:32], list(range(48)))
    copy(torch.ones(48), target[:32], list(range(48)))
    assert int(target.sum()) == 48
