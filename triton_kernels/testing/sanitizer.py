"""Watches interpreted launches for what a GPU would do without a word, and counts the bytes that they move.

    with sanitized(out, *pages.layers) as watched:     # memory that kernels reach through addresses in a table
        gather_pages(pages, ids, out)                  # memory that is an argument of a launch is known anyway
    watched.loads.sectors, watched.stores.bytes, watched.programs

Raises Violation for

    out of bounds       an access to a byte of no element of any of these tensors; gaps between strides count
    a race              one program writes what another one writes or reads (atomic operations excepted), or the lanes
                        of one store write different values to one place
    an overflow         of an addition, subtraction or multiplication of integers of less than 64 bits
    a broken promise    tl.multiple_of of something that is not
    tl.device_assert    with any element false

Races are found at the end of a launch, the rest where it happens. Works in interpret mode only (conftest.py), on
triton 3.6.0 to 3.9.0, and makes a launch a few times slower. Not thread-safe, as the interpreter is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from lmcache.kernels.testing.interpreter import CorrectedBuilder, install

Array = np.ndarray[Any, Any]
SECTOR = 32  # bytes; what a GPU's memory moves at least


class Violation(AssertionError):
    """A kernel did what it must not."""


@dataclasses.dataclass
class Traffic:
    """bytes: of all live lanes. sectors: of 32 bytes, each once an access of a program; what DRAM or L2 moves."""

    bytes: int = 0
    sectors: int = 0

    def add(self, addresses: Array, size: int) -> None:
        ends = np.concatenate([addresses, addresses + np.uint64(size - 1)])
        self.bytes += addresses.size * size
        self.sectors += int(np.unique(ends // np.uint64(SECTOR)).size)


class _Memory:
    """Which bytes are elements of a tensor: a map of each storage, a truth value a byte."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], torch.Tensor] = {}
        self._kept: list[torch.Tensor] = []  # so that no other tensor gets an address that is allowed

    def allow(self, tensor: torch.Tensor) -> None:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        if tensor.device.type != "cpu":
            raise ValueError(f"a tensor on {tensor.device} cannot be watched; only those of the interpreter's CPU can")
        bytes_of = self._maps.setdefault(
            (storage.data_ptr(), storage.nbytes()), torch.zeros(storage.nbytes(), dtype=torch.bool)
        )
        steps = (*(stride * size for stride in tensor.stride()), 1)
        bytes_of.as_strided((*tensor.shape, size), steps, tensor.storage_offset() * size).fill_(True)
        self._kept.append(tensor)

    def forbidden(self, addresses: Array, size: int) -> Array:
        """Which of `addresses` lead to `size` bytes that are not all allowed."""
        bad = np.ones(addresses.size, dtype=bool)
        for (start, length), bytes_of in self._maps.items():
            inside = (addresses >= start) & (addresses + np.uint64(size) <= start + length)
            offsets = (addresses[inside] - np.uint64(start)).astype(np.int64)
            allowed = bytes_of.numpy()
            bad[inside] &= ~np.all([allowed[offsets + i] for i in range(size)], axis=0)
        return bad


@dataclasses.dataclass
class _Access:
    program: int
    is_store: bool
    addresses: Array
    size: int

    def cut(self, unit: int) -> Array:
        """Numbers of the units of `unit` bytes that it touches."""
        first = self.addresses // np.uint64(unit)
        return np.concatenate([first + np.uint64(i) for i in range(self.size // unit)])


class Sanitizer:
    """What `sanitized` yields: what all launches in its scope have moved."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.loads, self.stores, self.programs = Traffic(), Traffic(), 0
        self.memory = _Memory()
        for tensor in tensors:
            self.memory.allow(tensor)
        self._log: list[_Access] = []

    def access(self, builder: Any, kind: str, pointers: Any, mask: Array, values: Array | None = None) -> None:
        """Look at what a program is about to do; kind: load, store or atomic."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        live = np.broadcast_to(np.asarray(mask), pointers.data.shape).reshape(-1)
        addresses = pointers.data.reshape(-1)[live]
        if addresses.size == 0:
            return
        where = f"{kind} of {size} bytes by program {builder.grid_idx}"
        bad = self.memory.forbidden(addresses, size)
        if bad.any():
            raise Violation(
                f"out of bounds: {where}: {int(bad.sum())} of {bad.size} lanes, first {addresses[bad][0]:#x}"
            )
        if (addresses % np.uint64(size)).any():
            raise Violation(f"misaligned: {where}")
        (self.loads if kind == "load" else self.stores).add(addresses, size)
        if kind == "atomic":
            return
        if values is not None:
            _check_lanes(addresses, np.broadcast_to(values, pointers.data.shape).reshape(-1)[live], where)
        self._log.append(_Access(self.programs, kind == "store", addresses, size))

    def launched(self) -> None:
        """Look for races in the launch that has ended."""
        log, self._log = self._log, []
        if not any(access.is_store for access in log):
            return
        unit = int(np.gcd.reduce([access.size for access in log]))
        touched = np.concatenate([access.cut(unit) for access in log])
        repeats = [access.addresses.size * (access.size // unit) for access in log]
        programs = np.repeat([access.program for access in log], repeats)
        stored = np.repeat([access.is_store for access in log], repeats)
        order = np.argsort(touched[stored], kind="stable")
        places, writers = touched[stored][order], programs[stored][order]
        both = (places[1:] == places[:-1]) & (writers[1:] != writers[:-1])
        if both.any():
            at = int(np.flatnonzero(both)[0])
            raise Violation(
                f"race: programs number {writers[at]} and {writers[at + 1]} write {int(places[at]) * unit:#x}, "
                f"{int(both.sum())} places in all"
            )
        read, readers = touched[~stored], programs[~stored]
        at = np.minimum(np.searchsorted(places, read), len(places) - 1)
        other = (places[at] == read) & (writers[at] != readers)
        if other.any():
            i = int(np.flatnonzero(other)[0])
            raise Violation(
                f"race: program number {readers[i]} reads {int(read[i]) * unit:#x}, which program number "
                f"{writers[at[i]]} writes, {int(other.sum())} places in all"
            )


def _check_lanes(addresses: Array, values: Array, where: str) -> None:
    unique, first, lane = np.unique(addresses, return_index=True, return_inverse=True)
    if unique.size == addresses.size:
        return
    words = np.ascontiguousarray(values).view(f"u{values.itemsize}")
    if (words != words[first][lane]).any():
        raise Violation(f"race: {where}: lanes write different values to one place")


def _check_multiple_of(tensor: Any, values: Any) -> None:
    """What the compiler takes it for: the first of each run of neighbours along an axis is a multiple."""
    if not isinstance(tensor, tl.core.tensor):
        return
    data, dtype = tensor.handle.data, tensor.dtype
    step = max(1, dtype.element_ty.primitive_bitwidth // 8) if dtype.is_ptr() else 1
    for axis, value in enumerate(values if isinstance(values, (list, tuple)) else [values]):
        divisor = int(getattr(value, "value", value))
        rows = np.moveaxis(data, axis, 0).astype(np.int64)
        starts = np.ones(rows.shape, dtype=bool)
        starts[1:] = np.diff(rows, axis=0) != step
        if (rows[starts] % divisor).any():
            wrong = rows[starts][rows[starts] % divisor != 0][0]
            raise Violation(f"broken promise: tl.multiple_of says {divisor}, but there is {wrong}")


class _WatchedBuilder(CorrectedBuilder):
    sanitizer: Sanitizer

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.sanitizer.programs += 1

    def create_masked_load(self, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        self.sanitizer.access(self, "load", ptrs, mask.data)
        return super().create_masked_load(ptrs, mask, *args, **kwargs)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        self.sanitizer.access(self, "store", ptrs, mask.data, value.data)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *args: Any) -> Any:
        self.sanitizer.access(self, "atomic", ptr, mask.data)
        return super().create_atomic_rmw(op, ptr, val, mask, *args)

    def create_atomic_cas(self, ptr: Any, *args: Any) -> Any:
        self.sanitizer.access(self, "atomic", ptr, np.asarray(True))
        return super().create_atomic_cas(ptr, *args)


def _tensors(arguments: Iterable[object]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _unwrap(error: BaseException) -> NoReturn:
    """Raise what a kernel raised in the place of the interpreter's error around it."""
    inner = error
    while isinstance(inner, InterpreterError) and inner.__cause__ is not None:
        inner = inner.__cause__
    if isinstance(inner, AssertionError):
        raise Violation(str(inner)) from error
    raise error


def _watched_launch(launch: Callable[..., None], sanitizer: Sanitizer) -> Callable[..., None]:
    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        for tensor in _tensors([*args, *kwargs.values()]):
            sanitizer.memory.allow(tensor)
        try:
            launch(executor, *args, **kwargs)
        except InterpreterError as error:
            _unwrap(error)
        sanitizer.launched()

    return call


def _watched_language(patch: Callable[..., None]) -> Callable[..., None]:
    def call(language: Any, scope: Any) -> None:
        patch(language, scope)
        promise = language.multiple_of

        def multiple_of(tensor: Any, values: Any) -> Any:
            _check_multiple_of(tensor, values)
            return promise(tensor, values)

        scope.set_attr(language, "multiple_of", multiple_of)

    return call


@contextlib.contextmanager
def sanitized(*tensors: torch.Tensor, overflow: bool = True) -> Iterator[Sanitizer]:
    """Watch every interpreted launch in this scope. `overflow=False` for kernels that wrap around on purpose."""
    install()
    sanitizer, builder = Sanitizer(tensors), interpreter.interpreter_builder
    options, launch, patch = builder.options, interpreter.GridExecutor.__call__, interpreter._patch_lang_core
    builder.__class__ = _WatchedBuilder
    builder.sanitizer = sanitizer
    builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=overflow)
    interpreter.GridExecutor.__call__ = _watched_launch(launch, sanitizer)
    interpreter._patch_lang_core = _watched_language(patch)
    try:
        yield sanitizer
    finally:
        interpreter.GridExecutor.__call__, interpreter._patch_lang_core = launch, patch
        builder.__class__, builder.options = CorrectedBuilder, options
        del builder.sanitizer
