"""A blocking socket with deadlines: payloads go straight from and into the caller's buffers.

Deadlines are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO) and not Python's, because a socket with a Python timeout is a
non-blocking one: there MSG_WAITALL does nothing, and every piece costs a poll and a turn of the interpreter lock.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import msgspec

from lmcache.errors import ProtocolError
from lmcache.storage.backends.lm.protocol import PREFIX_BYTES, Message, check_head, decode_prefix, encode_frame

T = TypeVar("T")
_HEAD_PIECE_BYTES = 64 << 10
_DISCARD_BYTES = 64 << 10
_LINGER_S, _LINGER_BYTES = 0.5, 1 << 20
# The longest wait in the kernel: in between it is looked at how many bytes have moved.
_SLICE_S = 0.5
# A peer that takes longer than CRAWL_S for CRAWL_BYTES crawls.
CRAWL_S, CRAWL_BYTES = 1.0, 64 << 10
# Socket buffers of a connection within a host: small ones keep the data in the cores' caches, which saves up to a third
# of the time. Between hosts the kernel chooses their size.
_LOCAL_BUFFER_BYTES = 256 << 10


class Channel:
    """One connection, used by one thread at a time; ``shutdown`` may come from another.

    Every wait ends at the deadline that ``start`` sets, about a twentieth of a second later at the most, with
    TimeoutError; over TLS a tenth of it later at the most.
    OSError when the connection breaks, ProtocolError when the other side talks nonsense: all it can do then is close.
    """

    _slice_s: ClassVar[float] = _SLICE_S

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Since when the transfer under way, if there is one, has moved less than CRAWL_BYTES, and how many.
        self._slow_since: float | None = None
        self._slow_bytes = 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):  # it may be broken already: whatever is done with it first says so
            if sock.getpeername()[0] == sock.getsockname()[0]:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BUFFER_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LOCAL_BUFFER_BYTES)
        self._deadline, self._armed_s = 0.0, -1.0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._prepare()

    def start(self, timeout_s: float) -> None:
        """Set the deadline of what follows."""
        self._deadline = time.monotonic() + timeout_s
        wait_s = min(timeout_s, self._slice_s)
        if wait_s != self._armed_s:
            self._arm(wait_s)

    @property
    def crawls(self) -> bool:
        """Whether a transfer is under way, and the other side takes, or gives, hardly anything."""
        since = self._slow_since
        return since is not None and time.monotonic() - since > CRAWL_S

    def readable(self, timeout_s: float) -> bool:
        """Whether something, or the end, can be read within ``timeout_s``."""
        return bool(self._poll.poll(timeout_s * 1000))

    def send_frame(self, message: Message, values: Sequence[memoryview] = ()) -> None:
        """A frame with its values."""
        self.send(encode_frame(message, sum(value.nbytes for value in values)), *values)

    def send(self, *views: memoryview | bytes) -> None:
        """All of these bytes."""
        rest = [memoryview(view) for view in views]
        self._slow_bytes, self._slow_since = 0, time.monotonic()
        while rest:
            self._check_deadline()
            try:
                done = self._send_some(rest)
            except BlockingIOError:
                continue  # the kernel's timeout; our deadline is checked above
            self._moved(done)
            rest = _rest(rest, done)
        self._slow_since = None

    def receive_into(self, *views: memoryview) -> None:
        """Fill all of them."""
        rest = list(views)
        self._slow_bytes, self._slow_since = 0, time.monotonic()
        while rest:
            self._check_deadline()
            try:
                done = self._receive_some(rest)
            except BlockingIOError:
                continue
            if not done:
                raise ConnectionResetError("the other side closed the connection")
            self._moved(done)
            rest = _rest(rest, done)
        self._slow_since = None

    def receive_frame(self, decoder: msgspec.msgpack.Decoder[T], max_head_bytes: int) -> tuple[T, int]:
        """The head of the next frame, and the bytes of the payload that follows."""
        prefix = bytearray(PREFIX_BYTES)
        self.receive_into(memoryview(prefix))
        head_bytes, payload_bytes = decode_prefix(bytes(prefix), max_head_bytes)
        head = bytearray()
        # Memory is taken as bytes arrive, so that a peer cannot make us allocate by announcing a large head.
        while len(head) < head_bytes:
            piece = bytearray(min(_HEAD_PIECE_BYTES, head_bytes - len(head)))
            self.receive_into(memoryview(piece))
            head += piece
        check_head(bytes(prefix), head)
        try:
            return decoder.decode(head), payload_bytes
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"a head that cannot be read: {error}") from error

    def discard(self, nbytes: int) -> None:
        """Read and forget so many bytes."""
        scratch = memoryview(bytearray(min(nbytes, _DISCARD_BYTES)))
        while nbytes:
            view = scratch[: min(nbytes, _DISCARD_BYTES)]
            self.receive_into(view)
            nbytes -= view.nbytes

    def shutdown(self) -> None:
        """End it, from any thread: a thread that waits on it gets ConnectionResetError."""
        with contextlib.suppress(OSError):
            # Not the TLS socket's own method: that drops the TLS state, which another thread may be using.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def linger(self) -> None:
        """Before ``close``: wait until the other side has read what was sent. Closing with unread data resets the
        connection, which would drop it.
        """
        with contextlib.suppress(OSError):
            self.start(_LINGER_S)
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            self.discard(_LINGER_BYTES)

    def close(self) -> None:
        self._sock.close()

    def _prepare(self) -> None:
        self._sock.settimeout(None)

    def _arm(self, timeout_s: float) -> None:
        self._armed_s = timeout_s
        # A timeout of zero means none.
        value = struct.pack("ll", int(timeout_s), max(1000, int(timeout_s % 1 * 1e6)))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def _check_deadline(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other side is too slow")
        if left < 0.9 * self._armed_s:
            self._arm(left)

    def _moved(self, nbytes: int) -> None:
        self._slow_bytes += nbytes
        if self._slow_bytes >= CRAWL_BYTES:
            self._slow_bytes, self._slow_since = 0, time.monotonic()

    def _send_some(self, views: list[memoryview]) -> int:
        return self._sock.sendmsg(views)

    def _receive_some(self, views: list[memoryview]) -> int:
        return self._sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]


class TlsChannel(Channel):
    """A Channel over TLS. Here deadlines are Python's, and records come 16 KiB at a time."""

    _sock: ssl.SSLSocket
    _slice_s = math.inf  # after a timeout a TLS operation cannot be resumed

    def readable(self, timeout_s: float) -> bool:
        return self._sock.pending() > 0 or super().readable(timeout_s)

    def _prepare(self) -> None:
        """The handshake has been done."""

    def _arm(self, timeout_s: float) -> None:
        self._armed_s = timeout_s
        self._sock.settimeout(timeout_s)

    def _send_some(self, views: list[memoryview]) -> int:
        return self._sock.send(views[0])

    def _receive_some(self, views: list[memoryview]) -> int:
        return self._sock.recv_into(views[0])


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of ``views`` after the first ``done`` bytes."""
    for index, view in enumerate(views):
        if done < view.nbytes:
            return [view[done:], *views[index + 1 :]]
        done -= view.nbytes
    return []
