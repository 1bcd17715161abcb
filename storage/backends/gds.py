"""L3: chunk files by GPUDirect Storage, through KvikIO: straight between disk and GPU where a buffer is on the GPU.

A buffer in host memory goes by POSIX reads and writes, on KvikIO's own threads. See chunk_files.py for the files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import ByteSize, Field

from lmcache.config import Config
from lmcache.errors import ConfigError
from lmcache.storage.backends.indexed.backend import IndexedBackend
from lmcache.storage.backends.indexed.files import FileMedium, Item, Operation
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.files.chunk_files import temporary_name
from lmcache.storage.files.regular_files import create_regular
from lmcache.storage.memory.pool import PoolBuffer
from lmcache.storage.registry import PolicyName

HEADERS_TIMEOUT_S = 10.0


class GdsConfig(Config):
    """Options of ``{type: gds}``."""

    path: Path = Field(description="folder of the chunks, on a file system that GPUDirect Storage knows")
    capacity: ByteSize = Field(ByteSize(10 << 30), gt=HEADER_BYTES, description="bytes of files, for example 100GiB")
    eviction: PolicyName = Field("lru", description="name of the eviction policy")
    threads: int = Field(4, ge=1, le=64, description="KvikIO's threads, which all tiers of the process share")


@runtime_checkable
class OnDevice(Protocol):
    """A buffer whose bytes are in GPU memory."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class GdsBackend(IndexedBackend):
    """Chunks as files that KvikIO reads and writes."""

    name: ClassVar[str] = "gds"
    Config = GdsConfig

    def __init__(self, config: GdsConfig) -> None:
        super().__init__(GdsFiles(config.path, config.threads), config.capacity, config.eviction)


class GdsFiles(FileMedium):
    """Headers and payloads of a batch move at the same time; what has begun is waited for."""

    def __init__(self, path: Path, threads: int) -> None:
        self._kvikio = _import_kvikio()
        # KvikIO opens files itself, past the page cache where it likes.
        super().__init__(path, "gds", direct=False, timeout_s=HEADERS_TIMEOUT_S)
        try:
            self._kvikio.defaults.set({"num_threads": threads})
            self._try_out()
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"the gds tier cannot read and write at {self._files.path} ({error}): KvikIO needs NVIDIA's driver "
                "(libcuda.so.1) even for host memory; without a GPU use {type: disk}"
            ) from error

    def move(self, operation: Operation, items: Sequence[Item], headers: PoolBuffer) -> list[Exception | None]:
        with contextlib.ExitStack() as handles:
            begun = [self._begin(operation, item, handles) for item in items]
            return [_ended(futures, failure) for futures, failure in begun]

    def on_host(self, buffer: Buffer) -> memoryview:
        """Those of a buffer on the GPU are copied for it."""
        if not isinstance(buffer, OnDevice):
            return buffer.view
        import torch

        array = torch.as_tensor(buffer, device="cuda").flatten().view(torch.uint8).cpu().numpy()
        return memoryview(array)  # type: ignore[arg-type]

    def _begin(
        self, operation: Operation, item: Item, handles: contextlib.ExitStack
    ) -> tuple[list[tuple[Any, int]], Exception | None]:
        """Start to move header and payload: what moves, and how many bytes of it; and what kept the rest from it."""
        futures: list[tuple[Any, int]] = []
        # It takes the GPU's path where the buffer is there.
        payload = item.buffer if isinstance(item.buffer, OnDevice) else item.buffer.view
        try:
            handle = self._kvikio.CuFile(_path_of(item.file), "r" if operation == "READ" else "r+")
            handles.callback(handle.close)
            call = handle.pread if operation == "READ" else handle.pwrite
            futures.append((call(item.header, HEADER_BYTES, 0), HEADER_BYTES))
            futures.append((call(payload, item.buffer.nbytes, HEADER_BYTES), item.buffer.nbytes))
        except (RuntimeError, OSError) as error:
            return futures, error
        return futures, None

    def _try_out(self) -> None:
        """See whether KvikIO reads what it wrote."""
        with self._staged(1) as header:
            path = self._files.path / temporary_name()
            file = create_regular(str(path), os.O_RDWR)
            try:
                os.ftruncate(file, HEADER_BYTES)
                with self._kvikio.CuFile(_path_of(file), "r+") as handle:
                    handle.pwrite(b"p" * HEADER_BYTES, HEADER_BYTES, 0).get()
                    handle.pread(header.view, HEADER_BYTES, 0).get()
                if header.view != b"p" * HEADER_BYTES:
                    raise OSError("KvikIO did not read what it wrote")
            finally:
                os.close(file)
                path.unlink(missing_ok=True)


def _path_of(file: int) -> str:
    """A path to the open file itself, as KvikIO takes paths only: by its name there may be another file now."""
    return f"/proc/self/fd/{file}"


def _ended(futures: list[tuple[Any, int]], failure: Exception | None) -> Exception | None:
    """Wait for all of them, as none may go on when the buffers are given back; what went wrong."""
    for future, nbytes in futures:
        try:
            if (done := future.get()) != nbytes:
                raise OSError(f"{done} of {nbytes} bytes were moved")
        except (RuntimeError, OSError) as error:
            failure = failure or error
    return failure


def _import_kvikio() -> Any:
    try:
        import kvikio
        import kvikio.defaults
    except (ImportError, RuntimeError) as error:  # the latter when NVIDIA's libraries are not beside it
        raise ConfigError(f"the gds tier needs KvikIO; in your clone: pip install -e '.[gds]' ({error})") from error
    return kvikio
