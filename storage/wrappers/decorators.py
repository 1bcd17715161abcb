"""Backends around a backend: metered, slow, faulty, audited.

{type: metered, inner: {type: latency, fixed_s: 0.002, inner: {type: disk, path: ...}}}
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import xxhash
from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ConfigError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.files.regular_files import open_regular
from lmcache.storage.registry import build_backend
from lmcache.storage.selection import Selection

logger = logging.getLogger(__name__)

T = TypeVar("T")
SEALS_PER_KEY = 8
Operation = Literal["sizes", "contains", "get", "put", "remove", "clear"]


class WrapperConfig(Config):
    """What every wrapper takes."""

    inner: dict[str, Any] = Field(description="the backend inside: {type: disk, ...}")


class Wrapper(StorageBackend):
    """Passes every call on; a subclass says what happens around it in ``_around``."""

    inner: StorageBackend

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        """``call()``, and what this wrapper is for. nbytes: of the payload that is to be read or written."""
        raise NotImplementedError

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        return self._around("sizes", keys, 0, lambda: self.inner.sizes(keys))

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        return self._around("contains", keys, 0, lambda: self.inner.contains(keys))

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        return self._around("get", keys, sum(b.nbytes for b in into), lambda: self.inner.get(keys, into))

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return self._around("put", keys, sum(b.nbytes for b in buffers), lambda: self.inner.put(keys, buffers))

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return self._around("remove", keys, 0, lambda: self.inner.remove(keys))

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self._around("clear", (), 0, lambda: self.inner.clear(fingerprint))

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        return self._around("clear", (), 0, lambda: self.inner.clear_tenant(tenant, fingerprint))

    def keys(self) -> list[ChunkKey] | None:
        return self.inner.keys()

    def close(self) -> None:
        self.inner.close()


class MeteredConfig(WrapperConfig):
    """Options of ``{type: metered}``."""

    label: str | None = Field(None, description="name in the metrics; null: that of the backend inside")


class Metered(Wrapper):
    """Histograms of the duration and the bytes of every call, and a count of those that raise."""

    name: ClassVar[str] = "metered"
    Config = MeteredConfig

    def __init__(self, config: MeteredConfig) -> None:
        self.inner = build_backend(config.inner, "metered.inner")
        self._label = config.label or self.inner.name

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        count = super().get(keys, into)
        self._moved("get", sum(buffer.nbytes for buffer in into[:count]))
        return count

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        count = super().put(keys, buffers)
        self._moved("put", sum(buffer.nbytes for buffer in buffers))
        return count

    def _moved(self, operation: Operation, nbytes: int) -> None:
        metrics.BACKEND_BYTES.labels(self._label, operation).observe(nbytes)

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        begun = time.perf_counter()
        try:
            return call()
        except BaseException:
            metrics.BACKEND_ERRORS.labels(self._label, operation).inc()
            raise
        finally:
            metrics.BACKEND_SECONDS.labels(self._label, operation).observe(time.perf_counter() - begun)


class LatencyConfig(WrapperConfig):
    """Options of ``{type: latency}``."""

    fixed_s: float = Field(0.0, ge=0, description="seconds that every call takes longer")
    bytes_per_s: ByteSize | None = Field(None, gt=0, description="rate of payload bytes, as 2GiB; null: no limit")
    jitter: float = Field(0.0, ge=0, le=1, description="share by which a delay varies, up or down")
    seed: int = Field(0, description="of the jitter")


class Latency(Wrapper):
    """A place that is further away. Calls wait side by side, so the rate is that of each, not of all together."""

    name: ClassVar[str] = "latency"
    Config = LatencyConfig

    def __init__(self, config: LatencyConfig) -> None:
        self._config = config
        self._dice = _Dice(config.seed)
        self._closed = threading.Event()
        self.inner = build_backend(config.inner, "latency.inner")

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        delay = self._config.fixed_s
        if self._config.bytes_per_s is not None:
            delay += nbytes / self._config.bytes_per_s
        delay *= 1 + self._config.jitter * (2 * self._dice.roll() - 1)
        if delay > 0:
            self._closed.wait(delay)
        return call()


class FaultsConfig(WrapperConfig):
    """Options of ``{type: faults}``. Each rate is a probability per call, 0 to 1."""

    operations: tuple[Operation, ...] = Field(
        ("sizes", "contains", "get", "put", "remove", "clear"), description="calls that may go wrong"
    )
    error_rate: float = Field(0.0, ge=0, le=1, description="calls that raise StorageError, before anything is done")
    hang_rate: float = Field(0.0, ge=0, le=1, description="calls that hang for hang_s and then go on")
    hang_s: float = Field(5.0, ge=0, le=600, description="seconds of a hang; close() ends it")
    corrupt_rate: float = Field(0.0, ge=0, le=1, description="reads of which one bit of one payload is wrong")
    short_rate: float = Field(0.0, ge=0, le=1, description="reads of which one payload comes only half")
    seed: int = Field(0, description="of all dice")


class Faults(Wrapper):
    """A place that fails. Wrong payloads are handed on as right: what is around this must find them."""

    name: ClassVar[str] = "faults"
    Config = FaultsConfig

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self._dice = _Dice(config.seed)
        self._closed = threading.Event()
        self.inner = build_backend(config.inner, "faults.inner")

    def close(self) -> None:
        self._closed.set()
        super().close()

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        affected = "get" in self._config.operations and len(into) > 0
        short = affected and self._dice.roll() < self._config.short_rate
        corrupt = affected and self._dice.roll() < self._config.corrupt_rate
        victim = into[int(self._dice.roll() * len(into))] if short or corrupt else None
        rest = bytes(victim.view[victim.nbytes // 2 :]) if victim is not None and short else b""
        count = super().get(keys, into)
        if victim is not None:
            view = victim.view
            if short:
                view[victim.nbytes // 2 :] = rest  # what was there before
            if corrupt:
                view[int(self._dice.roll() * victim.nbytes)] ^= 1 << int(self._dice.roll() * 8)
        return count

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        if operation in self._config.operations:
            if self._dice.roll() < self._config.hang_rate:
                self._closed.wait(self._config.hang_s)
            if self._dice.roll() < self._config.error_rate:
                raise StorageError(f"{operation}: an injected fault")
        return call()


class AuditConfig(WrapperConfig):
    """Options of ``{type: audit}``."""

    log: Path | None = Field(None, description="JSONL file to which each call is appended; null: none")
    entries: int = Field(1_000_000, ge=1, description="chunks whose checksums are kept, 100 to 200 bytes each")


class Audit(Wrapper):
    """Remembers a checksum of every payload put, and compares what comes back. StorageError when it is another.

    Chunks that others put, or that were put before the start, are not checked.
    """

    name: ClassVar[str] = "audit"
    Config = AuditConfig

    def __init__(self, config: AuditConfig) -> None:
        self._entries = config.entries
        # More than one per key where it was put again with other bytes: which of them is held is the backend's choice.
        self._known: dict[ChunkKey, tuple[tuple[int, int], ...]] = {}
        self._lock = threading.Lock()
        self._log: int | None = None
        self._log_lock = threading.Lock()
        self.inner = build_backend(config.inner, "audit.inner")
        if config.log is not None:
            try:
                self._log, _ = open_regular(str(config.log.expanduser()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            except OSError as error:
                self.inner.close()
                raise ConfigError(f"audit: cannot write {config.log}: {error}") from error

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        sizes = super().sizes(keys)
        for key, size in zip(keys, sizes, strict=False):
            self._check(key, size, None)
        return sizes

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        count = super().get(keys, into)
        for key, buffer in zip(keys[:count], into, strict=False):
            self._check(key, buffer.nbytes, xxhash.xxh3_128_intdigest(buffer.view))
        return count

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        for key, buffer in zip(keys, buffers, strict=True):
            seal = (buffer.nbytes, xxhash.xxh3_128_intdigest(buffer.view))
            with self._lock:
                # Before it can be read. Of many, the first and the latest are those that can be held.
                seals = self._known.pop(key, ())
                self._known[key] = seals if seal in seals else (*seals[:SEALS_PER_KEY], seal)
                if len(self._known) > self._entries:
                    del self._known[next(iter(self._known))]
        return super().put(keys, buffers)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        count = super().remove(keys)
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
        return count

    def clear(self, fingerprint: bytes | None = None) -> int:
        count = super().clear(fingerprint)
        with self._lock:
            self._known = {k: v for k, v in self._known.items() if fingerprint not in (None, k.fingerprint)}
        return count

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        count = super().clear_tenant(tenant, fingerprint)
        gone = Selection(fingerprint, tenant).matches
        with self._lock:
            self._known = {k: v for k, v in self._known.items() if not gone(k)}
        return count

    def close(self) -> None:
        super().close()
        with self._log_lock:
            log, self._log = self._log, None
            if log is not None:
                os.close(log)

    def _check(self, key: ChunkKey, nbytes: int, checksum: int | None) -> None:
        seals = self._known.get(key)
        if seals is None or any(size == nbytes and checksum in (None, seal) for size, seal in seals):
            return
        metrics.AUDIT_FAILURES.labels(self.inner.name).inc()
        what = "size" if checksum is None else "payload"
        logger.error("audit: %s gave a wrong %s of %d bytes for %s", self.inner.name, what, nbytes, key)
        raise StorageError(f"audit: {self.inner.name} gave a wrong {what} for {key}: it is not what was put")

    def _around(self, operation: Operation, keys: Sequence[ChunkKey], nbytes: int, call: Callable[[], T]) -> T:
        if self._log is None:
            return call()
        entry: dict[str, Any] = {"time": time.time(), "operation": operation, "bytes": nbytes}
        entry["keys"] = [key.to_bytes().hex() for key in keys]
        with self._logged(entry):
            result = call()
            entry["result"] = result
        return result

    @contextmanager
    def _logged(self, entry: dict[str, Any]) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:  # goes on: the log only says so
            entry["error"] = str(error)
            raise
        finally:
            entry["seconds"] = round(time.perf_counter() - begun, 6)
            line = (json.dumps(entry) + "\n").encode()
            # Or close() could give the descriptor to another file. One write a line: processes may share the file.
            with self._log_lock:
                if self._log is not None:
                    os.write(self._log, line)


class _Dice:
    """Random numbers from 0 to 1, the same sequence for the same seed. Thread-safe."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def roll(self) -> float:
        with self._lock:
            return self._random.random()
