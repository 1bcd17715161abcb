"""The byte path to a Redis server: commands and replies on the socket of a redis-py connection.

redis-py connects, authenticates and knows the topology, but its replies are fresh ``bytes``. Here a bulk value goes
from the socket into the buffer that it is meant for, and from a pool buffer to the socket, without a copy in Python.

    $4198400\r\n  header (4096 bytes)  payload .............. \r\n      the reply to GET
    └ small buffer, read ahead ┘       └ caller's buffer ┘

The protocol is RESP2, so that nothing arrives that was not asked for.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from redis.connection import Connection, ConnectionPool

Part: TypeAlias = bytes | memoryview
Reply: TypeAlias = "int | bytes | ErrorReply | list[Reply] | None"

READ_AHEAD_BYTES = 16 << 10
# Bounds of replies that are not read into a caller's buffer; only a stream out of step exceeds them.
MOST_BULK_BYTES, MOST_ITEMS = 1 << 20, 1 << 20
MOST_PARTS = 1024  # of one sendmsg, as Linux has it
JOINED_BYTES = 256 << 10


class ErrorReply(NamedTuple):
    """``-CODE text`` from the server."""

    text: str

    @property
    def code(self) -> str:
        return self.text.partition(" ")[0]


class OutOfStep(ConnectionError):
    """What arrived is not a reply to what was asked; the connection is of no more use."""


def command(*arguments: bytes) -> bytes:
    """A command as it goes over the wire."""
    return b"*%d\r\n" % len(arguments) + b"".join(map(bulk_string, arguments))


def bulk_string(data: bytes) -> bytes:
    """One argument of a command."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


class Wire:
    """One connection of a pool while an operation uses it. Every call raises OSError when it fails or is late.

    After a failure, or with replies outstanding, ``give_back`` drops the connection: a stream that is out of step would
    hand out another key's bytes.
    """

    def __init__(self, pool: ConnectionPool, deadline: float) -> None:
        self._pool = pool
        self._connection: Connection = pool.get_connection()
        sock: socket.socket | None = self._connection._sock
        assert sock is not None, "a pool hands out connections that are connected"
        self._sock = sock
        self._vectored = not isinstance(self._sock, ssl.SSLSocket)
        self._deadline = deadline
        self._buffer = bytearray(READ_AHEAD_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0
        self._awaited = 0
        self._whole = True
        self._aborted = False

    def give_back(self, *, keep: bool = True) -> None:
        """To the pool; closed before when the exchange is not whole, or ``keep`` is false."""
        whole = self._whole and not self._aborted and not self._awaited and self._begin == self._end
        if not (keep and whole):
            self._connection.disconnect()  # type: ignore[no-untyped-call]
        else:
            self._sock.settimeout(self._connection.socket_timeout)
        self._pool.release(self._connection)

    def abort(self) -> None:
        """End what another thread does on it; that thread closes it. Never blocks."""
        self._aborted = True
        try:
            # Not SSLSocket's own, which would make the other thread go on without TLS.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            return  # it is closed already

    def send(self, parts: Sequence[Part], replies: int) -> None:
        """Send whole commands that ``replies`` replies will answer."""
        self._awaited += replies
        self._whole = False
        if self._vectored:
            for first in range(0, len(parts), MOST_PARTS):
                self._sendmsg(list(parts[first : first + MOST_PARTS]))
        else:
            # Each call is a TLS record or more, so many small parts are made one.
            for part in parts if sum(map(len, parts)) > JOINED_BYTES else (b"".join(parts),):
                self._sock.settimeout(self._left())
                self._sock.sendall(part)
        self._whole = True

    def reply(self) -> Reply:
        """The next reply, whatever it is, as an object."""
        value = self._parse(self._line())
        self._awaited -= 1
        return value

    def bulk(self) -> int | ErrorReply | None:
        """Length of the bulk string that comes next (then ``into``/``skip`` it and ``end``), None for nil."""
        line = self._line()
        if line.startswith(b"$") and line != b"$-1":
            return _number(line)
        value = self._parse(line)
        self._awaited -= 1
        if value is None or isinstance(value, ErrorReply):
            return value
        raise OutOfStep(f"a bulk string was expected, got {bytes(line[:20])!r}")

    def into(self, view: memoryview) -> None:
        """The next bytes of a bulk string into ``view``."""
        ready = min(len(view), self._end - self._begin)
        view[:ready] = self._view[self._begin : self._begin + ready]
        self._begin += ready
        while ready < len(view):
            ready += self._receive(view[ready:])

    def skip(self, nbytes: int) -> None:
        """Throw away the next bytes of a bulk string."""
        while nbytes:
            if self._begin == self._end:
                self._fill()
            ready = min(nbytes, self._end - self._begin)
            self._begin += ready
            nbytes -= ready

    def end(self) -> None:
        """The line end behind a bulk string."""
        self._line_end()
        self._awaited -= 1

    def _line_end(self) -> None:
        while self._end - self._begin < 2:
            self._fill()
        if self._buffer[self._begin : self._begin + 2] != b"\r\n":
            raise OutOfStep("a value does not end where it should")
        self._begin += 2

    def _line(self) -> bytearray:
        while (end := self._buffer.find(b"\r\n", self._begin, self._end)) < 0:
            if self._end - self._begin == READ_AHEAD_BYTES:
                raise OutOfStep("a line without an end")
            self._fill()
        line = self._buffer[self._begin : end]
        self._begin = end + 2
        return line

    def _parse(self, line: bytearray) -> Reply:
        kind = line[:1]
        if kind == b"+":
            return bytes(line[1:])
        if kind == b"-":
            return ErrorReply(line[1:].decode(errors="replace"))
        if kind == b":":
            return _number(line)
        if bytes(line) in (b"$-1", b"*-1", b"_"):
            return None
        length = _number(line)
        if kind == b"$" and length <= MOST_BULK_BYTES:
            data = bytearray(length)
            self.into(memoryview(data))
            self._line_end()
            return bytes(data)
        if kind == b"*" and length <= MOST_ITEMS:
            return [self._parse(self._line()) for _ in range(length)]
        raise OutOfStep(f"not a reply: {bytes(line[:20])!r}")

    def _fill(self) -> None:
        """Read ahead; at least one byte more."""
        if self._begin:
            held = self._end - self._begin
            self._view[:held] = bytes(self._view[self._begin : self._end])
            self._begin, self._end = 0, held
        self._end += self._receive(self._view[self._end :])

    def _receive(self, view: memoryview) -> int:
        self._sock.settimeout(self._left())
        got = self._sock.recv_into(view)
        if not got:
            raise ConnectionResetError("the server closed the connection")
        return got

    def _sendmsg(self, parts: list[Part]) -> None:
        while parts:
            self._sock.settimeout(self._left())
            sent = self._sock.sendmsg(parts)
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = memoryview(parts[0])[sent:]

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer within the deadline")
        return left


def _number(line: bytearray) -> int:
    digits = line[1:]
    if not digits.isdigit() or len(digits) > 19:
        raise OutOfStep(f"not a length or a number: {bytes(line[:20])!r}")
    return int(digits)
