"""Memory that an op allocates itself: full of NaN, and with red zones around it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

RED_ZONE = 256  # bytes on each side; a multiple of what alignment is promised


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """In this scope torch.empty gives memory with all bits set (NaN, or -1), and what is around it must stay so."""
    memories: list[torch.Tensor] = []

    def empty(*size: Any, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
        shape = size[0] if size and isinstance(size[0], (tuple, torch.Size)) else size
        nbytes = math.prod(shape) * dtype.itemsize
        memory = torch.full((nbytes + 2 * RED_ZONE,), 0xFF, dtype=torch.uint8, device=device)
        memories.append(memory)
        return memory[RED_ZONE : RED_ZONE + nbytes].view(dtype).view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    for memory in memories:
        assert bool((memory[:RED_ZONE] == 0xFF).all()), "written in front of an output"
        assert bool((memory[-RED_ZONE:] == 0xFF).all()), "written behind an output"
