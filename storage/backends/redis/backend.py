"""L4: Redis, Valkey and what speaks their protocol: one key a chunk.

    <prefix><format fingerprint>:<tenant, tags and digest>   ->   header (4096 bytes), payload

Header and payload are one value, so a chunk is there whole or not at all. What is kept, for how long and how safely is
the server's to say (maxmemory, maxmemory-policy, persistence, replicas).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from redis.connection import ConnectionPool

from lmcache import metrics
from lmcache.errors import CorruptChunkError, StorageError
from lmcache.keys import DIGEST_BYTES, FINGERPRINT_BYTES, NAMESPACE_BYTES, ChunkKey
from lmcache.storage.backends.redis.pipeline import Batch, Outcome, Pipeline, Session, Windows, refused
from lmcache.storage.backends.redis.servers import RedisConfig
from lmcache.storage.backends.redis.wire import ErrorReply, Part, Wire, bulk_string, command
from lmcache.storage.base import Buffer, StorageBackend, distinct
from lmcache.storage.chunk import HEADER_BYTES, check_chunk, encode_header

logger = logging.getLogger(__name__)

# Keys of a lookup: few at first, because a miss among them makes the rest worthless; then all in one round trip.
FIRST_LOOKUP_KEYS, LOOKUP_KEYS = 512, 16_384
WINDOW_KEYS = 128  # of values in one window
SCAN_KEYS = 2_000  # that the server looks at in one step of clear()
NAME_BYTES = 2 * (NAMESPACE_BYTES + DIGEST_BYTES) + 1
# The key holds something else, or its slot is just moving to another node: neither is a chunk that can be read here.
ABSENT = frozenset({"WRONGTYPE", "ASK"})


class RedisBackend(StorageBackend):
    """Chunks as values of a Redis server, of the master that sentinels name, or of a cluster."""

    name: ClassVar[str] = "redis"
    Config = RedisConfig

    def __init__(self, config: RedisConfig) -> None:
        self._config = config
        self._pipeline = Pipeline(config)
        self._prefix = config.prefix.encode()
        self._ttl = b"" if config.ttl_s is None else b"%d" % round(config.ttl_s * 1000)
        self._full = False

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        names = self._names(keys)
        sizes = [0] * len(keys)

        def answer(wire: Wire, index: int) -> Outcome:
            length = wire.reply()
            if isinstance(length, ErrorReply):
                return length.code not in ABSENT and length
            sizes[index] = length - HEADER_BYTES if isinstance(length, int) else 0
            return sizes[index] > 0

        batch = Batch(names, lambda i: (command(b"STRLEN", names[i]),), answer, _lookups(len(names)))
        return sizes[: self._pipeline.perform(batch)]

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        names = self._names(keys)
        views = [buffer.view for _, buffer in zip(keys, into, strict=True)]
        header = memoryview(bytearray(HEADER_BYTES))
        damaged: list[ChunkKey] = []

        def answer(wire: Wire, index: int) -> Outcome:
            length = wire.bulk()
            try:
                if isinstance(length, ErrorReply):
                    if length.code == "WRONGTYPE":
                        raise CorruptChunkError("not a string")
                    return length.code not in ABSENT and length
                return length is not None and _read(wire, length, header, keys[index], views[index])
            except CorruptChunkError as error:
                metrics.CORRUPT_CHUNKS.labels(self.name).inc()
                logger.warning("removed %s: %s", names[index].decode(errors="replace"), error)
                damaged.append(keys[index])
                return False

        windows = _windows([HEADER_BYTES + view.nbytes for view in views], self._config.window)
        batch = Batch(names, lambda i: (command(b"GET", names[i]),), answer, windows, ahead=2)
        try:
            return self._pipeline.perform(batch)
        except StorageError:
            if not batch.done:
                raise
            return batch.done
        finally:
            if damaged:
                with contextlib.suppress(StorageError):  # it is a miss in any case, and is found again
                    self.remove(damaged)

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        wanted = {key: buffer.view for key, buffer in distinct(keys, buffers).items()}
        absent = self._absent(list(wanted), list(wanted.values()))
        held = wanted.keys() - absent
        held |= self._write([(key, wanted[key]) for key in absent if self._fits(wanted[key])])
        return sum(key in held for key in keys)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        return self._unlink(self._names(keys))

    def clear(self, fingerprint: bytes | None = None) -> int:
        return self._clear(b"" if fingerprint is None else fingerprint.hex().encode() + b":", b"")

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        whose = tenant.hex().encode()
        return self._clear(b"" if fingerprint is None else fingerprint.hex().encode() + b":" + whose, whose)

    def _clear(self, start: bytes, tenant: bytes) -> int:
        """Unlink chunks whose name goes on with ``start`` and whose tenant begins with ``tenant``."""
        deadline = time.monotonic() + self._config.clear_timeout_s
        start = self._prefix + start
        tenant_at = len(self._prefix) + 2 * FINGERPRINT_BYTES + 1
        pools = self._pipeline.run(lambda _: self._pipeline.servers.pools(), self._config.timeout_s)
        count = 0
        for pool in pools:
            cursor = b"0"
            while True:
                if time.monotonic() > deadline:
                    raise StorageError(f"not all chunks were removed within {self._config.clear_timeout_s} s")
                cursor, names = self._scan(pool, cursor, start)
                count += self._unlink([name for name in names if name.startswith(tenant, tenant_at)])
                if cursor == b"0":
                    break
        return count

    def close(self) -> None:
        self._pipeline.close()

    def _names(self, keys: Sequence[ChunkKey]) -> list[bytes]:
        prefix = self._prefix.decode()
        return [f"{prefix}{key.fingerprint.hex()}:{key.to_bytes()[FINGERPRINT_BYTES:].hex()}".encode() for key in keys]

    def _fits(self, view: memoryview) -> bool:
        if HEADER_BYTES + view.nbytes <= self._config.max_value:
            return True
        self._refused(f"max_value is {self._config.max_value} bytes", view.nbytes)
        return False

    def _absent(self, keys: Sequence[ChunkKey], views: Sequence[memoryview]) -> list[ChunkKey]:
        """The keys that hold no value of the right length. Renews the time to live of those that do."""
        names = self._names(keys)
        absent: list[int] = []

        def request(index: int) -> Sequence[Part]:
            length = command(b"STRLEN", names[index])
            return (length, command(b"PEXPIRE", names[index], self._ttl)) if self._ttl else (length,)

        def answer(wire: Wire, index: int) -> Outcome:
            length = wire.reply()
            renewed = wire.reply() if self._ttl else 1
            for reply in (length, renewed):
                if isinstance(reply, ErrorReply) and reply.code not in ABSENT:
                    return reply
            if length != HEADER_BYTES + views[index].nbytes or renewed != 1:
                absent.append(index)
            return True

        self._pipeline.perform(Batch(names, request, answer, _lookups(len(names)), replies=2 if self._ttl else 1))
        return [keys[index] for index in sorted(set(absent))]

    def _write(self, chunks: Sequence[tuple[ChunkKey, memoryview]]) -> set[ChunkKey]:
        """Put them, whatever was there; returns those that the server took."""
        names = self._names([key for key, _ in chunks])
        refused: set[int] = set()
        ttl = bulk_string(b"PX") + bulk_string(self._ttl) if self._ttl else b""

        def request(index: int) -> Sequence[Part]:
            key, view = chunks[index]
            start = b"*%d\r\n$3\r\nSET\r\n" % (5 if ttl else 3) + bulk_string(names[index])
            length = b"$%d\r\n" % (HEADER_BYTES + view.nbytes)
            return start + length + encode_header(key, view), view, b"\r\n" + ttl

        def answer(wire: Wire, index: int) -> Outcome:
            reply = wire.reply()
            if isinstance(reply, ErrorReply):
                if reply.code not in ("OOM", "ASK"):
                    return reply
                refused.add(index)
                self._refused(reply.text, chunks[index][1].nbytes)
            return True

        windows = _windows([HEADER_BYTES + view.nbytes for _, view in chunks], self._config.window)
        self._pipeline.perform(Batch(names, request, answer, windows, ahead=2))
        taken = {key for index, (key, _) in enumerate(chunks) if index not in refused}
        self._full = self._full and not taken
        return taken

    def _refused(self, why: str, nbytes: int) -> None:
        """Not held for lack of room: not an error, since what is there can still be read. Said once until it ends."""
        metrics.TIER_REFUSED_BYTES.labels(self.name).inc(nbytes)
        if not self._full:
            self._full = True
            logger.warning("tier %s: chunks are not stored: %s", self.name, why)

    def _unlink(self, names: Sequence[bytes]) -> int:
        removed: set[int] = set()

        def answer(wire: Wire, index: int) -> Outcome:
            reply = wire.reply()
            if reply == 1:
                removed.add(index)
            return reply if isinstance(reply, ErrorReply) else True

        self._pipeline.perform(Batch(names, lambda i: (command(b"UNLINK", names[i]),), answer, _lookups(len(names))))
        return len(removed)

    def _scan(self, pool: ConnectionPool, cursor: bytes, start: bytes) -> tuple[bytes, list[bytes]]:
        """One step over the keys of a server: the next cursor, and the chunks that begin with ``start``."""
        special = b"*?[]^-\\"
        pattern = b"".join(b"\\%c" % c if c in special else b"%c" % c for c in start) + b"*"
        step = command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % SCAN_KEYS)

        def ask(session: Session) -> tuple[bytes, list[bytes]]:
            wire = session.wire(pool)
            wire.send([step], 1)
            reply = wire.reply()
            if isinstance(reply, ErrorReply):
                raise refused(reply)
            if not isinstance(reply, list) or not isinstance(reply[0], bytes) or not isinstance(reply[1], list):
                raise StorageError(f"an odd answer to SCAN: {reply!r:.60}")
            return reply[0], [name for name in reply[1] if isinstance(name, bytes) and self._is_ours(name)]

        return self._pipeline.run(ask, self._config.timeout_s)

    def _is_ours(self, name: bytes) -> bool:
        return len(name) == len(self._prefix) + NAME_BYTES and name.startswith(self._prefix)


def _read(wire: Wire, length: int, header: memoryview, key: ChunkKey, view: memoryview) -> bool:
    """True when the value that comes is the chunk of ``key``, now in ``view``; else CorruptChunkError."""
    if length != HEADER_BYTES + view.nbytes:
        wire.skip(length)
        wire.end()
        raise CorruptChunkError(f"value of {length} bytes, expected {HEADER_BYTES + view.nbytes}")
    wire.into(header)
    wire.into(view)
    wire.end()
    check_chunk(header, key, view)
    return True


def _lookups(count: int) -> Windows:
    def windows(start: int) -> Iterator[range]:
        stop = min(count, start + FIRST_LOOKUP_KEYS)
        while start < count:
            yield range(start, stop)
            start, stop = stop, min(count, stop + LOOKUP_KEYS)

    return windows


def _windows(sizes: Sequence[int], window_bytes: int) -> Windows:
    """Keys whose values make up ``window_bytes`` together, at least one and not too many."""

    def windows(start: int) -> Iterator[range]:
        while start < len(sizes):
            stop, nbytes = start + 1, sizes[start]
            while stop < min(len(sizes), start + WINDOW_KEYS) and nbytes + sizes[stop] <= window_bytes:
                nbytes += sizes[stop]
                stop += 1
            yield range(start, stop)
            start = stop

    return windows
