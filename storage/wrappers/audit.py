"""Whether a backend gives back what was put, and a log of its calls."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import xxhash
from pydantic import Field

from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer
from lmcache.storage.files.regular_files import open_regular
from lmcache.storage.registry import build_backend
from lmcache.storage.selection import Selection
from lmcache.storage.wrappers.base import Operation, Wrapper, WrapperConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")
SEALS_PER_KEY = 8


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
        begun = time.perf_counter()
        try:
            entry["result"] = result = call()
            return result
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
