"""L4: a Mooncake store, one value a chunk: header and payload, moved without a copy from and into pool memory.

The master (``mooncake_master``) knows which value lies where; the memory is that of processes that give some to it
(``segment``, or ``mooncake_client``). When it is full the store evicts values by itself: they are then a miss.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, field_validator

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ClosedError, ConfigError, CorruptChunkError, StorageError
from lmcache.forks import Home
from lmcache.keys import FINGERPRINT_BYTES, ChunkKey
from lmcache.storage.backends.indexed.registrations import Registrations
from lmcache.storage.base import Buffer, StorageBackend, distinct
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header
from lmcache.storage.memory.staging import Staging
from lmcache.storage.run.threads import Threads

if TYPE_CHECKING:
    from mooncake.store import MooncakeDistributedStore

logger = logging.getLogger(__name__)

T = TypeVar("T")
CLOSE_TIMEOUT_S = 1.0
BATCH = 64
"""Values of one call, as their headers lie in memory of our own meanwhile."""
# What the store answers. A value that is not ready is one that somebody else is writing: it is not there yet.
_FULL, _NOT_READY, _MISSING, _EXISTS, _LEASE_EXPIRED = -200, -703, -704, -705, -707


class MooncakeConfig(Config):
    """Options of ``{type: remote, url: "mooncake://host:port"}``."""

    url: str = Field(description="mooncake://host:port of the master")
    prefix: str = Field("lmcache", pattern=r"^[\w.-]+$", description="put before the name of every value")
    host: str = Field("127.0.0.1", description="address of this machine at which the others reach its memory")
    metadata: str = Field("P2PHANDSHAKE", description="Mooncake's metadata service, for example etcd://host:port")
    protocol: str = Field("tcp", description="how bytes travel: tcp or rdma")
    devices: str = Field("", description="network devices for rdma, for example mlx5_0,mlx5_1")
    segment: ByteSize = Field(ByteSize(0), ge=0, description="bytes of memory that this process gives to the store")
    local_buffer: ByteSize = Field(ByteSize(16 << 20), gt=0, description="bytes that the client keeps for itself")
    connect_timeout_s: float = Field(5.0, gt=0, description="deadline of the first contact with the master")
    timeout_s: float = Field(10.0, gt=0, description="deadline of every call")
    threads: int = Field(4, ge=1, le=64, description="calls at a time; one that hangs keeps its thread")

    @field_validator("url")
    @classmethod
    def _has_host_and_port(cls, url: str) -> str:
        parts = urlsplit(url)
        if not parts.hostname or not parts.port or parts.path.strip("/"):
            raise ValueError(f"expected mooncake://host:port, got {url}")
        return url


class MooncakeBackend(StorageBackend):
    """Chunks as values of a Mooncake store.

    The client is C++ that may block longer than anybody waits, so its calls run on a few threads of their own. One that
    runs over time is a StorageError while it goes on: it keeps its own handles on the buffers, so their memory does not
    go back to the pool before, but until then a late read may still write to them. Release such buffers, don't reuse.
    """

    name: ClassVar[str] = "mooncake"
    Config = MooncakeConfig

    def __init__(self, config: MooncakeConfig) -> None:
        self._config = config
        self._home = Home("this Mooncake tier")
        self._new = _import_store()
        self._caller = Threads("mooncake", config.threads)
        self._headers = Staging(config.threads * BATCH * HEADER_BYTES)
        self._registrations: Registrations[int] = Registrations(self._register, self._unregister)
        self._client: MooncakeDistributedStore | None = None
        self._connecting = threading.Lock()
        self._closed = False
        try:
            self._caller.call(self._store, config.connect_timeout_s, "Mooncake's setup")
        except StorageError as error:
            logger.warning("%s; it is tried again when it is needed", error)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        if not keys:
            return []
        names = [self._name(key) for key in keys]
        return [size - HEADER_BYTES for size in self._call("lookup", lambda store: _leading_sizes(store, names))]

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        count = 0
        for part in _parts(keys):
            try:
                done = self._get(keys[part], into[part])
            except StorageError:
                if not count:
                    raise
                break
            count += done
            if done < part.stop - part.start:
                break
        return count

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        held: set[ChunkKey] = set()
        wanted = list(distinct(keys, buffers).items())
        for start in range(0, len(wanted), BATCH):
            batch, sources = zip(*wanted[start : start + BATCH], strict=True)
            for key, code in zip(batch, self._move(batch, sources, "put", _put), strict=True):
                if code in (0, _EXISTS):
                    held.add(key)
                elif code != _FULL:
                    raise self._failed("put", code)
        return sum(key in held for key in keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        if not keys:
            return 0
        names = [self._name(key) for key in keys]
        codes: list[int] = self._call("remove", lambda store: store.batch_remove(names, True))
        for code in codes:
            if code not in (0, _MISSING, _NOT_READY):
                raise self._failed("remove", code)
        return codes.count(0)

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self._clear("" if fingerprint is None else fingerprint.hex())

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        any_format = f"[0-9a-f]{{{2 * FINGERPRINT_BYTES}}}"
        return self._clear((any_format if fingerprint is None else fingerprint.hex()) + tenant.hex())

    def _clear(self, start: str) -> int:
        """Remove chunks whose namespace begins with what ``start`` matches."""
        pattern = f"^{re.escape(self._config.prefix)}/{start}.*$"
        removed: int = self._call("clear", lambda store: store.remove_by_regex(pattern, True))
        if removed < 0:
            raise self._failed("clear", removed)
        return removed

    def close(self) -> None:
        """Gives the memory of this process's segment back, and with it the values that lie there.

        Waits a moment for calls that run; new ones raise ClosedError. While one hangs the client is left as it is: it
        would crash the process to take it away from under that call.
        """
        if self._closed or self._home.left:
            return
        self._closed = True
        if not self._caller.close(CLOSE_TIMEOUT_S):
            logger.warning("Mooncake's client is not closed, as calls of it still run")
        elif self._client is not None:
            closer = Threads("mooncake-close", 1)
            try:
                closer.call(self._client.close, self._config.timeout_s, "Mooncake's close")
            except StorageError as error:
                logger.warning("%s", error)
            closer.close(0)

    def _get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        codes = self._move(keys, into, "get", _get)
        for count, (key, buffer, code) in enumerate(zip(keys, into, codes, strict=False)):
            if isinstance(code, CorruptChunkError):
                metrics.CORRUPT_CHUNKS.labels(self.name).inc()
                logger.warning("removed %s: %s", self._name(key), code)
                with suppress(StorageError):  # it is a miss in any case, and is found again
                    self.remove([key])
                return count
            if code in (_MISSING, _LEASE_EXPIRED, _NOT_READY):
                return count
            if code != HEADER_BYTES + buffer.nbytes:
                raise self._failed("get", code)
        return len(codes)

    def _move(
        self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer], what: str, move: Callable[[Any, _Batch], list[T]]
    ) -> list[T]:
        """``move`` on a thread, that holds buffers and headers for as long as it takes."""
        names = [self._name(key) for key in keys]
        handles = [buffer.share() for buffer in buffers]
        owner = threading.Lock()  # who takes it releases the handles: the thread, or we if it never began

        def run() -> list[T]:
            if not owner.acquire(blocking=False):
                raise StorageError("given up before it began")
            try:
                with ExitStack() as stack:
                    headers = self._headers.take(len(keys) * HEADER_BYTES, self._config.timeout_s)
                    stack.callback(self._headers.give, headers)
                    store = self._store()
                    stack.enter_context(self._registrations.of([*handles, headers]))
                    return move(store, _Batch(keys, names, handles, headers))
            finally:
                for handle in handles:
                    handle.release()

        try:
            return self._caller.call(run, self._config.timeout_s, f"Mooncake's {what}")
        except (StorageError, ClosedError):
            if owner.acquire(blocking=False):
                for handle in handles:
                    handle.release()
            raise

    def _call(self, what: str, call: Callable[[Any], T]) -> T:
        return self._caller.call(lambda: call(self._store()), self._config.timeout_s, f"Mooncake's {what}")

    def _store(self) -> MooncakeDistributedStore:
        """The connected client; connects first where it has to. Only called on the threads of ``_caller``."""
        if self._closed:
            raise ClosedError("the Mooncake backend is closed")
        if not self._connecting.acquire(timeout=self._config.connect_timeout_s):
            raise StorageError("Mooncake's setup still runs")
        try:
            if self._client is None:
                self._client = self._connect()
            return self._client
        finally:
            self._connecting.release()

    def _connect(self) -> MooncakeDistributedStore:
        config, master = self._config, urlsplit(self._config.url)
        try:  # the client itself would try for a minute and a half
            socket.create_connection((str(master.hostname), int(master.port or 0)), config.connect_timeout_s).close()
        except OSError as error:
            raise StorageError(f"cannot reach the Mooncake master at {master.netloc}: {error}") from error
        client = self._new()
        code = client.setup(
            config.host,
            config.metadata,
            config.segment,
            config.local_buffer,
            config.protocol,
            config.devices,
            master.netloc,
        )
        if code:
            raise self._failed("setup", code)
        return client

    def _register(self, address: int, nbytes: int) -> int:
        assert self._client is not None
        if code := self._client.register_buffer(address, nbytes):
            raise self._failed(f"registration of {nbytes} bytes", code)
        return address

    def _unregister(self, address: int) -> None:
        assert self._client is not None
        if code := self._client.unregister_buffer(address):
            raise self._failed("deregistration", code)

    def _name(self, key: ChunkKey) -> str:
        return f"{self._config.prefix}/{key.namespace.hex()}/{key.digest.hex()}"

    def _failed(self, what: str, code: object) -> StorageError:
        return StorageError(f"Mooncake's {what} failed at {self._config.url}: code {code}")


def _parts(keys: Sequence[ChunkKey]) -> Iterator[slice]:
    """Runs of at most BATCH keys that are all different: the store reads a name that is asked for twice not at all."""
    start, seen = 0, set[ChunkKey]()
    for at, key in enumerate(keys):
        if key in seen or at - start == BATCH:
            yield slice(start, at)
            start, seen = at, set()
        seen.add(key)
    if seen:
        yield slice(start, len(keys))


class _Batch:
    """Values to move: names, and for each the memory of its header and of its payload."""

    def __init__(self, keys: Sequence[ChunkKey], names: list[str], buffers: Sequence[Buffer], headers: Buffer) -> None:
        self.keys, self.names, self.buffers = keys, names, buffers
        self.headers = [headers.view[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(len(keys))]
        self.addresses = [[headers.address + i * HEADER_BYTES, b.address] for i, b in enumerate(buffers)]
        self.lengths = [[HEADER_BYTES, buffer.nbytes] for buffer in buffers]


def _put(store: MooncakeDistributedStore, batch: _Batch) -> list[int]:
    for header, key, buffer in zip(batch.headers, batch.keys, batch.buffers, strict=True):
        header[:] = encode_header(key, buffer.view)
    codes: list[int] = store.batch_put_from_multi_buffers(batch.names, batch.addresses, batch.lengths)
    return codes


def _get(store: MooncakeDistributedStore, batch: _Batch) -> list[int | CorruptChunkError]:
    """For each value its bytes or the store's code, up to the first that is not wanted so."""
    sizes = _leading_sizes(store, batch.names)
    fits = 0
    while fits < len(sizes) and sizes[fits] == sum(batch.lengths[fits]):
        fits += 1
    missing: list[int | CorruptChunkError] = [_MISSING] if fits < len(batch.names) else []
    if not fits:
        return missing
    codes = store.batch_get_into_multi_buffers(batch.names[:fits], batch.addresses[:fits], batch.lengths[:fits])
    outcomes: list[int | CorruptChunkError] = []
    for code, header, key, buffer in zip(codes, batch.headers, batch.keys, batch.buffers, strict=False):
        outcomes.append(code)
        if code == HEADER_BYTES + buffer.nbytes:
            try:
                check_chunk(header, key, buffer.view)
            except CorruptChunkError as error:
                outcomes[-1] = error
    return outcomes + missing


def _leading_sizes(store: MooncakeDistributedStore, names: list[str]) -> list[int]:
    """Bytes of the leading run of values that are there whole: two questions to the master, however many names."""
    from mooncake.store import ReplicaStatus

    # Not the second question alone: it cannot tell a master that is gone, and logs a line for every missing value.
    there: list[int] = store.batch_is_exist(names)
    if failures := [code for code in there if code < 0]:
        raise StorageError(f"Mooncake's lookup failed: code {failures[0]}")
    names = names[: there.index(0)] if 0 in there else names
    replicas = store.batch_get_replica_desc(names) if names else {}
    sizes: list[int] = []
    for name in names:
        whole = [replica for replica in replicas.get(name, ()) if replica.status == ReplicaStatus.COMPLETE]
        if not whole:
            break
        memory = next((replica for replica in whole if replica.is_memory_replica()), None)
        if memory is not None:
            size = int(memory.get_memory_descriptor().buffer_descriptor.size)
        else:
            size = int(store.get_size(name))
        if size <= HEADER_BYTES:
            break
        sizes.append(size)
    return sizes


def _import_store() -> Callable[[], MooncakeDistributedStore]:
    try:
        from mooncake.store import MooncakeDistributedStore as Store
    except ImportError as error:
        raise ConfigError(
            "a mooncake:// remote needs the Mooncake client; in your clone: pip install -e '.[mooncake]', or without "
            f"CUDA pip install mooncake-transfer-engine-non-cuda; and the system library libibverbs1 ({error})"
        ) from error
    return Store  # type: ignore[no-any-return]
