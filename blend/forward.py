"""Parts of a forward pass that computes some tokens (rows) of a prompt, over KV that holds all T of its tokens.

hidden [N] --norm, projections, rope--> q, k, v [N]       keys, values [T]
                                           └─ k, v ------> rows .. are overwritten in place
                                              q ---------> attend, each up to its own position
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Hashable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext, suppress
from time import perf_counter

import torch

from lmcache.blend.models.base import BlendModel
from lmcache.blend.reuse import ReusedKV
from lmcache.errors import BlendError

KV = tuple[torch.Tensor, torch.Tensor]


class Stopwatch:
    """Seconds by stage, of the host: on a GPU, what it takes to launch the work, except where the host must wait."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += perf_counter() - start


def use_one_core() -> None:
    """Keeps torch's operations in the calling thread to one core; other threads keep theirs.

    Otherwise OpenMP starts a second team beside that of the thread that computes; as soon as there are more threads
    than cores its barriers sleep instead of spin, and small operations take 1.5 times as long (2 cores, 334 rows of
    SmolLM2). torch.set_num_threads would change every thread that is started later.
    """
    torch.get_num_threads()  # torch sets a thread's number once, on its first use
    with suppress(AttributeError):  # a torch without OpenMP
        ctypes.CDLL(None).omp_set_num_threads(1)


_FORGOTTEN: Future[KV] = Future()


class LayerFeed:
    """Reused KV, fetched by another thread one layer ahead of the caller; fetched layers are kept until ``forget``.

    On a GPU that thread uses the stream that is current when this is made, in the order in which layers are wanted.
    """

    def __init__(self, model: BlendModel, reused: ReusedKV, tokens: int, executor: Executor) -> None:
        self._reused, self._executor = reused, executor
        self._shape = (tokens, model.kv.heads, model.kv.size)
        self._like, self._num_layers = model.kv, model.num_layers
        self._futures: list[Future[KV]] = []
        on_gpu = model.kv.device.type == "cuda"
        self._stream = torch.cuda.current_stream(model.kv.device) if on_gpu else None

    def layer(self, index: int) -> KV:
        while len(self._futures) < min(index + 2, self._num_layers):
            self._futures.append(self._executor.submit(self._fetch, len(self._futures)))
        return self._futures[index].result()

    def forget(self, index: int) -> None:
        """That layer is not asked for again."""
        self._futures[index] = _FORGOTTEN

    def _fetch(self, index: int) -> KV:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            sides = self._reused.layer(index)
        for name, side in zip(("keys", "values"), sides, strict=True):
            if (side.shape, side.dtype, side.device) != (self._shape, self._like.dtype, self._like.device):
                raise BlendError(
                    f"{name} of layer {index} are {side.dtype} {tuple(side.shape)} on {side.device}; the model's are "
                    f"{self._like.dtype} {self._shape} on {self._like.device}"
                )
        return sides


class Rotation:
    """The model's ropes at a prompt's positions, in the model's dtype."""

    def __init__(self, model: BlendModel, length: int) -> None:
        self._model, self._length = model, length
        self._tables: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._positions: torch.Tensor | None = None
        self._picked: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`x` `[N, H, D]` turned to `positions` `[N]`."""
        name = self._model.attention[layer].rope
        if name not in self._tables:
            table = self._model.table(layer, self._length)
            cos, sin = (
                (table.cos_sin[: self._length] * table.attention_factor).to(x.dtype)[:, :, None].unbind(1)
            )  # [P, 1, D / 2]
            self._tables[name] = (cos, sin)
        if self._positions is not positions:  # mostly those of the layer before
            self._positions, self._picked = positions, {}
        if name not in self._picked:
            cos, sin = self._tables[name]
            self._picked[name] = (cos[positions], sin[positions])
        cos, sin = self._picked[name]
        low, high = x.chunk(2, -1)
        out = torch.empty_like(x)
        out_low, out_high = out.chunk(2, -1)
        torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
        torch.mul(high, cos, out=out_high).addcmul_(low, sin)
        return out
