"""The client of the server: a bounded pool of connections, and a deadline for every call.

A call that fails is not tried again here: that is the manager's (``retry:``). A connection that the server has closed
meanwhile is noticed before anything is sent over it, and another one is opened.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import xxhash
from pydantic import Field, field_validator

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ClosedError, ConfigError, ProtocolError, StorageError
from lmcache.forks import Home
from lmcache.keys import ChunkKey
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.channel import Channel, TlsChannel
from lmcache.storage.backends.lm.protocol import (
    MAX_HEAD_BYTES,
    MAX_HELLO_BYTES,
    MAX_KEYS,
    SEAL_BYTES,
    Failed,
    Found,
    join_keys,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_PORT: Final = 7420
PLAIN, TLS = "lm", "lms"
# A payload is hashed in pieces, each just before it is sent or after it has come: in a core's cache that takes a fifth
# of the time that it takes from memory. With several connections at work a piece also costs a turn of the interpreter
# lock, which is more than what a smaller one gains.
PIECE_BYTES: Final = 1 << 20
PIECE_BYTES_IN_A_CROWD: Final = 4 << 20


class ClientConfig(Config):
    """Options of ``{type: remote, url: "lm://host:port"}``; ``lms://`` is the same over TLS."""

    url: str = Field(description=f"lm://host:port or lms://host:port; the port is {DEFAULT_PORT} unless given")
    token_file: Path | None = Field(None, description="file with the token that the server asks for")
    ca_file: Path | None = Field(None, description="certificates that may sign the server's; null: the system's")
    cert_file: Path | None = Field(None, description="certificate of this client, where the server asks for one")
    key_file: Path | None = Field(None, description="its private key; null: it is in cert_file")
    durable: bool = Field(False, description="a put is done when a tier below the server's memory has the chunk")
    connections: int = Field(4, ge=1, le=256, description="connections at most; further calls wait for one")
    connect_timeout_s: float = Field(2.0, gt=0, description="deadline of a connection, handshake included")
    timeout_s: float = Field(10.0, gt=0, description="deadline of one call, waiting for a connection included")

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            port_is_fine = parts.port != 0
        except ValueError:
            port_is_fine = False
        extras = parts.username or parts.password or parts.query or parts.fragment or parts.path.strip("/")
        if parts.scheme not in (PLAIN, TLS) or not parts.hostname or not port_is_fine or extras:
            raise ValueError(f"expected lm://host:port or lms://host:port, and nothing else; got {url!r}")
        return url


class Refused(StorageError):
    """The server understood and said no."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(f"{failed.message} ({failed.code})")
        self.in_step = failed.code in ("busy", "failed")
        """Whether the connection can go on after it."""


class Client:
    """Speaks to one server. Thread-safe; connects when it is first needed. Every call ends within ``timeout_s``.

    StorageError when the server cannot be reached, breaks off, hangs or refuses. What it sends is checked by its seals.
    """

    def __init__(self, config: ClientConfig) -> None:
        parts = urlsplit(config.url)
        self._config = config
        self._home = Home("this client")
        self._address = (parts.hostname or "", parts.port or DEFAULT_PORT)
        self._place = f"{self._address[0]}:{self._address[1]}"
        self._token = read_token(config.token_file)
        self._tls = _tls_context(config) if parts.scheme == TLS else None
        self._slots = threading.BoundedSemaphore(config.connections)
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._busy: set[Channel] = set()
        self._closed = threading.Event()

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Payload bytes of each of the leading run of ``keys`` that the server holds."""
        sizes: list[int] = []
        for part in _parts(keys):
            found = self._call(lambda channel: _ask(channel, protocol.Sizes(join_keys(part)), Found)).sizes  # noqa: B023
            if len(found) > len(part):
                raise ProtocolError(
                    f"{self._config.url}: sizes of {len(found)} chunks where {len(part)} were asked for"
                )
            sizes += found
            if len(found) < len(part):
                break
        return sizes

    def get(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> int:
        """Fill ``into`` with the payloads; stops at the first miss. Returns how many are good."""
        count = 0
        for part in _parts(keys):
            views = into[count : count + len(part)]
            whole: list[bool] = []
            try:
                self._call(lambda channel: _get(channel, part, views, whole, self._piece_bytes()))  # noqa: B023
            except StorageError:
                if not count and True not in whole[:1]:
                    raise
            good = next((at for at, is_whole in enumerate(whole) if not is_whole), len(whole))
            count += good
            if good < len(whole):
                self._forget(part[good])
            if good < len(part):
                break
        return count

    def put(self, keys: Sequence[ChunkKey], payloads: Sequence[memoryview]) -> int:
        """Returns how many of them the server has acknowledged."""
        count = at = 0
        durable = self._config.durable
        for part in _parts(keys):
            views = payloads[at : at + len(part)]
            count += self._call(lambda channel: _put(channel, part, views, durable, self._piece_bytes()))  # noqa: B023
            at += len(part)
        return count

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        """Returns how many were there."""
        asks = [protocol.Remove(join_keys(part)) for part in _parts(keys)]
        return sum(self._call(lambda channel: _ask(channel, ask, protocol.Count)).count for ask in asks)  # noqa: B023

    def clear(self, fingerprint: bytes | None = None, tenant: bytes | None = None) -> int:
        """Removes the chunks of one format, of one tenant, or all. Returns how many."""
        ask = protocol.Clear(fingerprint, tenant)
        return self._call(lambda channel: _ask(channel, ask, protocol.Count)).count

    def close(self) -> None:
        """End every connection; calls under way fail. Idempotent."""
        if self._home.left:
            return
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
            for channel in self._busy:
                channel.shutdown()
        for channel in idle:
            channel.close()

    def _piece_bytes(self) -> int:
        return PIECE_BYTES if len(self._busy) <= 1 else PIECE_BYTES_IN_A_CROWD

    def _forget(self, key: ChunkKey) -> None:
        metrics.CORRUPT_CHUNKS.labels(PLAIN).inc()
        logger.warning("removed %s from %s: the seal is not that of these bytes", key, self._config.url)
        with contextlib.suppress(StorageError):  # it is a miss in any case, and is found again
            self.remove([key])

    def _call(self, exchange: Callable[[Channel], T]) -> T:
        """``exchange`` on a connection of its own."""
        self._home.check()
        deadline = time.monotonic() + self._config.timeout_s
        if not self._slots.acquire(timeout=self._config.timeout_s):
            raise StorageError(f"{self._config.url}: all {self._config.connections} connections are in use")
        try:
            return self._exchange(exchange, deadline)
        except OSError as error:
            raise StorageError(f"{self._config.url}: {error}") from error
        finally:
            self._slots.release()

    def _exchange(self, exchange: Callable[[Channel], T], deadline: float) -> T:
        channel = self._take(deadline)
        in_step = False
        try:
            channel.start(max(0.0, deadline - time.monotonic()))
            result = exchange(channel)
            in_step = True
            return result
        except Refused as error:
            in_step = error.in_step
            raise
        finally:
            with self._lock:
                self._busy.discard(channel)
                # A connection whose exchange broke holds half an answer: it is never used again.
                if keep := in_step and not self._closed.is_set():
                    self._idle.append(channel)
            if not keep:
                channel.close()

    def _take(self, deadline: float) -> Channel:
        """An idle connection, or a new one. An idle one that can be read was closed by the server: it is dropped."""
        while True:
            with self._lock:
                if self._closed.is_set():
                    raise ClosedError("the client is closed")
                channel = self._idle.pop() if self._idle else None
                if channel is not None:
                    self._busy.add(channel)
            if channel is None:
                return self._connect(min(self._config.connect_timeout_s, deadline - time.monotonic()))
            if not channel.readable(0):
                return channel
            with self._lock:
                self._busy.discard(channel)
            channel.close()

    def _connect(self, timeout_s: float) -> Channel:
        if timeout_s <= 0:
            raise TimeoutError("no time is left to connect")
        deadline = time.monotonic() + timeout_s
        sock = socket.create_connection(self._address, timeout_s)
        channel: Channel | None = None
        try:
            channel = Channel(sock) if self._tls is None else TlsChannel(self._shake_hands(sock, self._tls))
            with self._lock:
                if self._closed.is_set():
                    raise ClosedError("the client is closed")
                self._busy.add(channel)
            channel.start(max(0.0, deadline - time.monotonic()))
            self._greet(channel)
        except BaseException:
            if channel is not None:
                with self._lock:
                    self._busy.discard(channel)
                channel.close()
            sock.close()
            raise
        return channel

    def _shake_hands(self, sock: socket.socket, tls: ssl.SSLContext) -> ssl.SSLSocket:
        try:
            return tls.wrap_socket(sock, server_hostname=self._address[0])
        except TimeoutError:
            raise TimeoutError(f"no TLS handshake with {self._place}: is it an lmcache server with TLS?") from None
        except ssl.SSLError as error:
            # What a server without TLS says first is no TLS record.
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
                raise StorageError(f"{self._place}: the server has no TLS: use {PLAIN}://") from error
            raise

    def _greet(self, channel: Channel) -> None:
        try:
            hello = _expect(channel.receive_frame(protocol.HELLO, MAX_HELLO_BYTES), protocol.Hello)
        except TimeoutError:
            doubt = "is it an lmcache server" + (", and does it speak TLS (lms://)?" if self._tls is None else "?")
            raise TimeoutError(f"no greeting from {self._place}: {doubt}") from None
        nonce = secrets.token_bytes(protocol.NONCE_BYTES)
        token = self._token
        proof = protocol.prove(token, "client", hello.nonce, nonce) if token and hello.needs_token else b""
        channel.send_frame(protocol.Login(nonce, proof))
        welcome = _expect(channel.receive_frame(protocol.WELCOME, MAX_HELLO_BYTES), protocol.Welcome)
        if token and not hmac.compare_digest(welcome.proof, protocol.prove(token, "server", nonce, hello.nonce)):
            raise Refused(Failed("auth", "the server does not know our token"))
        if self._config.durable and not welcome.durable:
            raise Refused(Failed("protocol", "durable is asked for, and the server has no tier below memory"))


def read_token(file: Path | None) -> bytes:
    """The token in ``file`` without the white space around it; empty where there is no file. ConfigError."""
    if file is None:
        return b""
    try:
        token = file.expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the token: {error}") from error
    if not token:
        raise ConfigError(f"the token file {file} is empty")
    return token


@contextlib.contextmanager
def naming(**files: Path | None) -> Iterator[None]:
    """Around what uses these files of TLS, by their options: a ConfigError names the one that is at fault."""
    given = {what: file for what, file in files.items() if file is not None}
    for what, file in given.items():
        try:
            file.expanduser().open("rb").close()
        except OSError as error:
            raise ConfigError(f"cannot read the {what} {file}: {error.strerror}") from error
    try:
        yield
    except OSError as error:
        names = ", ".join(f"{what} {file}" for what, file in given.items())
        raise ConfigError(f"cannot use the {names}: {error}") from error


def _tls_context(config: ClientConfig) -> ssl.SSLContext:
    with naming(ca_file=config.ca_file):
        context = ssl.create_default_context(cafile=config.ca_file and str(config.ca_file.expanduser()))
    if config.cert_file is not None:
        with naming(cert_file=config.cert_file, key_file=config.key_file):
            context.load_cert_chain(config.cert_file.expanduser(), config.key_file and config.key_file.expanduser())
    return context


def _parts(keys: Sequence[ChunkKey]) -> list[Sequence[ChunkKey]]:
    return [keys[at : at + MAX_KEYS] for at in range(0, len(keys), MAX_KEYS)]


def _expect(frame: tuple[object, int], kind: type[T], payload_bytes: int | None = 0) -> T:
    """The head of a frame that has to be a ``kind``; payload_bytes: that have to follow, None for any."""
    message, nbytes = frame
    if isinstance(message, Failed):
        raise Refused(message)
    if not isinstance(message, kind) or (payload_bytes is not None and nbytes != payload_bytes):
        raise ProtocolError(f"expected {kind.__name__}, got {type(message).__name__} and {nbytes} bytes")
    return message


def _ask(channel: Channel, request: protocol.Message, kind: type[T]) -> T:
    channel.send_frame(request)
    return _expect(channel.receive_frame(protocol.REPLY, MAX_HEAD_BYTES), kind)


def _put(
    channel: Channel, keys: Sequence[ChunkKey], payloads: Sequence[memoryview], durable: bool, piece_bytes: int
) -> int:
    sizes = [payload.nbytes for payload in payloads]
    before: bytes = protocol.encode_frame(
        protocol.Put(join_keys(keys), sizes, durable), sum(sizes) + SEAL_BYTES * len(keys)
    )
    for key, payload in zip(keys, payloads, strict=True):
        digest = xxhash.xxh3_64()
        for piece in _pieces(payload, piece_bytes):
            digest.update(piece)
            channel.send(before, piece)
            before = b""
        before = protocol.seal(key, payload.nbytes, digest.intdigest())
    channel.send(before)
    count = _expect(channel.receive_frame(protocol.REPLY, MAX_HEAD_BYTES), protocol.Count).count
    if not 0 <= count <= len(keys):
        raise ProtocolError(f"{count} of {len(keys)} chunks acknowledged")
    return count


def _get(
    channel: Channel, keys: Sequence[ChunkKey], into: Sequence[memoryview], whole: list[bool], piece_bytes: int
) -> None:
    """``whole`` grows by whether each value that comes bears its seal; it tells what had come when this raises."""
    channel.send_frame(protocol.Get(join_keys(keys), [view.nbytes for view in into]))
    came, more = memoryview(bytearray(SEAL_BYTES)), True
    while more:
        head, nbytes = channel.receive_frame(protocol.REPLY, MAX_HEAD_BYTES)
        found = _expect((head, nbytes), Found, None)
        more, first = found.more, len(whole)
        views = into[first : first + len(found.sizes)]
        if found.sizes != [view.nbytes for view in views] or (more and not views):
            raise ProtocolError("other chunks came than were asked for")
        if nbytes != sum(found.sizes) + SEAL_BYTES * len(views):
            raise ProtocolError(f"{nbytes} bytes of values for chunks of {sum(found.sizes)} bytes")
        for key, view in zip(keys[first:], views, strict=False):
            digest = xxhash.xxh3_64()
            *pieces, last = _pieces(view, piece_bytes)
            for piece in pieces:
                channel.receive_into(piece)
                digest.update(piece)
            channel.receive_into(last, came)
            digest.update(last)
            whole.append(came == protocol.seal(key, view.nbytes, digest.intdigest()))


def _pieces(view: memoryview, nbytes: int) -> list[memoryview]:
    return [view[at : at + nbytes] for at in range(0, view.nbytes, nbytes)]
