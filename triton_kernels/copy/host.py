"""Copies between an engine's pages and host memory, on a GPU without stopping it.

Two ways, bit for bit the same:

    staged   pages --kernel--> device buffer --DMA--> host     at the speed of the link, no SM busy for long
    direct   pages --kernel--> host                            nothing but one launch; a few programs, so that the model
                                                               keeps the SMs. Only pinned host memory, only NVIDIA

Small copies go directly, larger ones staged; `calibration.calibrate` finds the size from which staging is faster.
Staging has two buffers, taken in turn, and the DMA runs on a stream of its own: while one piece is on the link, the
kernel fills or empties the next. Kernels run on the caller's current stream:

    copy_to_host     current  gather A | gather B          | gather A (waits for DMA A)
                     link              | DMA A -> host     | DMA B -> host
    copy_from_host   link     DMA A    | DMA B             | DMA A (waits for scatter A)
                     current           | scatter A         | scatter B

What a copy_to_host has queued reaches the host in the order of the current stream only after `join`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.copy import pages as copies
from lmcache.kernels.copy.kernel import launch_copy
from lmcache.kernels.copy.pages import check_chunk, check_ids
from lmcache.kernels.launch import runs_kernel
from lmcache.kernels.layers import PagedLayers, Units, reinterpret

# Both buffers together. Half of it is a third of a millisecond of DMA at 50 GB/s, far more than a launch takes.
STAGING_BYTES = 32 << 20
# Without calibration: what a link of 50 GB/s moves in the 10 us that a second launch and a DMA engine's start take.
DIRECT_BYTES = 512 << 10
# 8 KiB in flight each, together more than twice what such a link needs at 2 us of latency; a quarter of an H100's SMs.
PROGRAMS = 32
_HOST = torch.device("cpu")


@dataclasses.dataclass
class _Staging:
    """A device buffer. filled: its content is there. free: its content has been used."""

    bytes: torch.Tensor
    filled: Any
    free: Any


class HostTransfer:
    """Copies between pages on `device` and host memory. Thread-safe.

    `staging_bytes`: device memory that it takes, at once and for good (none on a CPU). `direct_bytes`: copies of at
    most so many bytes are direct. `programs`: most programs of a direct copy. On a CPU it is gather and scatter.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        staging_bytes: int = STAGING_BYTES,
        direct_bytes: int = DIRECT_BYTES,
        programs: int = PROGRAMS,
    ) -> None:
        self.device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        self.direct_bytes = {"to_host": direct_bytes, "from_host": direct_bytes}
        self.programs = programs
        self._buffer_bytes = staging_bytes // 2 // 256 * 256
        self._lock = threading.Lock()
        self._turn = 0
        self._writes: dict[Any, Any] = {}  # each stream that has written to host memory: an event behind its last write
        self._buffers: list[_Staging] = []
        if runs_kernel(self.device):
            # torch.cpu has streams and events too; they do nothing.
            self._streams: Any = torch.get_device_module(self.device)
            with on_device(self.device):
                self._link = self._streams.Stream()
                self._buffers = [self._staging() for _ in range(2)]

    def copy_to_host(
        self,
        pages: PagedLayers,
        ids: torch.Tensor,
        chunk: torch.Tensor,
        first_layer: int = 0,
        *,
        whole_pages: bool = False,
    ) -> None:
        """Copy the tokens at slots `ids` (`whole_pages`: the pages of blocks `ids`) of layers first_layer.. to `chunk`.

        `ids`: int64 `[n]` on the device of `pages`. `chunk`: host memory, any dtype, `[l, n, ...]` holding token_bytes
        (page_bytes) a row, rows of a layer contiguous, layers at any stride. A negative id leaves zeros in its row.
        The copy is queued; it has been done when the current stream has passed a later `join`. Memory that is not
        pinned makes CUDA wait for the DMA. Raises KernelArgumentError as gather_tokens does.
        """
        self._copy(pages, ids, chunk, first_layer, whole_pages=whole_pages, scatter=False)

    def copy_from_host(
        self,
        pages: PagedLayers,
        ids: torch.Tensor,
        chunk: torch.Tensor,
        first_layer: int = 0,
        *,
        whole_pages: bool = False,
    ) -> None:
        """The reverse: write `chunk[:, i]` to token or page `ids[i]`; a negative id writes nothing.

        The copy is queued, and pages are written in the order of the current stream. `chunk` must keep its content
        until that stream has passed.
        """
        self._copy(pages, ids, chunk, first_layer, whole_pages=whole_pages, scatter=True)

    def join(self) -> None:
        """Make the current stream wait for every copy_to_host so far; the caller's thread waits for nothing."""
        with self._lock:
            if self._writes:
                self._await_writes(self._streams.current_stream(self.device))

    def _copy(
        self,
        pages: PagedLayers,
        ids: torch.Tensor,
        chunk: torch.Tensor,
        first_layer: int,
        *,
        whole_pages: bool,
        scatter: bool,
    ) -> None:
        units = pages.page_units if whole_pages else pages.token_units
        self._check(pages, units, ids, chunk, first_layer)
        if ids.numel() == 0 or chunk.numel() == 0:
            return
        if not runs_kernel(self.device):
            (copy_from_host_torch if scatter else copy_to_host_torch)(pages, ids, chunk, first_layer, whole_pages)
            return
        rows = _byte_rows(chunk, units)
        small = rows.numel() <= self.direct_bytes["from_host" if scatter else "to_host"]
        with self._lock, on_device(self.device):
            address = _device_address(rows, self.device) if small else None
            if address is not None:
                self._copy_directly(pages, units, ids, rows, address, first_layer, scatter=scatter)
            elif scatter:
                self._unstage(pages, units, ids, rows, first_layer)
            else:
                self._stage(pages, units, ids, rows, first_layer)

    def _copy_directly(
        self,
        pages: PagedLayers,
        units: Units,
        ids: torch.Tensor,
        rows: torch.Tensor,
        address: int,
        first_layer: int,
        *,
        scatter: bool,
    ) -> None:
        current = self._streams.current_stream(self.device)
        self._await_writes(current)  # the link may still write what this reads, or write over what this writes
        launch_copy(
            pages,
            units,
            ids,
            rows,
            first_layer,
            scatter=scatter,
            zeros=not scatter,
            address=address,
            programs=self.programs,
        )
        if not scatter:
            self._wrote(current)

    def _stage(self, pages: PagedLayers, units: Units, ids: torch.Tensor, rows: torch.Tensor, first_layer: int) -> None:
        current = self._streams.current_stream(self.device)
        for layers, part in self._pieces(rows):
            there = rows[layers, part]
            buffer, here = self._next_buffer(there, current)
            buffer.free.wait(current)
            launch_copy(pages, units, ids[part], here, first_layer + layers.start, scatter=False, zeros=True)
            buffer.filled.record(current)
            buffer.filled.wait(self._link)
            with self._streams.stream(self._link):
                self._dma(there, here)
            buffer.free.record(self._link)
            self._wrote(self._link)

    def _unstage(
        self, pages: PagedLayers, units: Units, ids: torch.Tensor, rows: torch.Tensor, first_layer: int
    ) -> None:
        current = self._streams.current_stream(self.device)
        self._await_writes(self._link)  # a direct copy may still write what is read here
        for layers, part in self._pieces(rows):
            there = rows[layers, part]
            buffer, here = self._next_buffer(there, current)
            buffer.free.wait(self._link)
            with self._streams.stream(self._link):
                self._dma(here, there)
            buffer.filled.record(self._link)
            buffer.filled.wait(current)
            launch_copy(pages, units, ids[part], here, first_layer + layers.start, scatter=True)
            buffer.free.record(current)

    def _wrote(self, stream: Any) -> None:
        """`stream` has just been given a write to host memory."""
        if stream not in self._writes:
            self._writes[stream] = self._streams.Event()
        self._writes[stream].record(stream)

    def _await_writes(self, stream: Any) -> None:
        """Make `stream` wait for the writes of all others. The events stay, as later streams must wait for them too."""
        for writer, written in self._writes.items():
            if writer != stream:
                written.wait(stream)

    def _pieces(self, rows: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """(layers, ids) of pieces that fit a staging buffer: whole layers, or parts of one layer."""
        num_layers, n, row = rows.shape
        some_ids = min(n, self._buffer_bytes // row)
        some_layers = max(1, self._buffer_bytes // (n * row))
        for layer in range(0, num_layers, some_layers):
            for i in range(0, n, some_ids):
                yield slice(layer, min(layer + some_layers, num_layers)), slice(i, min(i + some_ids, n))

    def _next_buffer(self, there: torch.Tensor, current: Any) -> tuple[_Staging, torch.Tensor]:
        """The buffer whose turn it is, and the part of it that holds what `there` does."""
        buffer = self._buffers[self._turn]
        self._turn = 1 - self._turn
        if self.device.type != "cpu":
            buffer.bytes.record_stream(current)
        return buffer, buffer.bytes[: there.numel()].view(there.shape)

    def _staging(self) -> _Staging:
        buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8, device=self.device)
        if self.device.type != "cpu":
            buffer.record_stream(self._link)
        staging = _Staging(buffer, self._streams.Event(), self._streams.Event())
        # The allocator hands out memory that kernels of this stream may still use.
        staging.free.record(self._streams.current_stream(self.device))
        return staging

    @staticmethod
    def _dma(to: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy on the current stream: one where both sides are one run of bytes, else one a layer."""
        if to.is_contiguous() and source.is_contiguous():
            to.copy_(source, non_blocking=True)
            return
        for layer_to, layer_source in zip(to, source, strict=True):
            layer_to.copy_(layer_source, non_blocking=True)

    def _check(
        self, pages: PagedLayers, units: Units, ids: torch.Tensor, chunk: torch.Tensor, first_layer: int
    ) -> None:
        if pages.device != self.device:
            raise KernelArgumentError(f"pages are on {pages.device}; this HostTransfer is for {self.device}")
        check_ids(pages, units, ids, "ids")
        check_chunk(pages, units, ids, chunk, first_layer, "chunk", _HOST)
        if self._buffers and units.unit_bytes > self._buffer_bytes:
            raise KernelArgumentError(
                f"a row has {units.unit_bytes} bytes; half of staging_bytes holds {self._buffer_bytes}: raise it"
            )


def copy_to_host_torch(
    pages: PagedLayers, ids: torch.Tensor, chunk: torch.Tensor, first_layer: int = 0, whole_pages: bool = False
) -> None:
    """The definition of copy_to_host, synchronous; on a CPU the rows go straight to `chunk`."""
    units = pages.page_units if whole_pages else pages.token_units
    rows = _byte_rows(chunk, units)
    there = rows if pages.device == _HOST else torch.empty(rows.shape, dtype=torch.uint8, device=pages.device)
    skipped = ids < 0
    if bool(skipped.any()):
        there[:, skipped] = 0
    (copies.gather_pages if whole_pages else copies.gather_tokens)(pages, ids, there, first_layer)
    if there is not rows:
        rows.copy_(there)


def copy_from_host_torch(
    pages: PagedLayers, ids: torch.Tensor, chunk: torch.Tensor, first_layer: int = 0, whole_pages: bool = False
) -> None:
    """The definition of copy_from_host, synchronous."""
    units = pages.page_units if whole_pages else pages.token_units
    rows = _byte_rows(chunk, units).to(pages.device)
    (copies.scatter_pages if whole_pages else copies.scatter_tokens)(pages, ids, rows, first_layer)


def _byte_rows(chunk: torch.Tensor, units: Units) -> torch.Tensor:
    """A chunk as bytes `[l, n, unit bytes]`."""
    num_layers, n = chunk.shape[:2]
    strides = (chunk.stride(0) * chunk.element_size(), units.unit_bytes, 1)
    return reinterpret(chunk, 1, (num_layers, n, units.unit_bytes), strides)


def on_device(device: torch.device) -> Any:
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


_DEVICE_POINTER = 3  # CU_POINTER_ATTRIBUTE_DEVICE_POINTER


def _device_address(rows: torch.Tensor, device: torch.device) -> int | None:
    """Where kernels of `device`, which must be the current one, find host memory; None where they cannot reach it.

    https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__UNIFIED.html: the driver knows what is pinned.
    """
    if device.type == "cpu":
        return rows.data_ptr()
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    found = ctypes.c_uint64()
    code = _driver().cuPointerGetAttribute(ctypes.byref(found), _DEVICE_POINTER, ctypes.c_uint64(rows.data_ptr()))
    return found.value or None if code == 0 else None
