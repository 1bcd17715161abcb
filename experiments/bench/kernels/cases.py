"""What kernel_bench measures: one function for each family of operations (those of blending: cases_blend.py).

To add an operation, add a function `Setup -> Iterator[Case]` to FAMILIES; case.py says what a Case is.
Imports torch and the kernels only: this runs on a bare GPU machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from experiments.bench.kernels.case import Case, Setup, Size, agree, fill, on_gpu, within
from experiments.bench.kernels.cases_blend import attention, deviation, rotary, selection
from lmcache.kernels import PagedLayers
from lmcache.kernels.copy import pages
from lmcache.kernels.copy.host import HostTransfer
from lmcache.kernels.entropy.coder import Encoded, max_words, rans_decode, rans_encode
from lmcache.kernels.entropy.host import rans_encode_numpy
from lmcache.kernels.entropy.tables import FrequencyTables, entropy_bits, quantise_counts
from lmcache.kernels.quantise.packing import pack_pages, pack_pages_torch, unpack_pages, unpack_pages_torch
from lmcache.kernels.quantise.scheme import Scheme, SideLayout

# CPU: one thread of numpy against one thread of memcpy; the rest is the price of short runs. GPU: a copy kernel that
# spreads its accesses over random pages of 32 KiB has nothing that should cost more than the last 8 %.
COPY_FLOORS = {"cpu": 0.60, "cuda": 0.92}

Copy = Callable[[PagedLayers, torch.Tensor, torch.Tensor], None]


def paged_copies(setup: Setup) -> Iterator[Case]:
    """The size ends in the layout and the number of successive tokens; the blocks are random."""
    size = setup.size
    for block, order in ((16, "LBHNC"), (16, "LBNHC"), (128, "LBHNC")):
        blocks, n = size.cache_tokens // block, size.tokens // block
        cache = setup.cache(block, order)
        plane = PagedLayers(list(cache if order == "LBHNC" else cache.transpose(2, 3)))
        chosen = setup.permutations(blocks, n)
        chunk = torch.empty((size.layers, n, plane.page_bytes // 2), dtype=torch.int16, device=setup.device)
        memory = cache.view(size.layers, blocks, -1)
        text = f"{size}, {order}"
        for make in (_gather, _scatter):
            case = make(f"{text}/{block}", "pages", plane, chosen, chunk, memory, COPY_FLOORS)
            yield dataclasses.replace(case, estimated=block == 16 and order == "LBNHC")
        if order == "LBNHC":
            chunk = chunk.view(size.layers, size.tokens, -1)
            memory = cache.view(size.layers, size.cache_tokens, -1)
            slots = [(ids[:, None] * block + torch.arange(block, device=setup.device)).flatten() for ids in chosen]
            yield _gather(f"{text}/{block}", "tokens", plane, slots, chunk, memory, COPY_FLOORS)
            yield _with_flashinfer(
                _scatter(f"{text}/{block}", "tokens", plane, slots, chunk, memory, COPY_FLOORS), cache, chosen, chunk
            )
            single = setup.permutations(size.cache_tokens, size.tokens)
            floors = {"cuda": COPY_FLOORS["cuda"]}  # a CPU has no floor for single tokens: 2 KiB are no copy
            for make in (_gather, _scatter):
                case = make(f"{text}/1", "tokens", plane, single, chunk, memory, floors)
                yield dataclasses.replace(case, estimated=False)


def _gather(
    size: str,
    unit: str,
    plane: PagedLayers,
    chosen: list[torch.Tensor],
    chunk: torch.Tensor,
    memory: torch.Tensor,
    floors: dict[str, float],
) -> Case:
    """`memory`: the cache as [layers, units, elements of a unit]."""
    operation: Copy = getattr(pages, f"gather_{unit}")
    definition: Copy = getattr(pages, f"gather_{unit}_torch")
    ids = itertools.cycle(chosen)

    def check() -> bool:
        fill(chunk, 1)
        given = next(ids)
        return agree(lambda: operation(plane, given, chunk), lambda: definition(plane, given, chunk), [chunk])

    def peer() -> None:
        given = next(ids)
        for layer in range(len(memory)):
            chunk[layer] = memory[layer][given]

    return Case(
        name=f"gather_{unit}",
        size=size,
        nbytes=2 * chunk.numel() * chunk.element_size(),
        run=lambda: operation(plane, next(ids), chunk),
        check=check,
        peer=peer,
        peer_name="indexing",
        floors=floors,
        memory=[*plane.layers, chunk],
    )


def _scatter(
    size: str,
    unit: str,
    plane: PagedLayers,
    chosen: list[torch.Tensor],
    chunk: torch.Tensor,
    memory: torch.Tensor,
    floors: dict[str, float],
) -> Case:
    operation: Copy = getattr(pages, f"scatter_{unit}")
    definition: Copy = getattr(pages, f"scatter_{unit}_torch")
    ids = itertools.cycle(chosen)

    def check() -> bool:
        fill(chunk, 1)
        given = next(ids)
        return agree(lambda: operation(plane, given, chunk), lambda: definition(plane, given, chunk), plane.layers)

    def peer() -> None:
        given = next(ids)
        for layer in range(len(memory)):
            memory[layer][given] = chunk[layer]

    return Case(
        name=f"scatter_{unit}",
        size=size,
        nbytes=2 * chunk.numel() * chunk.element_size(),
        run=lambda: operation(plane, next(ids), chunk),
        check=check,
        peer=peer,
        peer_name="indexing",
        floors=floors,
        far_writes=True,
        memory=[*plane.layers, chunk],
    )


def _with_flashinfer(case: Case, cache: torch.Tensor, chosen: list[torch.Tensor], chunk: torch.Tensor) -> Case:
    """On a GPU that has it, compare with flashinfer's append: layer 2 i as keys, layer 2 i + 1 as values."""
    if cache.device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return case
    flashinfer = importlib.import_module("flashinfer")
    half = [layer.view(torch.float16) for layer in cache]  # [B, N, H, C]; a copy is a copy in any 16-bit dtype
    new = [layer.view(torch.float16).view(-1, *cache.shape[3:]) for layer in chunk]  # [T, H, C]
    device, tokens = cache.device, new[0].shape[0]
    one = torch.zeros(tokens, dtype=torch.int32, device=device)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    bounds = torch.tensor([0, len(chosen[0])], dtype=torch.int32, device=device)
    last = torch.tensor([cache.shape[2]], dtype=torch.int32, device=device)
    ids = itertools.cycle([given.int() for given in chosen])

    def append() -> None:
        given = next(ids)
        for i in range(0, len(half) - 1, 2):
            flashinfer.append_paged_kv_cache(
                new[i], new[i + 1], one, positions, (half[i], half[i + 1]), given, bounds, last
            )

    return dataclasses.replace(case, peer=append, peer_name="flashinfer")


HOST_FLOORS = {"cuda": 0.90}
PACK_FLOORS = {"cuda": 0.80}
SCHEMES = {
    "4-bit channel": Scheme(4, axis="channel"),
    "4-bit rotated": Scheme(4, rotate=True),
    "fp8": Scheme(8, fp8=True),
}


def packing(setup: Setup) -> Iterator[Case]:
    """The size ends in the scheme. Read: bf16 of the pages; written: codes and scales; or the reverse."""
    size, block = setup.lighter.size, 16
    numbers = setup.random(size.cache_tokens // block, block, size.heads, size.head_size)
    cache = numbers.expand(size.layers, -1, -1, -1, -1).contiguous()
    plane = PagedLayers(list(cache.transpose(2, 3)))
    blocks = setup.permutations(size.cache_tokens // block, size.tokens // block)
    slots = [(ids[:, None] * block + torch.arange(block, device=setup.device)).flatten() for ids in blocks]
    for name, scheme in SCHEMES.items():
        layout = SideLayout(scheme, size.tokens, size.heads, size.head_size)
        packed = torch.zeros(size.layers, layout.nbytes, dtype=torch.uint8, device=setup.device)
        yield from _pack_and_unpack(f"{size}, {name}", plane, slots, layout, packed)


def _pack_and_unpack(
    text: str, plane: PagedLayers, slots: list[torch.Tensor], layout: SideLayout, packed: torch.Tensor
) -> Iterator[Case]:
    ids, scheme = itertools.cycle(slots), layout.scheme
    nbytes = packed.shape[0] * (layout.tokens * plane.token_bytes + layout.nbytes)

    def check_pack() -> bool:
        # Sums in another order may round a code the other way: a half step more, and seldom.
        pack_pages(plane, slots[0], scheme, packed)
        codes, scales = packed[:, : layout.scales_start].clone(), layout.scales(packed).float()
        pack_pages_torch(plane, slots[0], scheme, packed)
        other = (codes != packed[:, : layout.scales_start]).float().mean()
        return bool(other < (0.1 if scheme.rotate else 0.01)) and within(2e-3, 1e-4)(
            scales, layout.scales(packed).float()
        )

    def check_unpack() -> bool:
        pack_pages_torch(plane, slots[0], scheme, packed)
        target, wanted = (PagedLayers([torch.zeros_like(layer) for layer in plane.layers]) for _ in range(2))
        unpack_pages(target, slots[1], scheme, packed)
        unpack_pages_torch(wanted, slots[1], scheme, packed)
        return all(map(within(2**-7, 2**-7), target.layers, wanted.layers))

    yield Case(
        name="pack_pages",
        size=text,
        nbytes=nbytes,
        run=lambda: pack_pages(plane, next(ids), scheme, packed),
        check=check_pack,
        peer=on_gpu(plane.device, lambda: pack_pages_torch(plane, next(ids), scheme, packed)),
        floors=PACK_FLOORS,
        memory=[*plane.layers, packed],
        estimated=not scheme.fp8,
    )
    yield Case(
        name="unpack_pages",
        size=text,
        nbytes=nbytes,
        run=lambda: unpack_pages(plane, next(ids), scheme, packed),
        check=check_unpack,
        peer=on_gpu(plane.device, lambda: unpack_pages_torch(plane, next(ids), scheme, packed)),
        floors=PACK_FLOORS,
        far_writes=True,
        memory=[*plane.layers, packed],
        estimated=not scheme.fp8,
    )


def entropy(setup: Setup) -> Iterator[Case]:
    """4-bit codes, one a byte, of 3 bits of entropy: the symbols on one side, 16-bit words on the other."""
    size, alphabet = setup.lighter.size, 16
    length = min(512, size.tokens)
    streams = size.layers * size.cache_tokens * size.width // 32 // length
    numbers = torch.randn(streams, length, generator=torch.Generator().manual_seed(0))
    symbols = (numbers * 2 + 7.5).round().clamp(0, alphabet - 1).to(torch.uint8)
    counts = torch.bincount(symbols.flatten().int(), minlength=alphabet)[None]
    tables = FrequencyTables(quantise_counts(counts), setup.device)
    symbols, decoded = symbols.to(setup.device), torch.zeros_like(symbols, device=setup.device)
    table_of = torch.zeros(streams, 1, dtype=torch.int32, device=setup.device)
    room = torch.zeros(streams * max_words(length), dtype=torch.uint16, device=setup.device)
    made: list[Encoded] = []

    def encoded() -> Encoded:
        if not made:
            made.append(rans_encode(symbols, tables, table_of))
        return made[0]

    def check_encode() -> bool:
        by_numpy = rans_encode_numpy(symbols.cpu().numpy(), tables.to("cpu"), table_of.cpu().numpy())
        got = rans_encode(symbols, tables, table_of, room)
        words = got.words[: int(got.used)].cpu().numpy()
        return np.array_equal(words, by_numpy[0]) and np.array_equal(got.lengths.cpu().numpy(), by_numpy[1])

    def check_decode() -> bool:
        decoded.zero_()
        intact = rans_decode(encoded().words, encoded().lengths, tables, table_of, decoded)
        return bool(intact.all()) and torch.equal(decoded, symbols)

    bits = int(entropy_bits(counts)[0]) + 16 * streams
    text = f"{streams} x {length} symbols, {bits / symbols.numel():.1f} bits"
    yield Case(
        name="rans_encode",
        size=text,
        nbytes=symbols.numel() + bits // 8,
        run=lambda: rans_encode(symbols, tables, table_of, room),
        check=check_encode,
        work=lambda size: size.layers * size.cache_tokens,
    )
    yield Case(
        name="rans_decode",
        size=text,
        nbytes=symbols.numel() + bits // 8,
        run=lambda: rans_decode(encoded().words, encoded().lengths, tables, table_of, decoded),
        check=check_decode,
        work=lambda size: size.layers * size.cache_tokens,
    )


def host_transfers(setup: Setup) -> Iterator[Case]:
    """Pages to host memory and back. On a GPU the bytes are those on the link, the roofline is one pinned copy."""
    size, block, device = setup.size, 16, setup.device
    cache = setup.cache(block)
    plane, transfer = PagedLayers(list(cache.transpose(2, 3))), HostTransfer(device)
    chosen = setup.permutations(size.cache_tokens // block, size.tokens // block)
    ids = itertools.cycle(chosen)
    shape = (size.layers, len(chosen[0]), plane.page_bytes // 2)
    chunk, plain = (torch.zeros(shape, dtype=torch.int16, pin_memory=device.type == "cuda") for _ in range(2))
    contiguous = cache.view(-1)[: plain.numel()].view(shape)
    nbytes = chunk.numel() * 2 * (1 if device.type == "cuda" else 2)

    def to_host(given: torch.Tensor) -> None:
        transfer.copy_to_host(plane, given, chunk, whole_pages=True)
        transfer.join()

    def from_host(given: torch.Tensor) -> None:
        transfer.copy_from_host(plane, given, chunk, whole_pages=True)

    def is_there() -> bool:
        """Whether pages and chunk hold the same at the first selection."""
        on_device = torch.zeros(shape, dtype=torch.int16, device=device)
        pages.gather_pages_torch(plane, chosen[0], on_device)
        return torch.equal(on_device.cpu(), chunk)

    def check_to_host() -> bool:
        chunk.fill_(-1)
        to_host(chosen[0])
        return is_there()

    def check_from_host() -> bool:
        fill(chunk, 5)
        from_host(chosen[0])
        return is_there()

    yield Case(
        name="copy_to_host",
        size=f"{size}, LBNHC/{block}",
        nbytes=nbytes,
        run=lambda: to_host(next(ids)),
        check=check_to_host,
        floors=HOST_FLOORS,
        roofline=on_gpu(device, lambda: plain.copy_(contiguous, non_blocking=True)),
        estimated=False,
    )
    yield Case(
        name="copy_from_host",
        size=f"{size}, LBNHC/{block}",
        nbytes=nbytes,
        run=lambda: from_host(next(ids)),
        check=check_from_host,
        floors=HOST_FLOORS,
        far_writes=True,
        roofline=on_gpu(device, lambda: contiguous.copy_(plain, non_blocking=True)),
        estimated=False,
    )


FAMILIES: tuple[Callable[[Setup], Iterator[Case]], ...] = (
    paged_copies,
    packing,
    entropy,
    host_transfers,
    rotary,
    deviation,
    selection,
    attention,
)


def all_cases(device: torch.device, size: Size) -> Iterator[Case]:
    """One after the other, because each holds its memory."""
    for family in FAMILIES:
        yield from family(Setup(device, size))
