"""Which adapter computed a request's KV: named by the content of its files, as vLLM's worker read them.

The scheduler half stamps a request with what lies in the adapter's folder when it arrives. The worker half learns what
is really loaded, where vLLM loads it, and loads or stores nothing for a request whose stamp is another. Files that are
replaced under a running engine, adapters that are evicted and read again, ids and names that are used twice: wherever
the two differ, that request goes on without the cache.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lmcache.connector.identity.surroundings import surroundings

if TYPE_CHECKING:
    from vllm.config import LoRAConfig
    from vllm.lora.request import LoRARequest

# What vLLM reads of an adapter: adapter_config.json and adapter_model.{safetensors,bin,pt}.
_FILES = "adapter_*"
# File systems keep times in ticks of up to this: a file that was changed less than this ago may change unseen.
_TICK_S = 2.0
# With several workers, steps after which every one of them has loaded an adapter that one of them has.
_SETTLED_STEPS = 3
_ORIGIN = "_lmcache_origin"  # attribute of vLLM's LoRAModel

Signature = tuple[tuple[str, int, int, int, int, int], ...]


class Adapter(msgspec.Struct, frozen=True):
    """The adapter of a request. number: vLLM's id of it. name: under which vLLM shares blocks.

    files: digest of what lay there when the request arrived. must_be_loaded: nothing is promised before a worker has
    it. reloaded: vLLM reads it again with every step of the request.
    """

    number: int
    name: str
    files: str
    must_be_loaded: bool = False
    reloaded: bool = False


class Stamp(msgspec.Struct, frozen=True):
    """What lay in a folder. signature: tells whether it has been touched since."""

    folder: str
    signature: Signature
    files: str


class AdapterFiles:
    """Stamps of adapters' folders; content is read again when anything about a file has changed."""

    def __init__(self) -> None:
        self._known: dict[Signature, str] = {}

    def known(self, folder: str) -> Stamp | None:
        """The stamp, if no file needs to be read for it."""
        signature = signature_of(folder)
        files = self._known.get(signature) if signature else None
        return Stamp(folder, signature, files) if signature and files else None

    def read(self, folder: str) -> Stamp | None:
        """The stamp; None for a folder that is not one, or that changes while it is read."""
        if stamp := self.known(folder):
            return stamp
        signature = signature_of(folder)
        if not signature:
            return None
        digest = hashlib.blake2b(digest_size=16)
        try:
            for name, size, *_ in signature:
                with (Path(folder) / name).open("rb") as file:
                    content = hashlib.file_digest(file, "blake2b").digest()
                digest.update(f"{name}\0{size}\0".encode() + content)
        except OSError:
            return None
        if signature_of(folder) != signature:
            return None
        if time.time_ns() - max(changed for *_, changed in signature) > _TICK_S * 1e9:
            self._known[signature] = digest.hexdigest()
        return Stamp(folder, signature, digest.hexdigest())


def signature_of(folder: str) -> Signature:
    """Name, device, inode, size and times of each file of an adapter; () where there is none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(Path(entry.path) for entry in entries if Path(entry.name).match(_FILES))
        stats = [(path.name, path.stat()) for path in found if path.is_file()]
    except OSError:
        return ()
    # The time of change comes last: nobody can set it.
    return tuple((name, s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def local_folder(lora_path: str) -> str | None:
    """Where vLLM reads the adapter from; None for what it takes for the name of a hub."""
    if os.path.isabs(lora_path):
        return lora_path
    if lora_path.startswith("~"):
        return str(Path(lora_path).expanduser())
    return str(Path(lora_path).absolute()) if Path(lora_path).exists() else None


def hub_folder(name: str) -> str | None:
    """Where an adapter of a hub lies on this host, without asking a network."""
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    # No such package, no such name, not there yet: vLLM may still fetch it.
    except (ImportError, OSError, ValueError):
        return None


def shared_name(request: LoRARequest) -> str:
    """The name under which vLLM's prefix cache shares blocks of an adapter, whatever is behind it."""
    return f"{request.lora_name}\0{request.lora_path}"


class Stamps:
    """The scheduler's side: stamps requests. Content is read on a thread of its own."""

    def __init__(self, config: LoRAConfig) -> None:
        self._config = surroundings(config)
        # vLLM keeps embeddings of images by the adapter's name, also where the adapter behind it has changed.
        self.images = not config.enable_tower_connector_lora
        self._files = AdapterFiles()
        self._reader = ThreadPoolExecutor(1, "lmcache-adapters")

    def ask(self, lora_path: str) -> Future[Stamp | None]:
        """The stamp of what lies there now, when it has been read; None where that cannot be known."""
        folder = local_folder(lora_path)
        stamp = self._files.known(folder) if folder else None
        if stamp is None:
            return self._reader.submit(self._read, folder, lora_path)
        done: Future[Stamp | None] = Future()
        done.set_result(stamp)
        return done

    def _read(self, folder: str | None, lora_path: str) -> Stamp | None:
        folder = folder or hub_folder(lora_path)
        return self._files.read(folder) if folder else None

    def adapter(self, request: LoRARequest, stamp: Stamp, *, must_be_loaded: bool) -> Adapter:
        # vLLM asks the network for the newest of a name, which need not be the one that lies here.
        by_name = local_folder(request.lora_path) is None
        return Adapter(
            request.lora_int_id,
            shared_name(request),
            stamp.files,
            must_be_loaded=must_be_loaded or by_name,
            reloaded=request.load_inplace,
        )

    def tag(self, request: LoRARequest, stamp: Stamp) -> str:
        """Everything of the adapter that changes KV."""
        return f"{stamp.files}/{self._config}/{request.is_3d_lora_weight}"

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)


class _Origin:
    """What an adapter in vLLM's memory was read from."""

    def __init__(self, stamp: Stamp | None) -> None:
        self._stamp = stamp
        self.first_step = 0

    @property
    def files(self) -> str | None:
        """Digest of the files; None once one of them was touched.

        On a CPU what vLLM has "loaded" may be the file itself, mapped into memory.
        """
        stamp = self._stamp
        return stamp.files if stamp and signature_of(stamp.folder) == stamp.signature else None


_managers: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_loads() -> None:
    """Have every adapter that this process loads carry what it was read from. To be called before the first load."""
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if hasattr(load, "lmcache_watches"):
        return
    files = AdapterFiles()

    def watched(self: Any, lora_request: Any) -> Any:
        _managers.add(self)
        folder = get_adapter_absolute_path(lora_request.lora_path)
        if folder != lora_request.lora_path:
            # vLLM would resolve the name again while loading, and could then find another folder.
            lora_request = msgspec.structs.replace(lora_request, lora_path=folder)
        before = files.read(folder)
        adapter = load(self, lora_request)
        after = files.read(folder)
        setattr(adapter, _ORIGIN, _Origin(after if before == after else None))
        return adapter

    watched.lmcache_watches = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = watched


class LoadedAdapters:
    """The worker's side: what vLLM has loaded, and what has computed under which name.

    config: vLLM's LoRAConfig object, by which its manager is told from another engine's in this process.
    """

    def __init__(self, config: object, *, several_workers: bool = False) -> None:
        self._config = config
        self._several = several_workers
        self._step = 0
        self._blind = False
        # Of each name, the last step at which each content computed; the two latest are all that is ever asked for.
        self._used: dict[str, dict[str | None, int]] = {}

    def begin_step(self, step: int, adapters: Sequence[tuple[str, int]]) -> None:
        """A step computes with these: name and vLLM's number of each."""
        self._step = step
        loaded = self._loaded() if adapters else {}
        for name, number in adapters:
            origin = _origin(loaded.get(number))
            if origin is not None and not origin.first_step:
                origin.first_step = step
            used = self._used.setdefault(name, {})
            content = origin.files if origin is not None else None
            used.pop(content, None)
            used[content] = step
            while len(used) > 2:
                used.pop(next(iter(used)))

    def admits(self, adapter: Adapter) -> bool:
        """Whether a lookup may promise KV of this adapter. Any thread."""
        loaded = self._loaded().get(adapter.number)
        if self._blind or loaded is None or adapter.reloaded:
            # Not there yet, or read again with the request: known when it is needed.
            return not self._blind and (loaded is not None or not adapter.must_be_loaded)
        return self._is(loaded, adapter)

    def loads(self, adapter: Adapter) -> bool:
        """Whether this very adapter is what vLLM computes with now."""
        loaded = self._loaded().get(adapter.number)
        if _origin(loaded) is None and not adapter.must_be_loaded:
            # Somebody else loads this engine's adapters. One request hears of it, the next ones are misses.
            self._blind = True
        return self._is(loaded, adapter)

    def stores(self, adapter: Adapter, oldest: float) -> bool:
        """Whether blocks that were begun in step ``oldest`` or later come from this adapter."""
        loaded = self._loaded().get(adapter.number)
        origin = _origin(loaded)
        if origin is None or not self._is(loaded, adapter):
            return False
        if self._several and self._step < origin.first_step + _SETTLED_STEPS:
            return False  # another worker may load it later, when its files may be others; later on they are looked at
        others = (step for content, step in self._used.get(adapter.name, {}).items() if content != adapter.files)
        return max(others, default=-math.inf) < oldest

    def _loaded(self) -> dict[int, Any]:
        for manager in list(_managers):
            if manager.lora_config is self._config:
                try:
                    return dict(manager._adapter_manager.list_adapters())
                except RuntimeError:  # it changes just now, and this is the lookups' thread
                    return {}
        return {}

    @staticmethod
    def _is(loaded: object, adapter: Adapter) -> bool:
        origin = _origin(loaded)
        return origin is not None and origin.files == adapter.files


def _origin(loaded: object) -> _Origin | None:
    origin: _Origin | None = getattr(loaded, _ORIGIN, None)
    return origin
