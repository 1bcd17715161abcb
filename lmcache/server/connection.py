"""One connection of a client, on a thread of its own: handshake, then one request after the other."""

from __future__ import annotations

import dataclasses
import hmac
import logging
import secrets
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence

from lmcache import metrics
from lmcache.errors import ClosedError, ProtocolError
from lmcache.keys import FINGERPRINT_BYTES, TENANT_BYTES, ChunkKey
from lmcache.server.config import ServerConfig
from lmcache.server.limits import SHARE, Budget, Complaints
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.channel import Channel
from lmcache.storage.backends.lm.protocol import (
    CODES,
    SEAL_BYTES,
    Clear,
    Count,
    Failed,
    Found,
    Get,
    Put,
    Remove,
    Request,
    Sizes,
)
from lmcache.storage.lease import Lease
from lmcache.storage.manager import StorageManager
from lmcache.storage.memory.pool import PoolBuffer
from lmcache.storage.selection import Selection

logger = logging.getLogger(__name__)

# What one Found frame carries at most; a connection holds two of them, one that is sent and one that is read meanwhile.
BATCH_BYTES, BATCH_CHUNKS = 16 << 20, 256
ANY_SIZE = range(1, 1 << 62)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all connections of a server have in common."""

    config: ServerConfig
    token: bytes
    store: StorageManager
    budget: Budget
    complaints: Complaints


class Busy(Exception):
    """No room for this request in time."""


class Connection:
    """Serves one client until it leaves, misbehaves, or ``drain`` is called."""

    def __init__(self, shared: Shared, peer: str, open_channel: Callable[[], Channel]) -> None:
        self._shared = shared
        self._config = shared.config
        self._store = shared.store
        self._peer = peer
        self._open_channel = open_channel
        self._lock = threading.Lock()
        self._idle = self._draining = self._cut_off = False
        self._channel: Channel  # once run() has opened it
        self._opened: Channel | None = None

    def run(self) -> None:
        """Everything, on the calling thread; raises nothing."""
        try:
            self._channel = self._opened = self._open_channel()
        except (OSError, ssl.SSLError) as error:
            self._shared.complaints.add("tls", self._peer, error)
            return
        try:
            self._login()
            while self._await_request():
                self._serve_one()
        except ProtocolError as error:
            self._refuse("protocol", error)
        except PermissionError as error:
            self._refuse("auth", error)
        except TimeoutError as error:
            self._shared.complaints.add("slow", self._peer, error)
        except OSError as error:
            logger.debug("client %s: %s", self._peer, error)  # it closed the connection, which is no fault
        except ClosedError as error:
            self._refuse("closing", error)
        # The entry loop of a thread: an error that one client causes ends its connection, and nothing else.
        except Exception as error:
            self._shared.complaints.add("error", self._peer, error)
            logger.debug("client %s", self._peer, exc_info=True)
        finally:
            self._channel.close()

    def drain(self) -> None:
        """End the connection, after the request under way if there is one."""
        with self._lock:
            self._draining = True
            if self._idle:
                self._channel.shutdown()

    @property
    def crawls(self) -> bool:
        """Whether a transfer is under way of which the client takes, or sends, hardly anything."""
        return self._opened is not None and self._opened.crawls

    def cut_off(self) -> None:
        """End the connection, because others wait for the memory that it holds."""
        if not self._cut_off:
            self._cut_off = True
            self._shared.complaints.add("slow", self._peer, "hardly anything is taken or given while others wait")
        self.abort()

    def abort(self) -> None:
        """End the connection now."""
        if self._opened is not None:
            self._opened.shutdown()

    def _login(self) -> None:
        channel, token = self._channel, self._shared.token
        channel.start(self._config.login_timeout_s)
        nonce = secrets.token_bytes(protocol.NONCE_BYTES)
        channel.send_frame(protocol.Hello(nonce, bool(token)))
        login, payload_bytes = channel.receive_frame(protocol.LOGIN, protocol.MAX_HELLO_BYTES)
        if payload_bytes:
            raise ProtocolError("a login with a payload")
        proof = b""
        if token:
            if not hmac.compare_digest(login.proof, protocol.prove(token, "client", nonce, login.nonce)):
                raise PermissionError("the token is missing or wrong")
            proof = protocol.prove(token, "server", login.nonce, nonce)
        channel.send_frame(protocol.Welcome(proof, bool(self._config.storage.tiers)))

    def _await_request(self) -> bool:
        with self._lock:
            if self._draining:
                return False
            self._idle = True
        ready = self._channel.readable(self._config.idle_timeout_s)
        with self._lock:
            self._idle = False
            return ready and not self._draining

    def _serve_one(self) -> None:
        self._channel.start(self._config.request_timeout_s)
        request, payload_bytes = self._channel.receive_frame(protocol.REQUEST, protocol.MAX_HEAD_BYTES)
        name = type(request).__name__.lower()
        with metrics.SERVER_SECONDS.labels(name).time():
            self._answer(request, payload_bytes)
        metrics.SERVER_REQUESTS.labels(name).inc()

    def _answer(self, request: Request, payload_bytes: int) -> None:
        if payload_bytes and not isinstance(request, Put):
            raise ProtocolError(f"{type(request).__name__} with a payload")
        if isinstance(request, Clear):
            if request.fingerprint is not None and len(request.fingerprint) != FINGERPRINT_BYTES:
                raise ProtocolError(f"a fingerprint has {FINGERPRINT_BYTES} bytes, got {len(request.fingerprint)}")
            if request.tenant is not None and len(request.tenant) != TENANT_BYTES:
                raise ProtocolError(f"a tenant has {TENANT_BYTES} bytes, got {len(request.tenant)}")
            self._reply(Count(self._store.clear_selected(Selection(request.fingerprint, request.tenant))))
            return
        keys = protocol.split_keys(request.keys)
        if isinstance(request, Sizes):
            self._reply(Found([size - SEAL_BYTES for size in self._held(keys)]))
        elif isinstance(request, Remove):
            self._reply(Count(self._store.remove(keys)))
        elif len(request.sizes) != len(keys):
            raise ProtocolError(f"{len(request.sizes)} sizes for {len(keys)} keys")
        elif isinstance(request, Get):
            try:
                self._send_chunks(keys, request.sizes)
            except Busy:
                self._reply(Failed("busy", CODES["busy"]))
        elif payload_bytes != sum(request.sizes) + SEAL_BYTES * len(keys):
            raise ProtocolError(f"a payload of {payload_bytes} bytes for chunks of {sum(request.sizes)}")
        else:
            self._reply(Count(self._receive_chunks(keys, request.sizes, request.durable or self._config.durable)))

    def _reply(self, message: protocol.Message) -> None:
        self._channel.start(self._config.request_timeout_s)
        self._channel.send_frame(message)

    def _refuse(self, code: str, error: Exception) -> None:
        """Tell the client why the connection ends, if it still reads."""
        self._shared.complaints.add(code, self._peer, error)
        try:
            self._channel.start(1.0)
            self._channel.send_frame(Failed(code, str(error)))
        except OSError:
            return
        self._channel.linger()

    def _held(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Bytes of the values of the leading run; one that is too short for a seal was not written by a client."""
        sizes = self._store.sizes(keys)
        return sizes[: next((at for at, size in enumerate(sizes) if size <= SEAL_BYTES), len(sizes))]

    def _send_chunks(self, keys: Sequence[ChunkKey], sizes: Sequence[int]) -> None:
        """Found frames for the leading run that is held in these sizes; the next batch is read while one is sent."""
        held = self._held(keys)
        count = next((at for at, size in enumerate(held) if size != sizes[at] + SEAL_BYTES), len(held))
        ahead: _Reading | None = None
        try:
            # It may hold two batches: one that is sent, and one that is read meanwhile.
            batches = list(_batches(held[:count], min(BATCH_BYTES, self._shared.budget.nbytes // (2 * SHARE))))
            for number, batch in enumerate(batches):
                part = slice(batch.start, batch.stop)
                current = ahead or self._read(keys[part], held[part], self._config.busy_timeout_s)
                ahead = None
                if current is None:
                    raise Busy
                with current as buffers:
                    more = len(buffers) == len(batch) and number + 1 < len(batches)
                    if more:
                        after = slice(batches[number + 1].start, batches[number + 1].stop)
                        # Not waited for: this connection holds a batch, and two such could wait for each other.
                        ahead = self._read(keys[after], held[after], 0)
                    self._send(buffers, more)
                if not more:
                    return
        finally:
            if ahead is not None:
                ahead.close()
        self._reply(Found([]))

    def _read(self, keys: Sequence[ChunkKey], sizes: Sequence[int], timeout_s: float) -> _Reading | None:
        """Have chunks brought into memory; None when there is no room within ``timeout_s``."""
        if not self._shared.budget.take(sum(sizes), timeout_s, self):
            return None
        return _Reading(self._shared, self, keys, sizes)

    def _send(self, buffers: Sequence[PoolBuffer], more: bool) -> None:
        self._channel.start(self._config.request_timeout_s)
        sizes = [buffer.nbytes - SEAL_BYTES for buffer in buffers]
        self._channel.send_frame(Found(sizes, more), [buffer.view for buffer in buffers])
        metrics.SERVER_SENT_BYTES.inc(sum(sizes))

    def _receive_chunks(self, keys: Sequence[ChunkKey], sizes: Sequence[int], durable: bool) -> int:
        """Take values from the wire into memory, one after the other; returns how many are held."""
        held = 0
        written = _Written() if durable else None
        for key, size in zip(keys, sizes, strict=True):
            self._channel.start(self._config.request_timeout_s + self._config.busy_timeout_s)
            if problem := self._receive_chunk(key, size, written):
                metrics.SERVER_NOT_HELD.labels(problem).inc()
            else:
                held += 1
        if written is None:
            return held
        done = written.wait(self._config.request_timeout_s)
        metrics.SERVER_NOT_HELD.labels("not written").inc(held - done)
        return done

    def _receive_chunk(self, key: ChunkKey, size: int, written: _Written | None) -> str:
        """Why the chunk is not held, empty when it is."""
        nbytes, budget = size + SEAL_BYTES, self._shared.budget
        if nbytes > min(self._config.max_chunk, budget.nbytes):
            self._channel.discard(nbytes)
            return "too large"
        if not budget.take(nbytes, self._config.busy_timeout_s, self):
            self._channel.discard(nbytes)
            return "busy"
        buffer = self._store.allocate(nbytes)
        try:
            if buffer is None:
                self._channel.discard(nbytes)
                problem = "no room"
            else:
                self._channel.receive_into(buffer.view)
                # The reader of a chunk checks its bytes; hashing them here as well would cost a fifth of the speed.
                problem = "" if protocol.seal_fits(key, size, buffer.view[size:]) else "no seal"
        except BaseException:
            problem = "broken off"
            raise
        finally:
            if problem:
                budget.give(nbytes, self)
                if buffer is not None:
                    buffer.release()
        metrics.SERVER_RECEIVED_BYTES.inc(size)
        if problem == "no seal":
            self._shared.complaints.add("seal", self._peer, f"{key} does not bear a seal of its own")
        if problem or buffer is None:
            return problem
        if written is None:
            self._store.put(key, buffer)
            budget.give(nbytes, self)
        else:
            self._store.put(key, buffer, on_written=written.expect(lambda: budget.give(nbytes, self)))
        return ""


class _Reading:
    """Chunks on their way into memory, and their share of the budget."""

    def __init__(self, shared: Shared, holder: Connection, keys: Sequence[ChunkKey], sizes: Sequence[int]) -> None:
        self._shared = shared
        self._holder = holder
        self._sizes = sizes
        self._buffers: list[PoolBuffer] = []
        self._lease: Lease | None = None
        try:
            # Any size is read: a chunk of another size than the client expects is not damaged.
            self._lease = shared.store.acquire(keys, [ANY_SIZE] * len(keys))
        finally:
            if self._lease is None:
                shared.budget.give(sum(sizes), holder)

    def __enter__(self) -> list[PoolBuffer]:
        """The leading chunks that could be read and have the expected sizes; valid inside the ``with``."""
        assert self._lease is not None
        try:
            self._lease.wait(2 * self._shared.config.storage.read_timeout_s)
            # Handles of our own, as the lease may run out before a slow client has read everything.
            self._buffers = self._lease.share()
        finally:
            self._lease.close()
        for count, (buffer, size) in enumerate(zip(self._buffers, self._sizes, strict=False)):
            if buffer.nbytes != size:
                return self._buffers[:count]
        return self._buffers

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None
            for buffer in self._buffers:
                buffer.release()
            self._shared.budget.give(sum(self._sizes), self._holder)


class _Written:
    """Counts writes that are waited for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = self._held = 0

    def expect(self, then: Callable[[], None]) -> Callable[[bool], None]:
        """One more; returns what reports it, which calls ``then`` first."""
        with self._changed:
            self._left += 1

        def report(held: bool) -> None:
            then()
            with self._changed:
                self._left -= 1
                self._held += held
                self._changed.notify_all()

        return report

    def wait(self, timeout_s: float) -> int:
        """How many were written, when all have been reported or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left, timeout_s)
            return self._held


def _batches(sizes: Sequence[int], most_bytes: int) -> Iterator[range]:
    """Runs of indices whose sizes stay below the limits; each has at least one."""
    start = nbytes = 0
    for at, size in enumerate(sizes):
        if at > start and (nbytes + size > most_bytes or at - start == BATCH_CHUNKS):
            yield range(start, at)
            start, nbytes = at, 0
        nbytes += size
    if start < len(sizes):
        yield range(start, len(sizes))
