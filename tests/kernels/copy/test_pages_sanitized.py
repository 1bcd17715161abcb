"""The paged copies under the sanitizer: they stay inside, do not race, promise nothing false and move nothing twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paged_layouts import DENSE_ORDERS, ORDERS, Chunk, Layout, Shape, paged, random_bytes

from lmcache.kernels import PagedLayers
from lmcache.kernels.copy import kernel, pages

pytestmark = pytest.mark.interpret

OPS = ("gather_tokens", "scatter_tokens", "gather_pages", "scatter_pages")
BF16 = torch.bfloat16


def arguments(
    what: str, layout: Layout, ids: list[int]
) -> tuple[PagedLayers, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The plane, the ids and the chunk to call `what` with, and the memory that it may touch."""
    plane = paged(layout, random_bytes(layout.nbytes))
    row = plane.page_bytes if what.endswith("pages") else plane.token_bytes
    chunk = Chunk.make(layout.shape.L, len(ids), row, poison=what.startswith("gather"), pad=1)
    return plane, torch.tensor(ids, dtype=torch.int64), chunk.view, [chunk.view, *plane.layers]


@pytest.mark.parametrize(
    "shape",
    [Shape(), Shape(H=3, N=5, C=7, B=12), Shape(L=1, H=4, C=128, B=8), Shape(block_gap=24), Shape(content_gap=16)],
    ids=["small", "ragged", "wide", "block_gap", "content_gap"],
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", OPS)
def test_copies_touch_only_what_they_are_given(what: str, order: str, shape: Shape) -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    if what.endswith("pages") and (order not in DENSE_ORDERS or shape.content_gap):
        pytest.skip("pages are not dense")
    limit = shape.B * (1 if what.endswith("pages") else shape.N)
    ids = [limit - 1, -1, *range(0, limit - 2, 3), -7]
    plane, ids_n, chunk, allowed = arguments(what, Layout(order, shape, BF16), ids)
    with sanitized(*allowed) as watched:
        getattr(pages, what)(plane, ids_n, chunk)
    assert watched.programs > 0


@pytest.mark.parametrize("what", OPS)
def test_an_aligned_copy_moves_each_sector_once(what: str) -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    layout = Layout("LBNHC", Shape(L=2, B=8, H=8, N=16, C=128), BF16)
    ids = [3, 0, 5] if what.endswith("pages") else list(range(90, 40, -1))
    plane, ids_n, chunk, allowed = arguments(what, layout, ids)
    with sanitized(*allowed) as watched:
        getattr(pages, what)(plane, ids_n, chunk)
    payload = chunk.numel()
    assert watched.stores.bytes == payload
    assert watched.stores.sectors == payload // 32
    # on top: for each program the ids of its rows and the address of its layer
    assert payload < watched.loads.bytes <= payload + watched.programs * 8 * (8 + 1)
    assert watched.loads.sectors <= payload // 32 + watched.programs * 4


def test_writing_one_unit_twice_is_a_race() -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    layout = Layout("LBNHC", Shape(L=1, B=8, H=8, N=16, C=128), BF16)
    plane, ids, chunk, allowed = arguments("scatter_tokens", layout, [*range(30), 5])
    with pytest.raises(Violation, match="race"), sanitized(*allowed):
        pages.scatter_tokens(plane, ids, chunk)


def with_argument(position: int, change: Callable[[int], int]) -> Callable[..., None]:
    """The launch of the copies' kernel with one of its integers changed."""
    launch = kernel.copy_rows.launch

    def changed(grid: tuple[int, ...], device: torch.device, *args: object, **options: object) -> None:
        given = list(args)
        given[position] = change(given[position])  # type: ignore[arg-type]
        launch(grid, device, *given, **options)

    return changed


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (3, lambda first_layer: first_layer + 1, "out of bounds: load of 8 bytes"),  # beyond the table of pointers
        (4, lambda num_rows: num_rows + 1, "out of bounds: load of 8 bytes"),  # beyond the ids
        (7, lambda chunk_layer_stride: chunk_layer_stride * 2, "out of bounds: store of 8 bytes"),
        (9, lambda unit_stride: unit_stride + 1, "broken promise"),
        (9, lambda unit_stride: unit_stride * 2, "out of bounds: load of 8 bytes"),
    ],
)
def test_the_sanitizer_sees_wrong_launches(
    position: int, change: Callable[[int], int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache.kernels.testing.sanitizer import Violation, sanitized

    plane, ids, chunk, allowed = arguments("gather_tokens", Layout("LBNHC", Shape(), BF16), [1, 95, 60])
    monkeypatch.setattr(kernel.copy_rows, "launch", with_argument(position, change))
    with pytest.raises(Violation, match=message), sanitized(*allowed):
        pages.gather_tokens(plane, ids, chunk)
