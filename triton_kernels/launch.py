"""When and how a Triton kernel runs: triton is imported by the first launch, never by `import lmcache.kernels`."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

# Triton's interpreter patches triton.language globally and has one global grid index, so it takes one launch at a time.
_INTERPRETER_LOCK = threading.Lock()


def interpreting() -> bool:
    """Whether Triton's own switch, TRITON_INTERPRET=1, asks for kernels to be run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "on", "true", "yes", "y"}


def runs_kernel(device: torch.device) -> bool:
    """Whether tensors on `device` go through the Triton kernel rather than through the host copy."""
    return device.type != "cpu" or interpreting()


class LazyKernel:
    """A function that becomes a `@triton.jit` kernel when it is first launched.

    Its module names triton.language `tl` under TYPE_CHECKING only; the real module is put there at that moment.
    """

    def __init__(self, fn: Callable[..., None], options: dict[str, Any]) -> None:
        self._fn = fn
        self._options = options
        self._jitted: Any = None

    @property
    def jitted(self) -> Any:
        """The triton JITFunction (an InterpretedFunction under the interpreter)."""
        if self._jitted is None:
            import triton

            _prepare(self._fn.__module__)
            self._jitted = triton.jit(self._fn, **self._options)
        return self._jitted

    def launch(self, grid: tuple[int, ...], device: torch.device, *args: object, **options: object) -> None:
        """Queue the kernel on `device`'s current stream. An empty grid is nothing to do."""
        if 0 in grid:
            return
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if interpreting():
                stack.enter_context(_INTERPRETER_LOCK)
            self.jitted[grid](*args, **options)


class DeviceFunction:
    """A function that the kernels of its module, and of modules that import it, call.

    It becomes a `@triton.jit` function when the first of these kernels is launched.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any) -> Any:
        raise TypeError(f"{self.fn.__name__} runs inside a kernel only")


device_function = DeviceFunction  # as a decorator


def _prepare(module: str) -> None:
    """Give a module triton's language, and jit the device functions that it names."""
    import triton
    import triton.language

    names = sys.modules[module].__dict__
    names["tl"] = triton.language
    for name, value in list(names.items()):
        if isinstance(value, DeviceFunction):
            home = value.fn.__module__
            if home != module:
                _prepare(home)
            names[name] = triton.jit(value.fn) if home == module else sys.modules[home].__dict__[name]


def lazy_jit(**options: Any) -> Callable[[Callable[..., None]], LazyKernel]:
    """`triton.jit(**options)`, later."""
    return lambda fn: LazyKernel(fn, options)
