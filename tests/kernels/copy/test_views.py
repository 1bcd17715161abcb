"""Keys and values are found in every layout, and moved by token and by page, bit for bit and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from paged_layouts import DENSE_ORDERS, ORDERS, RED_ZONE, Chunk, Layout, Shape, random_bytes

from lmcache.errors import KernelArgumentError, UnsupportedLayoutError
from lmcache.kernels import PagedLayers
from lmcache.kernels.copy import pages
from lmcache.kernels.copy.views import LAYOUTS, LayerKV, key_layers, kv_layers, kv_views, value_layers

L, B, H, N, D = 3, 7, 2, 4, 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MLA = ("B1NR", "BNR", "T1R")
# Dimensions of what is stored, outermost first; "2" is keys and values. A leading L is one tensor of all layers.
STORED = {
    "BHNC": "LBHN2D",
    "KVBNHD": "L2BNHD",
    "BKVNHD": "LB2NHD",
    "BKVNHD, HND strides": "LB2HND",
    "BKVHND": "LB2HND",
    "BKVHND, NHD strides": "LB2NHD",
    "BNHD": "2LBNHD",
    "THD": "2LBNHD",
    "B1NR": "LBHND",
    "BNR": "LBND",
    "T1R": "LBNHD",
    "BHNC, layers within blocks": "BLHN2D",
    "BNR, layers within blocks": "BLND",
}
# Whole pages of keys or of values are one run of bytes.
DENSE = tuple(name for name in STORED if not name.startswith("BHNC"))


@dataclasses.dataclass
class Cache:
    """A buffer of bytes with red zones, the engine's tensors in it, and where each element of K and V is.

    `index`: byte of the buffer where element `[l, 2, b, h, n, d]` begins (MLA: `[l, 1, b, 0, n, d]`).
    """

    buffer: torch.Tensor
    layers: list[LayerKV]
    index: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    layout: str


def make(name: str, dtype: torch.dtype, device: torch.device, start: int = RED_ZONE) -> Cache:
    layout, stored = name.split(",")[0], STORED[name]
    mla = layout in MLA
    sizes = {"L": L, "B": B, "H": 1 if mla else H, "N": N, "D": D, "2": 2}
    strides, step = {}, dtype.itemsize
    for dim in reversed(stored):
        strides[dim] = step
        step *= sizes[dim]
    buffer = random_bytes(start + step + RED_ZONE).to(device)
    values = torch.tensor([], dtype=dtype, device=device).set_(buffer.untyped_storage())

    def tensor(dims: str, offset: int) -> torch.Tensor:
        steps = [strides.get(dim, 0) // dtype.itemsize for dim in dims]
        return values.as_strided([sizes[dim] for dim in dims], steps, (start + offset) // dtype.itemsize)

    layers: list[LayerKV] = []
    for layer in range(L):
        at = layer * strides["L"]
        if layout == "BHNC":
            layers.append(tensor("BHN2D", at).flatten(3))
        elif layout in ("BNHD", "THD"):
            pair = [tensor("BNHD", at + side * strides["2"]) for side in range(2)]
            layers.append((pair[0], pair[1]) if layout == "BNHD" else (pair[0].flatten(0, 1), pair[1].flatten(0, 1)))
        else:
            dims = {"KVBNHD": "2BNHD", "BKVNHD": "B2NHD", "BKVHND": "B2HND", "B1NR": "BHND", "BNR": "BND"}
            whole = tensor(dims.get(layout, "BNHD"), at)
            layers.append(whole.flatten(0, 1) if layout == "T1R" else whole)
    index = np.zeros((L, 1 if mla else 2, B, sizes["H"], N, D), np.int64) + start
    for axis, dim in enumerate("L2BHND"):
        steps = np.arange(index.shape[axis]) * strides.get(dim, 0)
        index += steps.reshape([-1 if i == axis else 1 for i in range(6)])
    return Cache(buffer, layers, index, layout)


def page_tokens(layout: str) -> int:
    return N if "T" in layout else 1


@pytest.mark.parametrize("name", STORED)
def test_views_show_each_element_in_its_place(name: str, device: torch.device) -> None:
    cache = make(name, torch.float32, device)
    raw = cache.buffer.cpu().numpy()
    for layer, tensor in enumerate(cache.layers):
        for side, view in enumerate(kv_views(tensor, cache.layout, page_tokens(cache.layout))):
            if view is None:
                assert side == 1
                assert cache.index.shape[1] == 1
                continue
            assert view.shape == cache.index.shape[2:]
            starts = cache.index[layer, side]
            want = np.stack([raw[starts + i] for i in range(4)], -1)
            np.testing.assert_array_equal(view.cpu().contiguous().view(torch.uint8).numpy().reshape(want.shape), want)


def check_tokens(
    cache: Cache, plane: PagedLayers, sides: slice, what: str, slots: list[int], first: int, count: int
) -> None:
    """`what` on `count` entries of the plane from `first` on, against single elements of single tokens."""
    index = cache.index[:, sides].reshape(-1, *cache.index.shape[2:])  # [l * sides, B, H, N, D]
    size = plane.dtype.itemsize
    chunk = Chunk.make(count, len(slots), plane.token_bytes, poison=what.startswith("gather"), device=str(plane.device))
    want_cache, want_chunk = cache.buffer.cpu().numpy().copy(), chunk.buffer.cpu().numpy().copy()
    rows = chunk.rows(want_chunk)
    for entry in range(count):
        for i, slot in enumerate(slots):
            if slot < 0:
                continue
            starts = index[first + entry, slot // N, :, slot % N].reshape(-1)  # [H * D]
            there = (starts[:, None] + np.arange(size)).reshape(-1)
            if what.startswith("gather"):
                rows[entry, i] = want_cache[there]
            else:
                want_cache[there] = rows[entry, i]
    getattr(pages, what)(plane, torch.tensor(slots, device=plane.device), chunk.view, first)
    np.testing.assert_array_equal(chunk.buffer.cpu().numpy(), want_chunk)
    np.testing.assert_array_equal(cache.buffer.cpu().numpy(), want_cache)


# A last block that is not whole, skipped slots and no order.
SLOTS = [13, 12, -1, 15, 2, 27, 26, 25, -5, 0, 9]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("what", ["gather_tokens", "scatter_tokens"])
def test_keys_and_values_of_all_layers_move_by_token(
    what: str, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    cache = make(name, dtype, device)
    plane = kv_layers(cache.layers, cache.layout, page_tokens(cache.layout))
    assert plane.num_layers == L * cache.index.shape[1]
    check_tokens(cache, plane, slice(None), what, SLOTS, 0, plane.num_layers)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 3), (2, 2), (5, 1), (4, 2), (3, 0)])
@pytest.mark.parametrize("name", ["BHNC", "KVBNHD", "BKVNHD", "THD"])
@pytest.mark.parametrize("what", ["gather_tokens", "scatter_tokens"])
def test_a_range_of_keys_and_values(what: str, name: str, first: int, count: int, device: torch.device) -> None:
    cache = make(name, torch.bfloat16, device)
    plane = kv_layers(cache.layers, cache.layout, page_tokens(cache.layout))
    check_tokens(cache, plane, slice(None), what, SLOTS, first, count)


@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("name", [name for name in STORED if name.split(",")[0] not in MLA])
def test_keys_alone_and_values_alone(name: str, side: int, device: torch.device) -> None:
    cache = make(name, torch.bfloat16, device)
    plane = (key_layers, value_layers)[side](cache.layers, cache.layout, page_tokens(cache.layout))
    check_tokens(cache, plane, slice(side, side + 1), "gather_tokens", SLOTS, 0, L)
    check_tokens(cache, plane, slice(side, side + 1), "scatter_tokens", SLOTS, 1, L - 1)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("what", ["gather_pages", "scatter_pages"])
def test_dense_pages_move_whole(what: str, name: str, device: torch.device) -> None:
    cache = make(name, torch.bfloat16, device)
    plane = kv_layers(cache.layers, cache.layout, page_tokens(cache.layout))
    assert plane.pages_are_dense
    ids = [B - 1, -1, 0, 3]
    chunk = Chunk.make(plane.num_layers, len(ids), plane.page_bytes, poison=what[0] == "g", device=str(device))
    want_cache, want_chunk = cache.buffer.cpu().numpy().copy(), chunk.buffer.cpu().numpy().copy()
    index = cache.index.reshape(-1, *cache.index.shape[2:])
    for entry in range(plane.num_layers):
        for i, block in enumerate(ids):
            if block >= 0:
                at = slice(int(index[entry, block].min()), int(index[entry, block].max()) + 2)
                if what.startswith("gather"):
                    chunk.rows(want_chunk)[entry, i] = want_cache[at]
                else:
                    want_cache[at] = chunk.rows(want_chunk)[entry, i]
    getattr(pages, what)(plane, torch.tensor(ids, device=device), chunk.view)
    np.testing.assert_array_equal(chunk.buffer.cpu().numpy(), want_chunk)
    np.testing.assert_array_equal(cache.buffer.cpu().numpy(), want_cache)


def test_pages_of_keys_beside_values_are_not_dense() -> None:
    plane = kv_layers([torch.zeros(B, H, N, 2 * D)], "BHNC")
    assert not plane.pages_are_dense
    with pytest.raises(KernelArgumentError, match="use gather_tokens"):
        pages.gather_pages(plane, torch.arange(1), torch.zeros(2, 1, H * N * D))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", ["gather_tokens", "scatter_tokens"])
def test_every_order_of_vllm(what: str, order: str, device: torch.device) -> None:
    layout = Layout(order, Shape(L=2, B=B, H=H, N=N, C=2 * D), torch.bfloat16)
    buffer = random_bytes(layout.nbytes).to(device)
    steps = {dim: step * 2 for dim, step in layout.strides.items()}
    index = np.full((2, 2, B, H, N, D), layout.start)
    for axis, step in enumerate((steps["L"], D * 2, steps["B"], steps["H"], steps["N"], 2)):
        index += (np.arange(index.shape[axis]) * step).reshape([-1 if i == axis else 1 for i in range(6)])
    views = layout.views(buffer)
    cache = Cache(buffer, list(views), index, "BHNC")
    check_tokens(cache, kv_layers(views, "BHNC"), slice(None), what, SLOTS, 0, 4)
    assert PagedLayers(views).pages_are_dense == (order in DENSE_ORDERS)


@pytest.mark.parametrize("name", ["BHNC", "KVBNHD", "THD", "BNR"])
def test_layers_in_buffers_of_their_own(name: str, device: torch.device) -> None:
    caches = [make(name, torch.bfloat16, device) for _ in range(3)]
    layers = [cache.layers[i] for i, cache in enumerate(caches)]
    plane = kv_layers(layers, caches[0].layout, page_tokens(caches[0].layout))
    sides = caches[0].index.shape[1]
    out = torch.full((plane.num_layers, 3, plane.token_bytes), 0xFF, dtype=torch.uint8, device=device)
    pages.gather_tokens(plane, torch.tensor([5, 0, 27], device=device), out)
    alone = [kv_layers([layer], caches[0].layout, page_tokens(caches[0].layout)) for layer in layers]
    for i, one in enumerate(alone):
        want = torch.zeros(sides, 3, plane.token_bytes, dtype=torch.uint8, device=device)
        pages.gather_tokens(one, torch.tensor([5, 0, 27], device=device), want)
        assert torch.equal(out[sides * i : sides * (i + 1)], want)
        part = torch.zeros_like(want[:1])
        pages.gather_tokens(plane, torch.tensor([5, 0, 27], device=device), part, sides * i)
        assert torch.equal(part, want[:1])


def test_all_layouts_give_the_same_chunk(device: torch.device) -> None:
    content = torch.randn(L, 2, B, H, N, D).to(torch.bfloat16)
    chunks = []
    for name in STORED:
        cache = make(name, torch.bfloat16, device)
        if cache.index.shape[1] == 1:
            continue
        for layer, tensor in enumerate(cache.layers):
            for side, view in enumerate(kv_views(tensor, cache.layout, page_tokens(cache.layout))):
                assert view is not None
                view.copy_(content[layer, side])
        plane = kv_layers(cache.layers, cache.layout, page_tokens(cache.layout))
        chunk = torch.full((L, 2, len(SLOTS), H, D), float("nan"), dtype=torch.bfloat16, device=device)
        pages.gather_tokens(plane, torch.tensor([s % (B * N) for s in SLOTS], device=device), chunk.flatten(0, 1))
        chunks.append(chunk)
    slots = torch.tensor([s % (B * N) for s in SLOTS])
    want = content.transpose(3, 4).flatten(2, 3)[:, :, slots]  # [L, 2, T, H, D]
    assert len(chunks) == 9
    assert all(torch.equal(chunk.cpu(), want) for chunk in chunks)


def test_groups_that_share_memory_write_only_their_own_blocks(device: torch.device) -> None:
    # As vLLM's hybrid models: the layers of two groups are the same memory, and each block belongs to one group.
    shape, heads = (B, H, N, 2 * D), (B, 2 * H, N, D)
    memory = random_bytes(L * B * H * N * 2 * D * 2).view(torch.bfloat16).to(device)
    full = kv_layers(list(memory.view(L, *shape)), "BHNC")
    window = kv_layers(list(memory.view(L, *heads)), "BHNC")
    before = memory.clone().view(torch.int16).view(L, B, -1)
    for plane, blocks in ((full, [1, 4]), (window, [6, 2])):
        slots = (torch.tensor(blocks)[:, None] * N + torch.arange(N)).flatten().to(device)
        row = plane.heads * plane.content
        chunk = torch.randn(plane.num_layers, len(slots), row).to(torch.bfloat16).to(device)
        pages.scatter_tokens(plane, slots, chunk)
        after = memory.view(torch.int16).view(L, B, -1)
        others = [b for b in range(B) if b not in blocks]
        assert torch.equal(after[:, others], before[:, others])
        assert not (after[:, blocks] == before[:, blocks]).all(-1).any()
        back = torch.zeros_like(chunk)
        pages.gather_tokens(plane, slots, back)
        assert torch.equal(back.view(torch.int16), chunk.view(torch.int16))
        before = after.clone()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_shapes_are_refused(layout: str) -> None:
    for tensor in (torch.zeros(3), torch.zeros(2, 2, 2, 2, 2, 2)):
        given = (tensor, tensor) if LAYOUTS[layout][0] == 2 else tensor
        with pytest.raises(KernelArgumentError, match=layout):
            kv_views(given, layout)


@pytest.mark.parametrize(
    ("layout", "layer", "page", "message"),
    [
        ("BHNC", torch.zeros(3, 2, 4, 7), 1, r"2 \* D"),
        ("KVBNHD", torch.zeros(3, 2, 4, 2, 8), 1, r"\[3, 2, 4, 2, 8\] was given"),
        ("BKVNHD", torch.zeros(2, 3, 4, 2, 8), 1, "needs"),
        ("BKVHND", torch.zeros(2, 3, 4, 2, 8), 1, "needs"),
        ("B1NR", torch.zeros(3, 2, 4, 8), 1, "needs"),
        ("T1R", torch.zeros(12, 2, 8), 1, "needs"),
        ("THD", torch.zeros(12, 2, 8), 1, "a tuple of keys and values"),
        ("BNHD", (torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 1, 8)), 1, "needs"),
        ("BHNC", (torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)), 1, "needs"),
        ("THD", (torch.zeros(13, 2, 8), torch.zeros(13, 2, 8)), 4, "page_tokens=4"),
        ("THD", (torch.zeros(12, 2, 8), torch.zeros(12, 2, 8)), 0, "page_tokens=0"),
    ],
)
def test_strange_layers_are_refused(layout: str, layer: LayerKV, page: int, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        kv_views(layer, layout, page)


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedLayoutError) as raised:
        kv_views(torch.zeros(3, 2, 4, 8), "NHD")
    assert all(f"{name} {shape}" in str(raised.value) for name, (_, shape) in LAYOUTS.items())


@pytest.mark.parametrize("make_layers", [kv_layers, key_layers])
def test_mla_is_one_plane_of_latents(make_layers: Callable[..., PagedLayers]) -> None:
    plane = make_layers([torch.zeros(B, N, D), torch.zeros(B, N, D)], "BNR")
    assert (plane.num_layers, plane.heads, plane.block_tokens, plane.content) == (2, 1, N, D)
    with pytest.raises(KernelArgumentError, match="no values"):
        value_layers([torch.zeros(B, N, D)], "BNR")


def test_keys_and_values_in_one_storage_are_copied_in_two_groups() -> None:
    # A Python loop over 2 L views would cost the CPU's copies more than the bytes of a small chunk.
    for name, groups in (("BHNC", 2), ("KVBNHD", 1), ("BKVNHD", 2), ("THD", 2), ("BNR", 1)):
        cache = make(name, torch.bfloat16, torch.device("cpu"))
        plane = kv_layers(cache.layers, cache.layout, page_tokens(cache.layout))
        assert len(plane.planes(plane.token_units, 2)) == groups


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["BHNC", "BKVNHD", "THD"])
@pytest.mark.parametrize("what", ["gather_tokens", "scatter_tokens"])
def test_offsets_beyond_two_to_the_31_elements(what: str, name: str) -> None:
    heads, tokens, width = 2, 16, 128
    blocks = (2**31 + 2**20) // (2 * heads * tokens * width)
    if torch.cuda.mem_get_info()[0] < 2**33:
        pytest.skip("not enough GPU memory")
    memory = torch.zeros(blocks * 2 * heads * tokens * width, dtype=torch.bfloat16, device="cuda")
    layer: LayerKV = memory.view(blocks, heads, tokens, 2 * width)
    if name == "BKVNHD":
        layer = memory.view(blocks, 2, tokens, heads, width)
    elif name == "THD":
        keys, values = memory.view(2, blocks * tokens, heads, width)
        layer = (keys, values)
    plane = kv_layers([layer], name, tokens if name == "THD" else 1)
    slots = torch.tensor([0, blocks * tokens - 1], device="cuda")
    chunk = torch.randn(2, 2, heads, width, device="cuda").to(torch.bfloat16)
    last = plane.layers[1][-1, :, -1]
    if what.startswith("gather"):
        last.copy_(chunk[1, 1])
        out = torch.full_like(chunk, float("nan"))
        pages.gather_tokens(plane, slots, out)
        assert torch.equal(out[1, 1], chunk[1, 1])
    else:
        pages.scatter_tokens(plane, slots, chunk)
        for side, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = plane.layers[side][0, :, 0] if i == 0 else plane.layers[side][-1, :, -1]
            assert torch.equal(place, chunk[side, i])
            place.zero_()
        assert not memory.view(torch.uint8).any()
