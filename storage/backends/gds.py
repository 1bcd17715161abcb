"""L3: chunk files by GPUDirect Storage, through KvikIO: straight between disk and GPU where a buffer is on the GPU.

A buffer in host memory goes by POSIX reads and writes, on KvikIO's own threads. See chunk_files.py for the files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import ByteSize, Field

from lmcache.config import Config
from lmcache.errors import ConfigError, CorruptChunkError, StorageError
from lmcache.keys import ChunkKey
from lmcache.storage.backends.chunk_files import ChunkFiles, reserve
from lmcache.storage.backends.indexed import IndexedBackend, Place
from lmcache.storage.base import Buffer
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header

BATCH = 16
"""Files that are read at once."""


class GdsConfig(Config):
    """Options of ``{type: gds}``."""

    path: Path = Field(description="folder of the chunks, on a file system that GPUDirect Storage knows")
    capacity: ByteSize = Field(ByteSize(10 << 30), gt=HEADER_BYTES, description="bytes of files, for example 100GiB")
    eviction: str = Field("lru", description="name of the eviction policy")
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


class GdsFiles(Place):
    """One file a chunk. Reads of a batch run at the same time; what a read has begun is waited for."""

    def __init__(self, path: Path, threads: int) -> None:
        self._kvikio = _import_kvikio()
        self._files = ChunkFiles(path, "gds")
        try:
            self._kvikio.defaults.set({"num_threads": threads})
            self._probe()
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"the gds tier cannot read and write at {self._files.root} ({error}): KvikIO needs NVIDIA's driver "
                "(libcuda.so.1) even for host memory; without a GPU use {type: disk}"
            ) from error

    def scan(self) -> list[tuple[ChunkKey, int]]:
        return self._files.scan()

    def find(self, key: ChunkKey) -> int:
        return self._files.find(key)

    def delete(self, key: ChunkKey) -> bool:
        return self._files.delete(key)

    def close(self) -> None:
        """Nothing is open between calls."""

    def read(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[bool | StorageError]:
        outcomes: list[bool | StorageError] = []
        for start in range(0, len(keys), BATCH):
            outcomes += self._read_batch(keys[start : start + BATCH], into[start : start + BATCH])
            if outcomes[-1] is not True:
                break
        return outcomes

    def write(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> list[StorageError | None]:
        return [self._write(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _read_batch(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[bool | StorageError]:
        outcomes: list[bool | StorageError] = []
        with contextlib.ExitStack() as stack:
            begun = [self._begin(stack, key, buffer) for key, buffer in zip(keys, into, strict=True)]
            for key, buffer, reads in zip(keys, into, begun, strict=True):
                outcome = reads if isinstance(reads, bool | StorageError) else self._end(key, buffer, *reads)
                if all(earlier is True for earlier in outcomes):
                    outcomes.append(outcome)
        return outcomes

    def _begin(
        self, stack: contextlib.ExitStack, key: ChunkKey, buffer: Buffer
    ) -> tuple[bytearray, list[Any]] | bool | StorageError:
        """Start to read a file; its header goes into the bytes that are returned."""
        path = self._files.path(key)
        header = bytearray(HEADER_BYTES)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            if (wrong := self._files.misfit(key, file, HEADER_BYTES + buffer.nbytes)) is not None:
                return wrong
            handle = stack.enter_context(self._open(path, "r"))
            return header, [
                handle.pread(header, HEADER_BYTES, 0),
                handle.pread(_memory(buffer), buffer.nbytes, HEADER_BYTES),
            ]
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (RuntimeError, OSError) as error:
            return StorageError(f"cannot read {path}: {error}")

    def _end(self, key: ChunkKey, buffer: Buffer, header: bytearray, reads: list[Any]) -> bool | StorageError:
        failure: StorageError | None = None
        done = 0
        for read in reads:  # all of them, as none may go on when the buffers are given back
            try:
                done += read.get()
            except (RuntimeError, OSError) as error:
                failure = StorageError(f"cannot read {self._files.path(key)}: {error}")
        if failure is not None:
            return failure
        try:
            if done != HEADER_BYTES + buffer.nbytes:
                raise CorruptChunkError(f"the file ended after {done} of {HEADER_BYTES + buffer.nbytes} bytes")
            check_chunk(memoryview(header), key, _on_host(buffer))
        except CorruptChunkError as error:
            return error
        self._files.used(key)
        return True

    def _write(self, key: ChunkKey, buffer: Buffer) -> StorageError | None:
        path = self._files.path(key)
        temporary: Path | None = None
        try:
            temporary = self._files.temporary(key)
            file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                reserve(file, HEADER_BYTES + buffer.nbytes)
            finally:
                os.close(file)
            self._write_file(temporary, encode_header(key, _on_host(buffer)), buffer)
            temporary.rename(path)
        except (RuntimeError, OSError) as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            return StorageError(f"cannot write {path}: {error}")
        return None

    def _write_file(self, path: Path, header: bytes, buffer: Buffer) -> None:
        with self._open(path, "r+") as handle:
            writes = [
                handle.pwrite(header, HEADER_BYTES, 0),
                handle.pwrite(_memory(buffer), buffer.nbytes, HEADER_BYTES),
            ]
            written, failure = 0, None
            for write in writes:
                try:
                    written += write.get()
                except (RuntimeError, OSError) as error:
                    failure = error
        if failure is not None:
            raise failure
        if written != HEADER_BYTES + buffer.nbytes:
            raise OSError(f"{written} of {HEADER_BYTES + buffer.nbytes} bytes were written")

    @contextlib.contextmanager
    def _open(self, path: Path, flags: str) -> Iterator[Any]:
        handle = self._kvikio.CuFile(str(path), flags)
        try:
            yield handle
        finally:
            handle.close()

    def _probe(self) -> None:
        path, back = self._files.root / f".tmp-{os.getpid()}-probe", bytearray(HEADER_BYTES)
        try:
            path.write_bytes(bytes(HEADER_BYTES))
            with self._open(path, "r+") as handle:
                handle.pwrite(b"p" * HEADER_BYTES, HEADER_BYTES, 0).get()
                handle.pread(back, HEADER_BYTES, 0).get()
            if back != b"p" * HEADER_BYTES:
                raise OSError("KvikIO did not read what it wrote")
        finally:
            path.unlink(missing_ok=True)


def _memory(buffer: Buffer) -> object:
    """What KvikIO reads into or writes from: it takes the GPU's path where this is on the GPU."""
    return buffer if isinstance(buffer, OnDevice) else buffer.view


def _on_host(buffer: Buffer) -> memoryview:
    """The bytes to take a checksum of: those of a buffer on the GPU are copied for it."""
    if not isinstance(buffer, OnDevice):
        return buffer.view
    import torch

    array = torch.as_tensor(buffer, device="cuda").flatten().view(torch.uint8).cpu().numpy()
    return memoryview(array)  # type: ignore[arg-type]


def _import_kvikio() -> Any:
    try:
        import kvikio
        import kvikio.defaults
    except (ImportError, RuntimeError) as error:  # the latter when NVIDIA's libraries are not beside it
        raise ConfigError(f"the gds tier needs KvikIO: pip install 'lmcache[gds]' ({error})") from error
    return kvikio
