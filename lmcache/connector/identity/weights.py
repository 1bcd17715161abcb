"""Which weights this worker computes with: named by what they hold, and watched while the engine runs.

    KV caches registered ─ settle: every tensor of the model and of its draft model is read ─ name
    each step            ─ look: a word or more of each tensor, and whether some, in turn, are the same objects still
    a call of vLLM's that is no step (apply_model, reload_weights, wake_up, ...) ─ doubt ─ settle before the next step

The name is a digest of content alone, so equal weights have one name on every host, however they were loaded, and
weights that were changed in place have another. docs/identity.md says what a look can miss.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import xxhash

from lmcache import metrics
from lmcache.connector.identity.packed_weights import packed_digest
from lmcache.kernels.digest import WordProbe, content_digest, flat_words

logger = logging.getLogger(__name__)

# Of an attention layer: what it holds besides weights.
NOT_WEIGHTS = frozenset({"kv_cache"})
# Where vLLM's CPU linear layers keep weights that they have packed for the processor.
CPU_LINEAR = "cpu_linear"
# A look must cost a five-hundredth of a step at most, on a processor whose caches are full of other things.
TURNS = 64  # looks in which every entry is asked once whether it is still the same object, in the same place
WORDS = 256  # compared in every look, but at least one of each tensor
DEPTH = 3  # of objects behind a module (quantisation method, scheme, kernel) among which packed weights are looked for


class Entry(NamedTuple):
    """Something that a model computes with: ``holder[key]``, found under ``label``."""

    label: str
    holder: Any
    key: str
    value: Any


class Weights:
    """The weights behind a worker's attention layers. Thread-safe; ``settle`` is for the thread that runs the model.

    layers: vLLM's static_forward_context, by name; looked at again whenever the weights are named.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module]) -> None:
        self._layers = layers
        self._known = dict(layers)
        self._models = models_of(layers)
        self._lock = threading.Lock()
        self._doubts = 1
        self._settled = 0
        self._looks = 0
        self._entries: list[Entry] = []
        # Where each tensor lies, and what torch counts of changes in place (not through .data, not of all tensors).
        self._places: list[tuple[torch.Tensor, int, int | None]] = []
        self._probes: list[WordProbe] = []
        self.name: str | None = None
        """A hexadecimal digest; None where the weights cannot be read: then nothing is loaded and nothing stored."""
        self.settle()

    @property
    def in_doubt(self) -> bool:
        """Whether something was called since the weights were named that may have changed them."""
        return self._settled != self._doubts

    @property
    def on_host(self) -> bool:
        """Whether everything that was read lies in host memory, where a look waits for nothing."""
        return all(probe.on_host for probe in self._probes)

    @property
    def token(self) -> str:
        """The name, and the number of the doubt that it settled: equal tokens mean that there was no doubt between."""
        return f"{self.name}#{self._settled}"

    def doubt(self) -> None:
        """The weights may be others now. What was kept to look at them is let go of, for they may be freed."""
        with self._lock:
            self._doubts += 1
            self._let_go()

    def look(self) -> None:
        """Look whether the weights are still what they are named after: at once on a CPU, queued on a GPU's stream."""
        with self._lock:
            self._looks += 1
            turn = self._looks % TURNS
            same = all(entry.holder.get(entry.key) is entry.value for entry in self._entries[turn::TURNS])
            same = same and all(
                tensor.data_ptr() == place and (version is None or tensor._version == version)
                for tensor, place, version in self._places[turn::TURNS]
            )
            for probe in self._probes:
                probe.look()
        if not same:
            self.doubt()

    def hold(self) -> bool:
        """Whether the weights are still what they are named after, as far as looks have seen. Waits for the last look,
        where it runs on a device, so ask it after a copy that was waited for anyway."""
        if not self.in_doubt and any(probe.changed for probe in self._probes):
            self.doubt()
        return not self.in_doubt

    def noticed(self) -> bool:
        """``not hold()``, without waiting for a look that still runs."""
        if not self.in_doubt and any(probe.seen_changed for probe in self._probes):
            self.doubt()
        return self.in_doubt

    def settle(self, renamed: Callable[[str | None], None] = lambda name: None) -> None:
        """Read everything and name it. renamed: called where the name is another now, while all is still in doubt."""
        with self._lock:
            before, doubts = self.name, self._doubts
            try:
                self._check_layers()
                self._entries = list(entries_of(self._models, self._known))
                self.name = _name(self._entries)
                self._watch()
            # Whatever a model holds that cannot be read: its KV has no name then, and is left alone.
            except Exception:
                metrics.WEIGHTS_UNKNOWN.inc()
                logger.exception("lmcache: it cannot be known which weights the model has: nothing is cached")
                self.name = None
                self._let_go()
        if self.name != before:
            renamed(self.name)
        self._settled = doubts

    def _watch(self) -> None:
        found = {id(tensor): tensor for entry in self._entries for tensor in tensors_in(entry.value)}
        tensors = [tensor for tensor in found.values() if tensor.numel()]
        self._places = [(each, each.data_ptr(), None if each.is_inference() else each._version) for each in tensors]
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor.detach())
        self._probes = [WordProbe(each, words=max(1, WORDS // len(each))) for each in by_device.values()]

    def _let_go(self) -> None:
        self._entries, self._places, self._probes = [], [], []

    def _check_layers(self) -> None:
        if any(self._layers.get(name) is not layer for name, layer in self._known.items()):
            # The model was loaded anew. Which objects hang together is only visible before vLLM has frozen them.
            self._known, self._models = dict(self._layers), models_of(self._layers)


def models_of(layers: Mapping[str, torch.nn.Module]) -> list[torch.nn.Module]:
    """The outermost modules that hold these layers: the model, and its draft model. In the order of the layers.

    vLLM hands its connectors the layers that keep KV, and nothing that leads from them to the model. To be called
    before vLLM hides all objects from the garbage collector (gc.freeze), which it does once it has warmed up.
    Raises ValueError for a layer that no module holds.
    """
    parents: dict[int, torch.nn.Module] = {}
    for candidate in gc.get_objects():
        # isinstance would run other people's __class__.
        if issubclass(type(candidate), torch.nn.Module):
            for child in candidate.__dict__.get("_modules", {}).values():
                if child is not None:
                    parents[id(child)] = candidate
    models: dict[int, torch.nn.Module] = {}
    for name, layer in layers.items():
        top, seen = layer, {id(layer)}
        while (parent := parents.get(id(top))) is not None and id(parent) not in seen:
            top = parent
            seen.add(id(top))
        if top is layer:
            raise ValueError(f"no model in this process holds layer {name}")
        models[id(top)] = top
    return list(models.values())


def entries_of(models: Iterable[torch.nn.Module], layers: Mapping[str, torch.nn.Module]) -> Iterator[Entry]:
    """Everything that the models compute with: parameters, buffers, weights that were packed for the processor, and
    what attention layers derive from weights (scales, MLA's absorbed projections)."""
    attention = {id(layer) for layer in layers.values()}
    for number, model in enumerate(models):
        for path, module in model.named_modules():
            label = f"{number}.{path}"
            for holder in (module._parameters, module._buffers):
                for key, value in holder.items():
                    if value is not None:
                        yield Entry(f"{label}.{key}", holder, key, value)
            own = vars(module)
            if id(module) in attention:
                for key, value in own.items():
                    if isinstance(value, torch.Tensor | float) and key not in NOT_WEIGHTS:
                        yield Entry(f"{label}.{key}", own, key, value)
            if CPU_LINEAR in own:
                yield Entry(f"{label}.{CPU_LINEAR}", own, CPU_LINEAR, own[CPU_LINEAR])
            for key, handler in _handlers(module, DEPTH):
                yield Entry(f"{label}.{key}", {key: handler}, key, handler)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that an entry's value is made of."""
    if isinstance(value, torch.Tensor):
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is None:
            yield value
        else:  # a subclass that wraps others, such as torchao's
            for name in inner()[0]:
                yield from tensors_in(getattr(value, name))
    elif callable(value):
        for cell in _closure(value):
            if isinstance(cell, torch.Tensor):
                yield cell


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """A tensor's dtype, shape and bytes, digested. On a CPU in the order of its memory, where it is dense."""
    flat = flat_words(tensor) if tensor.device.type == "cpu" else None
    shape = f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride() if flat is not None else ()}".encode()
    if tensor.is_meta or not tensor.numel():
        return shape
    if tensor.device.type != "cpu":
        return shape + content_digest(tensor).cpu().numpy().tobytes()
    whole = flat is not None and 4 * len(flat) == tensor.numel() * tensor.element_size()
    data = flat if whole and flat is not None else tensor.contiguous().view(-1).view(torch.uint8)
    return shape + xxhash.xxh3_128_digest(data.numpy().data)


def _name(entries: Iterable[Entry]) -> str:
    # Tied weights are read once.
    known: dict[tuple[Any, ...], bytes] = {}

    def content(tensor: torch.Tensor) -> bytes:
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in known:
            known[key] = tensor_digest(tensor.detach())
        return known[key]

    digest = hashlib.blake2b(digest_size=16, person=b"lmcache-weights")
    for entry in sorted(entries, key=lambda each: each.label):
        parts = [entry.label.encode(), *map(content, tensors_in(entry.value))]
        if isinstance(entry.value, float):
            parts.append(entry.value.hex().encode())
        elif not isinstance(entry.value, torch.Tensor):
            inner = _closure(entry.value) if callable(entry.value) else [entry.value]
            parts += [found for each in inner if (found := packed_digest(each)) is not None]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _closure(function: Callable[..., Any]) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    defaults = getattr(function, "__defaults__", None) or ()
    return [cell.cell_contents for cell in cells] + list(defaults)


def _handlers(owner: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Packed weights behind a module's helpers, by their path."""
    for key, value in list(getattr(owner, "__dict__", {}).items()):
        if packed_digest(value) is not None:
            yield key, value
        elif depth and type(value).__module__.startswith("vllm.") and not isinstance(value, torch.nn.Module):
            for path, found in _handlers(value, depth - 1):
                yield f"{key}.{path}", found
