"""Copies between pages and host memory: bit-exact both ways, nothing else touched, and in order on any streams."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from paged_layouts import RED_ZONE, Chunk, Layout, Shape, expected, paged, random_bytes

from lmcache.errors import KernelArgumentError
from lmcache.kernels import PagedLayers
from lmcache.kernels.copy import calibration, host, kernel, pages
from lmcache.kernels.copy.calibration import SIZES, calibrate, crossover
from lmcache.kernels.copy.host import HostTransfer, copy_from_host_torch, copy_to_host_torch

BF16 = torch.bfloat16
DIRECT, STAGED = 1 << 40, -1
WAYS = pytest.mark.parametrize("direct_bytes", [DIRECT, STAGED], ids=["direct", "staged"])
BOTH = pytest.mark.parametrize("to_host", [True, False], ids=["to_host", "from_host"])
UNITS = pytest.mark.parametrize("whole_pages", [False, True], ids=["tokens", "pages"])


def pinned(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    return buffer.pin_memory() if device.type == "cuda" else buffer


def finish(transfer: HostTransfer) -> None:
    transfer.join()
    if transfer.device.type == "cuda":
        torch.cuda.current_stream(transfer.device).synchronize()


def check(
    layout: Layout,
    ids: list[int],
    device: torch.device,
    *,
    to_host: bool,
    whole_pages: bool = False,
    first_layer: int = 0,
    layers: int | None = None,
    pad: int = 0,
    start: int = RED_ZONE,
    pin: bool = True,
    chunk_dtype: torch.dtype = torch.uint8,
    definition: bool = False,
    **options: int,
) -> None:
    buffer = random_bytes(layout.nbytes).to(device)
    plane = paged(layout, buffer)
    count = layout.shape.L - first_layer if layers is None else layers
    row = plane.page_bytes if whole_pages else plane.token_bytes
    chunk = Chunk.make(count, len(ids), row, poison=to_host, pad=pad, start=start)
    if pin:
        chunk.buffer = pinned(chunk.buffer, device)
    what = ("gather" if to_host else "scatter") + ("_pages" if whole_pages else "_tokens")
    want_cache, want_chunk = expected(layout, buffer, chunk, ids, what, first_layer)
    if to_host:
        chunk.rows(want_chunk)[:, [i < 0 for i in ids]] = 0
    ids_n = torch.tensor(ids, dtype=torch.int64, device=device)
    view = chunk.view.view(chunk_dtype)
    if definition:
        (copy_to_host_torch if to_host else copy_from_host_torch)(plane, ids_n, view, first_layer, whole_pages)
    else:
        transfer = HostTransfer(device, **options)
        copy = transfer.copy_to_host if to_host else transfer.copy_from_host
        copy(plane, ids_n, view, first_layer, whole_pages=whole_pages)
        finish(transfer)
    np.testing.assert_array_equal(chunk.buffer.numpy(), want_chunk)
    np.testing.assert_array_equal(buffer.cpu().numpy(), want_cache)


def some_ids(n: int, limit: int) -> list[int]:
    """n different ids below limit, a tenth of them skipped."""
    rng = random.Random(n)
    return [i if rng.random() < 0.9 else -rng.randint(1, 9) for i in rng.sample(range(limit), n)]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC"])
@WAYS
@BOTH
@UNITS
def test_every_order_and_dtype(
    whole_pages: bool, to_host: bool, direct_bytes: int, order: str, dtype: torch.dtype, device: torch.device
) -> None:
    ids = some_ids(9, 24) if whole_pages else some_ids(31, 96)
    options = {"direct_bytes": direct_bytes, "staging_bytes": 1 << 16}
    layout = Layout(order, Shape(), dtype)
    check(layout, ids, device, to_host=to_host, whole_pages=whole_pages, chunk_dtype=dtype, **options)


@pytest.mark.parametrize("count", [0, 1, 63, 100])
@WAYS
@BOTH
def test_any_number_of_tokens(to_host: bool, direct_bytes: int, count: int, device: torch.device) -> None:
    layout = Layout("LBHNC", Shape(B=count // 4 + 7), BF16)
    ids = some_ids(count, layout.shape.B * 4)
    check(layout, ids, device, to_host=to_host, direct_bytes=direct_bytes, staging_bytes=1 << 16)


@pytest.mark.parametrize("staging_bytes", [512, 1024, 3 * 1024, 10_000, 1 << 16])
@pytest.mark.parametrize("pad", [0, 3])
@BOTH
@UNITS
def test_copies_larger_than_staging_go_in_pieces(
    whole_pages: bool, to_host: bool, pad: int, staging_bytes: int, device: torch.device
) -> None:
    # 64 bytes a token, 256 a page: parts of a layer, one layer, several layers, everything at once.
    layout = Layout("LBHNC", Shape(L=4), BF16)
    ids = some_ids(10, 24) if whole_pages else some_ids(29, 96)
    options = {"staging_bytes": staging_bytes, "direct_bytes": STAGED}
    check(layout, ids, device, to_host=to_host, whole_pages=whole_pages, pad=pad, **options)


@pytest.mark.parametrize("programs", [1, 3, 1000])
@BOTH
def test_few_programs_do_all_the_work(to_host: bool, programs: int, device: torch.device) -> None:
    layout = Layout("LBHNC", Shape(L=3, B=8, H=4, N=16, C=160), BF16)
    check(layout, some_ids(70, 128), device, to_host=to_host, direct_bytes=DIRECT, programs=programs)


@pytest.mark.parametrize(
    ("shape", "dtype", "start"),
    [
        (Shape(H=3, N=5, C=7, B=12), torch.uint8, RED_ZONE + 1),
        (Shape(H=1, N=16, C=576, B=6), BF16, RED_ZONE),
        (Shape(H=3, C=80), torch.float32, RED_ZONE + 8),
        (Shape(content_gap=1), BF16, RED_ZONE + 2),
        (Shape(H=1, N=1, C=1300, B=30), BF16, RED_ZONE),
    ],
)
@WAYS
@BOTH
def test_ragged_sizes_and_odd_addresses(
    to_host: bool, direct_bytes: int, shape: Shape, dtype: torch.dtype, start: int, device: torch.device
) -> None:
    layout = Layout("LBHNC", shape, dtype)
    ids = some_ids(17, shape.B * shape.N)
    check(layout, ids, device, to_host=to_host, start=start, direct_bytes=direct_bytes, staging_bytes=1 << 17)


@pytest.mark.parametrize(("first_layer", "layers"), [(0, 1), (1, 2), (3, 1), (2, 0)])
@pytest.mark.parametrize("pad", [0, 1])
@WAYS
@BOTH
def test_a_range_of_layers(
    to_host: bool, direct_bytes: int, pad: int, first_layer: int, layers: int, device: torch.device
) -> None:
    layout = Layout("LBNHC", Shape(L=4), BF16)
    where = {"first_layer": first_layer, "layers": layers, "pad": pad}
    check(layout, some_ids(12, 96), device, to_host=to_host, direct_bytes=direct_bytes, staging_bytes=2048, **where)


@BOTH
@UNITS
def test_the_definitions_are_what_is_meant(to_host: bool, whole_pages: bool, device: torch.device) -> None:
    for pad in (0, 2):
        ids = [3, -1, 0, 20, 7]
        layout = Layout("LBHNC", Shape(), BF16)
        check(layout, ids, device, to_host=to_host, whole_pages=whole_pages, pad=pad, definition=True)


@BOTH
def test_memory_that_is_not_pinned_is_staged(to_host: bool, device: torch.device) -> None:
    check(Layout("LBHNC", Shape(), BF16), [5, 1, -1], device, to_host=to_host, pin=False, direct_bytes=DIRECT)


def test_one_transfer_serves_many_copies_without_mixing_them(device: torch.device) -> None:
    layout = Layout("LBHNC", Shape(B=40), BF16)
    buffer = random_bytes(layout.nbytes).to(device)
    plane, target = paged(layout, buffer), paged(layout, torch.zeros_like(buffer))
    transfer = HostTransfer(device, staging_bytes=2048, direct_bytes=512)
    for _ in range(3):
        chunks = []
        for block in range(0, 40, 4):
            tokens = (1 + block % 16) if block % 8 else 3
            ids = torch.arange(block * 4, block * 4 + tokens, device=device)
            chunk = pinned(torch.full((2, tokens, plane.token_bytes), 0xFF, dtype=torch.uint8), device)
            transfer.copy_to_host(plane, ids, chunk)
            transfer.copy_from_host(target, ids, chunk)  # before anything was waited for
            chunks.append((ids, chunk))
        finish(transfer)
        for ids, chunk in chunks:
            for side in (plane, target):
                want = torch.zeros(chunk.shape, dtype=torch.uint8, device=device)
                pages.gather_tokens(side, ids, want)
                assert torch.equal(chunk, want.cpu())
        buffer.copy_(random_bytes(layout.nbytes, seed=5).to(device))


class FakeStreams:
    """A device whose streams run later, in any order that their events allow."""

    def __init__(self) -> None:
        self.queues: dict[int, list[tuple[str, Any]]] = {}
        self.names = itertools.count()
        self.events = itertools.count()
        self.on = self.Stream()

    def Stream(self) -> _Stream:
        return _Stream(self, next(self.names))

    def Event(self) -> _Event:
        return _Event(self)

    def current_stream(self, _device: torch.device) -> _Stream:
        return self.on

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.on = self.on, stream
        yield
        self.on = before

    def queue(self, stream: _Stream, kind: str, what: Any) -> None:
        self.queues.setdefault(stream.name, []).append((kind, what))

    def run(self, rng: random.Random) -> None:
        done: set[int] = set()
        while any(self.queues.values()):
            heads = [
                queue for queue in self.queues.values() if queue and (queue[0][0] != "wait" or queue[0][1] in done)
            ]
            kind, what = rng.choice(heads).pop(0)
            if kind == "record":
                done.add(what)
            elif kind == "call":
                what()


class _Stream:
    def __init__(self, streams: FakeStreams, name: int) -> None:
        self.streams, self.name = streams, name

    def wait_stream(self, other: _Stream) -> None:
        event = self.streams.Event()
        event.record(other)
        event.wait(self)


class _Event:
    def __init__(self, streams: FakeStreams) -> None:
        self.streams, self.number = streams, -1

    def record(self, stream: _Stream) -> None:
        self.number = next(self.streams.events)
        self.streams.queue(stream, "record", self.number)

    def wait(self, stream: _Stream) -> None:
        if self.number >= 0:
            self.streams.queue(stream, "wait", self.number)


def on_fake_streams(monkeypatch: pytest.MonkeyPatch, streams: FakeStreams, **options: int) -> HostTransfer:
    """A transfer whose copies are what a GPU's are, but run when `streams` do."""
    monkeypatch.setattr(host, "runs_kernel", lambda _device: True)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: streams)

    def move(pages_: Any, units: Any, ids: Any, rows: Any, first: int, *, scatter: bool, **_: Any) -> None:
        def call() -> None:
            if not scatter:
                rows[:, ids < 0] = 0
            (pages.scatter_tokens_torch if scatter else pages.gather_tokens_torch)(pages_, ids, rows, first)

        streams.queue(streams.on, "call", call)

    def dma(to: torch.Tensor, source: torch.Tensor) -> None:
        streams.queue(streams.on, "call", lambda: to.copy_(source))

    transfer = HostTransfer(torch.device("cpu"), **options)
    monkeypatch.setattr(host, "launch_copy", move)
    monkeypatch.setattr(transfer, "_dma", dma)
    return transfer


def traffic(transfer: HostTransfer, streams: FakeStreams) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queue chunks of many sizes out of one cache, into another and out again, directly or staged, while the pages
    change; (found, wanted)."""
    layout = Layout("LBHNC", Shape(B=32), BF16)
    source, target = paged(layout, random_bytes(layout.nbytes)), paged(layout, torch.zeros(layout.nbytes).byte())
    found, wanted = [], []
    rng, ways = random.Random(3), random.Random(4)
    for round_ in range(3):
        for tokens in (1, 4, 9, 30, 50):
            transfer.direct_bytes = {way: ways.choice([DIRECT, STAGED]) for way in transfer.direct_bytes}
            ids = torch.tensor(rng.sample(range(128), tokens))
            chunk = torch.full((2, tokens, source.token_bytes), 0xFF, dtype=torch.uint8)
            transfer.copy_to_host(source, ids, chunk)
            if ways.random() < 0.3:
                transfer.join()
            transfer.copy_from_host(target, ids, chunk)
            back = torch.full_like(chunk, 0xFF)
            transfer.copy_to_host(target, ids, back)
            # The model's next step writes to the pages that have just been read.
            fill = random_bytes(chunk.numel(), seed=round_ * 100 + tokens).view(chunk.shape)
            streams.queue(streams.on, "call", lambda i=ids, f=fill: pages.scatter_tokens_torch(source, i, f))
            found += [chunk, back]
    transfer.join()
    # The same, one after the other.
    state = paged(layout, random_bytes(layout.nbytes))
    rng = random.Random(3)
    for round_ in range(3):
        for tokens in (1, 4, 9, 30, 50):
            ids = torch.tensor(rng.sample(range(128), tokens))
            want = torch.zeros(2, tokens, source.token_bytes, dtype=torch.uint8)
            pages.gather_tokens_torch(state, ids, want)
            fill = random_bytes(want.numel(), seed=round_ * 100 + tokens).view(want.shape)
            pages.scatter_tokens_torch(state, ids, fill)
            wanted += [want, want]
    return found, wanted


@pytest.mark.host
@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_the_streams_mixes_the_bytes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = FakeStreams()
    transfer = on_fake_streams(monkeypatch, streams, staging_bytes=4096)
    found, wanted = traffic(transfer, streams)
    streams.run(random.Random(seed))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.host
@pytest.mark.parametrize(
    "forget",
    [
        "free before gather",
        "free before DMA",
        "filled before DMA",
        "filled before scatter",
        "link before direct",
        "direct before link",
    ],
)
def test_a_forgotten_wait_is_seen(forget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = 0
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patch:
            streams = FakeStreams()
            transfer = on_fake_streams(patch, streams, staging_bytes=4096)
            break_waits(transfer, streams, forget)
            found, wanted = traffic(transfer, streams)
            streams.run(random.Random(seed))
            failures += not all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
    assert failures > 0


def break_waits(transfer: HostTransfer, streams: FakeStreams, forget: str) -> None:
    link = transfer._link

    def nothing_for(event: _Event, waits: Callable[[_Stream], bool]) -> None:
        wait = event.wait
        event.wait = lambda stream: None if waits(stream) else wait(stream)  # type: ignore[method-assign]

    for buffer in transfer._buffers:
        if forget.startswith("free"):
            nothing_for(buffer.free, lambda stream: (stream is link) == (forget == "free before DMA"))
        elif forget.startswith("filled"):
            nothing_for(buffer.filled, lambda stream: (stream is link) == (forget == "filled before DMA"))
    await_writes, copy_directly = transfer._await_writes, transfer._copy_directly
    if forget == "link before direct":

        def unordered(*args: Any, **options: Any) -> None:
            transfer._await_writes = lambda _stream: None  # type: ignore[method-assign]
            copy_directly(*args, **options)
            transfer._await_writes = await_writes  # type: ignore[method-assign]

        transfer._copy_directly = unordered  # type: ignore[method-assign]
    if forget == "direct before link":
        transfer._await_writes = lambda stream: None if stream is link else await_writes(stream)  # type: ignore


def two_streams_at_work(
    transfer: HostTransfer, streams: FakeStreams, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each copies pages of its own to host memory and on from there, then joins and looks; (found, wanted)."""
    layout, rng = Layout("LBHNC", Shape(B=32), BF16), random.Random(seed)
    callers = [streams.on, streams.Stream()]
    source, target = paged(layout, random_bytes(layout.nbytes)), paged(layout, torch.zeros(layout.nbytes).byte())
    found, wanted, chunks = [], [], []
    for i in range(24):
        streams.on = rng.choice(callers)
        ids = torch.arange(5 * i, 5 * i + 5)
        chunk, back = torch.full((2, 2, 5, source.token_bytes), 0xFF, dtype=torch.uint8)
        transfer.direct_bytes = {way: rng.choice([DIRECT, STAGED]) for way in transfer.direct_bytes}
        transfer.copy_to_host(source, ids, chunk)
        if rng.random() < 0.5:
            streams.on = streams.on if rng.random() < 0.5 else rng.choice(callers)
            transfer.join()  # whoever joins here sees the copy of the other, too
        else:
            transfer.copy_from_host(target, ids, chunk)
            transfer.copy_to_host(target, ids, back)
            chunk = back
            transfer.join()
        chunks.append(chunk)
        seen = torch.zeros_like(chunk)
        streams.queue(streams.on, "call", lambda seen=seen, chunk=chunk: seen.copy_(chunk))
        want = torch.zeros_like(chunk)
        pages.gather_tokens_torch(source, ids, want)
        found.append(seen)
        wanted.append(want)
    return found, wanted


@pytest.mark.host
@pytest.mark.parametrize("seed", range(12))
def test_several_streams_do_not_take_each_others_waits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = FakeStreams()
    transfer = on_fake_streams(monkeypatch, streams, staging_bytes=4096)
    found, wanted = two_streams_at_work(transfer, streams, seed)
    streams.run(random.Random(seed))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.host
@pytest.mark.parametrize("seed", range(6))
@BOTH
def test_staging_waits_for_whoever_had_its_memory_before(
    to_host: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, layout = FakeStreams(), Layout("LBHNC", Shape(), BF16)
    made: list[HostTransfer] = []
    # A kernel that was queued before, and still writes to memory that has been freed since.
    streams.queue(streams.on, "call", lambda: [buffer.bytes.fill_(7) for buffer in made[0]._buffers])
    made.append(transfer := on_fake_streams(monkeypatch, streams, staging_bytes=4096, direct_bytes=STAGED))
    streams.on = streams.Stream()
    plane = paged(layout, random_bytes(layout.nbytes))
    chunk, ids = random_bytes(2 * 5 * plane.token_bytes, seed=1).view(2, 5, -1), torch.arange(5)
    (transfer.copy_to_host if to_host else transfer.copy_from_host)(plane, ids, chunk)
    streams.run(random.Random(seed))
    want = torch.zeros_like(chunk)
    pages.gather_tokens_torch(plane, ids, want)
    assert torch.equal(chunk, want)


def test_the_alignment_promised_to_the_compiler_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    recorder = type("Kernel", (), {"launch": lambda _self, *args, **options: calls.append((args, options))})()
    monkeypatch.setattr(kernel, "copy_rows", recorder)
    monkeypatch.setattr(host, "runs_kernel", lambda _device: True)
    for start, pad, dtype in ((RED_ZONE, 0, BF16), (RED_ZONE + 8, 1, BF16), (RED_ZONE + 2, 0, torch.float32)):
        for direct_bytes in (DIRECT, STAGED):
            plane = paged(layout := Layout("LBHNC", Shape(C=12), dtype), random_bytes(layout.nbytes))
            chunk = Chunk.make(2, 5, plane.token_bytes, poison=True, pad=pad, start=start)
            transfer = HostTransfer(torch.device("cpu"), direct_bytes=direct_bytes, staging_bytes=1 << 14)
            transfer.copy_to_host(plane, torch.arange(5), chunk.view)
            (_grid, _device, _pointers, _ids, address, _first, _rows, _tiles, _row_tiles, *strides), options = (
                calls.pop()
            )
            word, align = options["WORD"], options["ALIGN"]
            assert align % word == 0
            if direct_bytes == DIRECT:
                assert address == chunk.view.data_ptr()
            for layer, row, strip in itertools.product(range(2), range(5), range(options["STRIPS"])):
                there = address + word * (layer * strides[0] + (row * options["STRIPS"] + strip) * options["STRIP"])
                assert there % align == 0


def plain(device: torch.device) -> PagedLayers:
    layout = Layout("LBHNC", Shape(), BF16)
    return paged(layout, random_bytes(layout.nbytes).to(device))


@pytest.mark.parametrize(
    ("ids", "chunk", "first_layer", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), torch.zeros(2, 3, 64, dtype=torch.uint8), 0, "int64"),
        (torch.arange(6)[::2], torch.zeros(2, 3, 64, dtype=torch.uint8), 0, "strides"),
        (torch.arange(3), torch.zeros(2, 3, 64, dtype=torch.uint8, device="meta"), 0, "must be on cpu"),
        (torch.arange(3), torch.zeros(2, 2, 64, dtype=torch.uint8), 0, "3 ids"),
        (torch.arange(3), torch.zeros(2, 3, 63, dtype=torch.uint8), 0, "63 bytes a row; 64 are moved"),
        (torch.arange(3), torch.zeros(2, 3, 64, dtype=torch.uint8), 1, "there are 2"),
        (torch.arange(3), torch.zeros(2, 6, 64, dtype=torch.uint8)[:, ::2], 0, "strides"),
    ],
)
@BOTH
def test_wrong_arguments_are_refused(
    to_host: bool, ids: torch.Tensor, chunk: torch.Tensor, first_layer: int, message: str, device: torch.device
) -> None:
    transfer = HostTransfer(device, staging_bytes=1024)
    with pytest.raises(KernelArgumentError, match=message):
        (transfer.copy_to_host if to_host else transfer.copy_from_host)(
            plain(device), ids.to(device), chunk, first_layer
        )


def test_pages_of_another_device_are_refused(device: torch.device) -> None:
    transfer = HostTransfer(device, staging_bytes=1024)
    with pytest.raises(KernelArgumentError, match="pages are on meta"):
        transfer.copy_to_host(
            PagedLayers([torch.zeros(3, 2, 4, 8, device="meta")]), torch.arange(1), torch.zeros(1, 1, 64).byte()
        )


@pytest.mark.interpret
def test_a_row_that_staging_cannot_hold_is_refused() -> None:
    transfer = HostTransfer(torch.device("cpu"), staging_bytes=256)
    with pytest.raises(KernelArgumentError, match="a row has 64 bytes; half of staging_bytes holds 0: raise it"):
        transfer.copy_to_host(plain(torch.device("cpu")), torch.arange(1), torch.zeros(2, 1, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("times", "want"),
    [
        ([], 0),
        ([(1, 5.0, 4.0), (2, 1.0, 9.0)], 0),
        ([(1, 4.0, 4.0), (2, 5.0, 6.0), (4, 9.0, 8.0), (8, 1.0, 9.0)], 2),
        ([(1, 1.0, 2.0), (2, 1.0, 2.0)], 2),
    ],
)
def test_direct_copies_end_where_staged_ones_are_first_faster(times: list[tuple[int, float, float]], want: int) -> None:
    assert crossover(times) == want


def test_a_cpu_needs_no_calibration() -> None:
    transfer = HostTransfer(torch.device("cpu"))
    before = dict(transfer.direct_bytes)
    calibrate(transfer)
    assert transfer.direct_bytes == before


def test_calibration_measures_on_the_device_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["cuda:0"]

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], str(device)
        yield
        current[0] = before

    measured_on: list[str] = []

    def compare(_transfer: HostTransfer) -> dict[str, list[tuple[int, float, float]]]:
        measured_on.append(current[0])
        return {"to_host": [(1, 2.0, 3.0)], "from_host": []}

    transfer = HostTransfer(torch.device("cpu"))
    transfer.device = torch.device("cuda:1")
    monkeypatch.setattr(calibration, "on_device", on)
    monkeypatch.setattr(calibration, "compare", compare)
    monkeypatch.setattr(torch.version, "hip", None)
    calibrate(transfer)
    assert measured_on == ["cuda:1"]
    assert transfer.direct_bytes == {"to_host": 1, "from_host": 0}


@pytest.mark.gpu
def test_calibration_measures_both_ways(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    transfer = HostTransfer(device)
    with caplog.at_level("INFO"):
        calibrate(transfer)
    assert len(caplog.records) == 1
    assert set(transfer.direct_bytes) == {"to_host", "from_host"}
    assert all(size in (0, *SIZES) for size in transfer.direct_bytes.values())


@pytest.mark.gpu
@WAYS
@BOTH
def test_offsets_beyond_two_to_the_31_elements(to_host: bool, direct_bytes: int) -> None:
    shape = Shape(L=1, B=(2**31 + 2**20) // 4096, H=2, N=16, C=128)
    layout = Layout("LBHNC", shape, BF16)
    if torch.cuda.mem_get_info()[0] < layout.nbytes + 2**30:
        pytest.skip("not enough GPU memory")
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
    plane = paged(layout, buffer)
    transfer = HostTransfer(plane.device, direct_bytes=direct_bytes)
    ids = torch.tensor([0, plane.token_units.count - 1], device="cuda")
    chunk = random_bytes(2 * plane.token_bytes).view(1, 2, -1).pin_memory()
    last = plane.layers[0][-1, :, -1]
    if to_host:
        last.copy_(chunk[0, 1].view(BF16).view(last.shape))
        out = torch.full_like(chunk, 0xFF).pin_memory()
        transfer.copy_to_host(plane, ids, out)
        finish(transfer)
        assert torch.equal(out[0, 1], chunk[0, 1])
    else:
        transfer.copy_from_host(plane, ids, chunk)
        finish(transfer)
        for i, place in enumerate((plane.layers[0][0, :, 0], last)):
            assert torch.equal(place.contiguous().view(torch.uint8).flatten().cpu(), chunk[0, i])
            place.zero_()
        assert not buffer.any()


@pytest.mark.gpu
@WAYS
@BOTH
def test_copies_follow_the_current_stream_and_do_not_wait(to_host: bool, direct_bytes: int) -> None:
    layout = Layout("LBHNC", Shape(L=4, B=64, H=8, N=16, C=256), BF16)
    buffer = random_bytes(layout.nbytes).cuda()
    plane = paged(layout, buffer)
    transfer = HostTransfer(plane.device, direct_bytes=direct_bytes, staging_bytes=1 << 20)
    ids = torch.arange(1000, device="cuda")
    chunk = random_bytes(4 * 1000 * plane.token_bytes, seed=3).view(4, 1000, -1).pin_memory()
    want = torch.zeros(4, 1000, plane.token_bytes, dtype=torch.uint8, device="cuda")
    transfer.copy_from_host(plane, ids, chunk)  # compile
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the copies must come after this, and the queueing thread before its end
        for layer in plane.layers:
            layer.view(torch.int16).add_(1)
        if to_host:
            transfer.copy_to_host(plane, ids, chunk)
            transfer.join()
        else:
            transfer.copy_from_host(plane, ids, chunk)
        asleep = not stream.query()
        pages.gather_tokens(plane, ids, want)
        stream.synchronize()
    assert asleep, "a copy waited for the device"
    assert torch.equal(chunk, want.cpu())


@pytest.mark.interpret
@WAYS
def test_interpret_mode_really_runs_the_kernel(direct_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "copy_to_host_torch", None)
    layout, device = Layout("LBHNC", Shape(), BF16), torch.device("cpu")
    check(layout, [3, 1], device, to_host=True, direct_bytes=direct_bytes, staging_bytes=2048)


@pytest.mark.interpret
@pytest.mark.parametrize("to_host", [True, False])
def test_direct_copies_stay_inside_and_do_not_race(to_host: bool) -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    for order, shape in (("LBHNC", Shape()), ("BLNHC", Shape(H=3, N=5, C=7, B=12)), ("LBNHC", Shape(content_gap=16))):
        layout = Layout(order, shape, BF16)
        plane = paged(layout, random_bytes(layout.nbytes))
        ids = torch.tensor([shape.B * shape.N - 1, -1, *range(0, 30, 3)])
        chunk = Chunk.make(2, len(ids), plane.token_bytes, poison=to_host, pad=1)
        transfer = HostTransfer(plane.device, direct_bytes=DIRECT, programs=3, staging_bytes=1024)
        with sanitized(chunk.view, *plane.layers) as watched:
            (transfer.copy_to_host if to_host else transfer.copy_from_host)(plane, ids, chunk.view)
        assert watched.stores.bytes == 2 * (len(ids) - (0 if to_host else 1)) * plane.token_bytes
