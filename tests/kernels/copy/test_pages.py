"""Paged gather and scatter are bit-exact, whatever the layout, and touch nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paged_layouts
import pytest
import torch
from paged_layouts import DENSE_ORDERS, ORDERS, RED_ZONE, Chunk, Layout, Shape, expected, paged, random_bytes

from lmcache.errors import KernelArgumentError
from lmcache.kernels import PagedLayers
from lmcache.kernels.copy import kernel, pages

ROOT = Path(__file__).resolve().parents[3]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn)
COUNTS = (0, 1, 63, 256, 1000)
TOKENS, PAGES = ("gather_tokens", "scatter_tokens"), ("gather_pages", "scatter_pages")
MLA = Shape(H=1, N=16, C=576, B=6)


def some_ids(n: int, limit: int, pattern: str) -> list[int]:
    """n different ids below limit, skipped ones among them."""
    rng = random.Random(n)
    if pattern == "random":
        return [i if rng.random() < 0.9 else -rng.randint(1, 9) for i in rng.sample(range(limit), n)]
    if pattern == "all":
        return rng.sample(range(limit), n)
    if pattern == "runs":
        start = rng.randrange(limit - n + 1)
        return [*[-1] * (n // 4), *range(start + n // 4, start + n)]
    assert pattern == "reversed"
    return list(range(n))[::-1]


def check(
    what: str,
    layout: Layout,
    ids: list[int],
    device: torch.device,
    *,
    first_layer: int = 0,
    layers: int | None = None,
    pad: int = 0,
    chunk_start: int = RED_ZONE,
    chunk_dtype: torch.dtype = torch.uint8,
    torch_definition: bool = False,
) -> None:
    buffer = random_bytes(layout.nbytes).to(device)
    plane = paged(layout, buffer)
    row = plane.page_bytes if what.endswith("pages") else plane.token_bytes
    count = layout.shape.L - first_layer if layers is None else layers
    poison = what.startswith("gather")
    chunk = Chunk.make(count, len(ids), row, poison=poison, pad=pad, start=chunk_start, device=str(device))
    want_cache, want_chunk = expected(layout, buffer, chunk, ids, what, first_layer)
    op = getattr(pages, what + "_torch" if torch_definition else what)
    op(plane, torch.tensor(ids, dtype=torch.int64, device=device), chunk.view.view(chunk_dtype), first_layer)
    np.testing.assert_array_equal(chunk.buffer.cpu().numpy(), want_chunk)
    np.testing.assert_array_equal(buffer.cpu().numpy(), want_cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", TOKENS)
def test_tokens_in_every_order_and_dtype(what: str, order: str, dtype: torch.dtype, device: torch.device) -> None:
    check(what, Layout(order, Shape(), dtype), some_ids(63, 96, "random"), device, chunk_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", DENSE_ORDERS)
@pytest.mark.parametrize("what", PAGES)
def test_pages_in_every_dense_order_and_dtype(what: str, order: str, dtype: torch.dtype, device: torch.device) -> None:
    check(what, Layout(order, Shape(), dtype), some_ids(9, 24, "random"), device, chunk_dtype=dtype)


@pytest.mark.parametrize("pattern", ["random", "all", "runs", "reversed"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("what", TOKENS)
def test_any_number_of_tokens(what: str, order: str, count: int, pattern: str, device: torch.device) -> None:
    shape = Shape(B=count // 4 + 7)
    check(what, Layout(order, shape, torch.bfloat16), some_ids(count, shape.B * shape.N, pattern), device)


@pytest.mark.parametrize("pattern", ["random", "all", "runs", "reversed"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("what", PAGES)
def test_any_number_of_pages(what: str, count: int, pattern: str, device: torch.device) -> None:
    shape = Shape(B=count + 7, N=2, C=4)
    check(what, Layout("LBHNC", shape, torch.bfloat16), some_ids(count, shape.B, pattern), device)


@pytest.mark.parametrize("content", [1, 7, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("what", TOKENS + PAGES)
def test_odd_content_sizes(what: str, dtype: torch.dtype, content: int, device: torch.device) -> None:
    shape = Shape(C=content, H=3, N=5, B=12)
    check(what, Layout("LBHNC", shape, dtype), some_ids(11, 12, "random"), device)


@pytest.mark.parametrize("order", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("what", TOKENS + PAGES)
def test_mla(what: str, order: str, device: torch.device) -> None:
    limit = MLA.B * MLA.N if what in TOKENS else MLA.B
    check(what, Layout(order, MLA, torch.bfloat16), some_ids(limit - 1, limit, "random"), device)


@pytest.mark.parametrize(
    "shape", [Shape(block_gap=24), Shape(block_gap=3), Shape(content_gap=16), Shape(content_gap=1)]
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", TOKENS)
def test_non_contiguous_tokens(what: str, order: str, shape: Shape, device: torch.device) -> None:
    check(what, Layout(order, shape, torch.bfloat16), some_ids(40, 96, "random"), device)


@pytest.mark.parametrize("gap", [24, 3])
@pytest.mark.parametrize("order", DENSE_ORDERS)
@pytest.mark.parametrize("what", PAGES)
def test_pages_with_gaps_between_blocks(what: str, order: str, gap: int, device: torch.device) -> None:
    for pattern in ("random", "all"):
        check(what, Layout(order, Shape(block_gap=gap), torch.bfloat16), some_ids(9, 24, pattern), device)


@pytest.mark.parametrize("what", TOKENS + PAGES)
@pytest.mark.parametrize(("first_layer", "layers"), [(0, 1), (1, 2), (3, 1), (2, 0)])
def test_a_range_of_layers(what: str, first_layer: int, layers: int, device: torch.device) -> None:
    layout = Layout("LBNHC", Shape(L=4), torch.bfloat16)
    check(what, layout, some_ids(9, 24, "random"), device, first_layer=first_layer, layers=layers)


@pytest.mark.parametrize("what", TOKENS + PAGES)
@pytest.mark.parametrize(("pad", "chunk_start"), [(3, RED_ZONE), (0, RED_ZONE + 8), (1, RED_ZONE + 1)])
def test_chunks_that_are_parts_of_larger_buffers(what: str, pad: int, chunk_start: int, device: torch.device) -> None:
    layout = Layout("LBNHC", Shape(), torch.bfloat16)
    check(what, layout, some_ids(12, 24, "random"), device, pad=pad, chunk_start=chunk_start)


@pytest.mark.parametrize("start", [RED_ZONE + 1, RED_ZONE + 2, RED_ZONE + 8])
@pytest.mark.parametrize("what", TOKENS + PAGES)
def test_caches_at_any_address(what: str, start: int, device: torch.device) -> None:
    check(what, Layout("LBHNC", Shape(), torch.uint8, start), some_ids(12, 24, "random"), device)


@pytest.mark.parametrize("pattern", ["random", "runs"])
@pytest.mark.parametrize("what", TOKENS + PAGES)
def test_large_copies(what: str, pattern: str, device: torch.device) -> None:
    layout = Layout("LBHNC", Shape(L=3, B=40, H=4, N=16, C=128), torch.bfloat16)
    limit = 640 if what in TOKENS else 40
    check(what, layout, some_ids(limit - 20, limit, pattern), device)


@pytest.mark.host
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", TOKENS + PAGES)
def test_torch_definitions(what: str, order: str, device: torch.device) -> None:
    if what in PAGES and order not in DENSE_ORDERS:
        pytest.skip("pages are not dense in this order")
    check(what, Layout(order, Shape(), torch.bfloat16), some_ids(20, 24, "random"), device, torch_definition=True)


@pytest.mark.parametrize("what", TOKENS + PAGES)
def test_layers_in_separate_storages(what: str, device: torch.device) -> None:
    layout = Layout("LBNHC", Shape(L=1), torch.bfloat16)
    buffers = [random_bytes(layout.nbytes, seed).to(device) for seed in range(3)]
    plane = PagedLayers([layout.views(buffer)[0] for buffer in buffers])
    ids = some_ids(12, 24, "random")
    row = plane.page_bytes if what in PAGES else plane.token_bytes
    chunk = Chunk.make(3, 12, row, poison=what.startswith("gather"), device=str(device))
    before = chunk.view.cpu().clone()
    wanted = []
    for layer, buffer in enumerate(buffers):
        one = Chunk.make(1, 12, row, poison=True)
        one.view.copy_(before[layer : layer + 1])
        wanted.append((*expected(layout, buffer, one, ids, what), one))
    getattr(pages, what)(plane, torch.tensor(ids, device=device), chunk.view)
    for layer, (buffer, (cache_after, chunk_after, one)) in enumerate(zip(buffers, wanted, strict=True)):
        np.testing.assert_array_equal(buffer.cpu().numpy(), cache_after)
        np.testing.assert_array_equal(chunk.view[layer].cpu().numpy(), one.rows(chunk_after)[0])


def test_layers_may_lie_in_any_order_in_memory(device: torch.device) -> None:
    layout = Layout("LBNHC", Shape(L=4), torch.bfloat16)
    buffer = random_bytes(layout.nbytes).to(device)
    views = layout.views(buffer)
    order = [2, 0, 3, 1]
    out = torch.full((4, 1, views[0][0].numel() * 2), 0xFF, dtype=torch.uint8, device=device)
    pages.gather_pages(PagedLayers([views[i] for i in order]), torch.tensor([5], device=device), out)
    for i, layer in enumerate(order):
        start = layout.page_start(layer, 5)
        assert torch.equal(out[i, 0], buffer[start : start + out.shape[2]])


def test_a_pool_buffer_is_filled_in_place() -> None:
    layout = Layout("LBHNC", Shape(), torch.bfloat16)
    plane = paged(layout, random_bytes(layout.nbytes))
    pool = bytearray(2 * 3 * plane.page_bytes)
    out = torch.frombuffer(pool, dtype=torch.uint8).view(2, 3, plane.page_bytes)
    pages.gather_pages(plane, torch.tensor([7, 0, 23]), out)
    assert bytes(pool) == out.numpy().tobytes()
    assert bytes(pool[: plane.page_bytes]) == plane.layers[0][7].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "layout",
    [
        Layout("LBHNC", Shape(), torch.bfloat16),
        Layout("LBNHC", Shape(), torch.bfloat16),
        Layout("BHLNC", Shape(content_gap=1), torch.bfloat16),
        Layout("LBHNC", Shape(C=80, block_gap=3), torch.float32),
        Layout("LBHNC", Shape(C=7), torch.uint8, RED_ZONE + 1),
        Layout("LBHNC", Shape(C=64), torch.uint8, RED_ZONE + 8),
    ],
    ids=lambda layout: f"{layout.order}-{layout.shape.C}-{layout.start}",
)
@pytest.mark.parametrize("pad", [0, 1])
def test_the_alignment_promised_to_the_compiler_is_true(
    layout: Layout, pad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter ignores tl.multiple_of, and a false promise is a misaligned access on a GPU.
    calls: list[tuple[tuple[object, ...], dict[str, int]]] = []
    recorder = type("Kernel", (), {"launch": lambda _self, *args, **options: calls.append((args, options))})()
    monkeypatch.setattr(kernel, "copy_rows", recorder)
    plane = paged(layout, random_bytes(layout.nbytes))
    chunk = Chunk.make(2, 5, plane.token_bytes, poison=True, pad=pad)
    ids = torch.tensor([0, 1, 5, 17, 30])
    kernel.launch_copy(plane, plane.token_units, ids, chunk.view, 0, scatter=False)
    ((_grid, _device, _ptrs, _ids, start, _first, _rows, _tiles, _row_tiles, *strides), options), *_ = calls
    align, word = options["ALIGN"], options["WORD"]
    assert align % word == 0
    assert start == chunk.view.data_ptr()
    for layer, view in enumerate(plane.layers):
        assert chunk.view[layer].data_ptr() == start + layer * strides[0] * word  # type: ignore
        for i, slot in enumerate(ids.tolist()):
            assert chunk.view[layer, i].data_ptr() % align == 0
            for strip in range(options["STRIPS"]):
                block, unit = divmod(slot, options["PER_BLOCK"]) if options["PER_BLOCK"] else (0, slot)
                address = view.data_ptr() + word * (block * strides[1] + unit * strides[2] + strip * strides[3])
                assert address % align == 0
                assert address == view[slot // 4, strip if options["STRIPS"] > 1 else 0, slot % 4].data_ptr()


def plain_plane(**changes: int) -> PagedLayers:
    layout = Layout("LBHNC", Shape(**changes), torch.bfloat16)
    return paged(layout, random_bytes(layout.nbytes))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda t: [], "empty"),
        (lambda t: [t[0]], "shape"),
        (lambda t: [t[:0]], "none of them 0"),
        (lambda t: [t[..., ::2]], "last must be 1"),
        (lambda t: [t, t[:1]], "shape"),
        (lambda t: [t, t.to(torch.float16)], "dtype"),
        (lambda t: [t, t.transpose(1, 2).contiguous().transpose(1, 2)], "strides"),
        (lambda t: [t, t.to("meta")], "device"),
    ],
)
def test_unequal_or_strange_layers_are_refused(
    layers: Callable[[torch.Tensor], list[torch.Tensor]], message: str
) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        PagedLayers(layers(torch.zeros(3, 2, 4, 8, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("ids", "out", "first_layer", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), torch.zeros(2, 3, 256, dtype=torch.uint8), 0, "int64"),
        (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, 3, 256, dtype=torch.uint8), 0, "int64"),
        (torch.arange(6)[::2], torch.zeros(2, 3, 256, dtype=torch.uint8), 0, "strides"),
        (torch.tensor([0, 24, 1]), torch.zeros(2, 3, 256, dtype=torch.uint8), 0, "holds 24; the cache has 24"),
        (torch.arange(3, device="meta"), torch.zeros(2, 3, 256, dtype=torch.uint8), 0, "must be on cpu"),
        (torch.arange(3), torch.zeros(2, 3, 256, dtype=torch.uint8, device="meta"), 0, "must be on cpu"),
        (torch.arange(3), torch.zeros(2, 2, 256, dtype=torch.uint8), 0, "3 ids"),
        (torch.arange(3), torch.zeros(2, 3, 255, dtype=torch.uint8), 0, "255 bytes a row; 256 are moved"),
        (torch.arange(3), torch.zeros(2, 3, 256, dtype=torch.bfloat16), 0, "512 bytes a row"),
        (torch.arange(3), torch.zeros(3, 3, 256, dtype=torch.uint8), 0, "there are 2"),
        (torch.arange(3), torch.zeros(2, 3, 256, dtype=torch.uint8), 1, "there are 2"),
        (torch.arange(3), torch.zeros(1, 3, 256, dtype=torch.uint8), -1, "first_layer=-1"),
        (torch.arange(3), torch.zeros(2, 3, 512, dtype=torch.uint8)[..., ::2], 0, "strides"),
        (torch.arange(3), torch.zeros(2, 6, 256, dtype=torch.uint8)[:, ::2], 0, "strides"),
    ],
)
@pytest.mark.parametrize("what", PAGES)
def test_wrong_arguments_are_refused(
    what: str, ids: torch.Tensor, out: torch.Tensor, first_layer: int, message: str
) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        getattr(pages, what)(plain_plane(), ids, out, first_layer)


@pytest.mark.parametrize("order", ["LHBNC", "BHLNC"])
def test_pages_that_are_not_dense_are_refused(order: str) -> None:
    layout = Layout(order, Shape(), torch.bfloat16)
    plane = paged(layout, random_bytes(layout.nbytes))
    assert not plane.pages_are_dense
    with pytest.raises(KernelArgumentError, match="use gather_tokens"):
        pages.gather_pages(plane, torch.arange(1), torch.zeros(2, 1, 256, dtype=torch.uint8))


def test_keys_and_values_in_one_storage_are_copied_in_two_groups() -> None:
    # A Python loop over 2 L views would cost the CPU's copies more than the bytes of a small chunk.
    cache = torch.zeros(3, 7, 2, 4, 32)
    plane = PagedLayers([side for layer in cache for side in layer.split(16, -1)])  # K0, V0, K1, V1, ..
    assert [(first, every) for first, every, _ in plane.planes(plane.token_units, 4)] == [(0, 2), (1, 2)]
    pair = PagedLayers([side for layer in torch.zeros(3, 2, 7, 4, 2, 16).transpose(3, 4) for side in layer])
    assert len(pair.planes(pair.token_units, 4)) == 1


def test_groups_that_share_memory_write_only_their_own_blocks(device: torch.device) -> None:
    # As vLLM's hybrid models: the layers of two groups are the same memory, and each block belongs to one group.
    L, B, H, N, D = 3, 7, 2, 4, 16
    memory = random_bytes(L * B * H * N * 2 * D * 2).view(torch.bfloat16).to(device)
    full, window = memory.view(L, B, H, N, 2 * D), memory.view(L, B, 2 * H, N, D)
    before = memory.clone().view(torch.int16).view(L, B, -1)
    for cache, blocks in ((full, [1, 4]), (window, [6, 2])):
        plane = PagedLayers([side for layer in cache for side in layer.chunk(2, -1)])
        slots = (torch.tensor(blocks)[:, None] * N + torch.arange(N)).flatten().to(device)
        chunk = torch.randn(plane.num_layers, len(slots), plane.heads * plane.content).to(torch.bfloat16).to(device)
        pages.scatter_tokens(plane, slots, chunk)
        after = memory.view(torch.int16).view(L, B, -1)
        others = [b for b in range(B) if b not in blocks]
        assert torch.equal(after[:, others], before[:, others])
        assert not (after[:, blocks] == before[:, blocks]).all(-1).any()
        back = torch.zeros_like(chunk)
        pages.gather_tokens(plane, slots, back)
        assert torch.equal(back.view(torch.int16), chunk.view(torch.int16))
        before = after.clone()


def test_plane_describes_its_layers() -> None:
    plane = plain_plane()
    assert (plane.num_layers, plane.num_blocks, plane.heads, plane.block_tokens, plane.content) == (2, 24, 2, 4, 16)
    assert (plane.token_bytes, plane.page_bytes, plane.pages_are_dense) == (64, 256, True)
    assert plane.pointers.tolist() == [view.data_ptr() for view in plane.layers]


def test_several_threads_may_copy_at_once(device: torch.device) -> None:
    layout = Layout("LBHNC", Shape(), torch.bfloat16)
    buffer = random_bytes(layout.nbytes).to(device)
    plane = paged(layout, buffer)

    def gather(block: int) -> bool:
        out = torch.full((2, 1, plane.page_bytes), 0xFF, dtype=torch.uint8, device=device)
        pages.gather_pages(plane, torch.tensor([block], device=device), out)
        start = layout.page_start(1, block)
        return torch.equal(out[1, 0], buffer[start : start + plane.page_bytes])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(gather, list(range(24)) * 2))


@pytest.mark.host
@pytest.mark.parametrize("before", ["", "sys.modules['triton'] = None; "])
def test_a_cpu_needs_no_triton(before: str) -> None:
    code = f"import sys; {before}import torch; from lmcache.kernels import PagedLayers, gather_pages; "
    code += "p = PagedLayers([torch.ones(2, 1, 4, 8)]); out = torch.zeros(1, 1, 32); "
    code += "gather_pages(p, torch.tensor([1]), out); assert out.eq(1).all(); assert not sys.modules.get('triton')"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.interpret
def test_interpret_mode_really_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_copy_host", None)
    check("gather_tokens", Layout("LBHNC", Shape(), torch.bfloat16), [3, 1], torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("what", TOKENS + PAGES)
def test_offsets_beyond_two_to_the_31_elements(what: str) -> None:
    shape = Shape(L=1, B=(2**31 + 2**20) // 4096, H=2, N=16, C=128)
    layout = Layout("LBHNC", shape, torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < layout.nbytes + 2**30:
        pytest.skip("not enough GPU memory")
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
    plane = paged(layout, buffer)
    units = plane.page_units if what in PAGES else plane.token_units
    ids = torch.tensor([0, units.count - 1], device="cuda")
    chunk = random_bytes(2 * units.unit_bytes).view(1, 2, -1).cuda()
    last = plane.layers[0][-1] if what in PAGES else plane.layers[0][-1, :, -1]
    if what.startswith("gather"):
        last.view(torch.uint8).copy_(chunk[0, 1].view(last.view(torch.uint8).shape))
        out = torch.full_like(chunk, 0xFF)
        getattr(pages, what)(plane, ids, out)
        assert torch.equal(out[0, 1], chunk[0, 1])
    else:
        getattr(pages, what)(plane, ids, chunk)
        first = plane.layers[0][0] if what in PAGES else plane.layers[0][0, :, 0]
        for i, place in enumerate((first, last)):
            assert torch.equal(place.contiguous().view(torch.uint8).flatten(), chunk[0, i])
            place.zero_()
        assert not buffer.any()  # a sum would need 8 bytes for each


def test_the_oracle_sees_a_wrong_byte(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = paged_layouts.expected

    def off_by_one(*args: object, **options: object) -> object:
        cache, chunk = real(*args, **options)  # type: ignore[arg-type]
        cache[RED_ZONE] ^= 1
        return cache, chunk

    monkeypatch.setitem(globals(), "expected", off_by_one)
    with pytest.raises(AssertionError):
        check("scatter_tokens", Layout("LBHNC", Shape(), torch.bfloat16), [1], device)
