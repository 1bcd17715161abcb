"""A TCP proxy that does what networks do: passes on, hangs, slows down, resets midway, changes bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time


class FaultyProxy:
    """Forwards to ``127.0.0.1:port``; its fields may be changed at any time and hold for what comes after.

    hang: accept, pass nothing on.       slow_s: pause before every 64 KiB of an answer.
    rate: bytes a second that pass each way, of all connections together; None: all that can.
    reset_after: reset the connection after so many bytes of an answer. cut_after: the same of a request.
    flip_after: flip a bit of the byte at this place of an answer.
    replace: bytes that become others in answers, where they come in one piece.
    """

    def __init__(self, port: int, listen: int = 0) -> None:
        self._target = port
        self.mend()
        self.requests = 0
        self.passed_bytes = [0, 0]  # of requests, of answers
        self._free_at = [0.0, 0.0]  # when the link is free again
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._resetting: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", listen), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def mend(self) -> None:
        """From now on pass everything on."""
        self.hang = False
        self.slow_s = 0.0
        self.rate: float | None = None
        self.reset_after: int | None = None
        self.cut_after: int | None = None
        self.flip_after: int | None = None
        self.replace: dict[bytes, bytes] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(timeout=5)

    def drop(self) -> None:
        """Close every connection."""
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(client)
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            self._sockets.discard(client)
            return
        self._sockets.add(server)
        passed = [0, 0]
        up = threading.Thread(target=self._pump, args=(client, server, False, passed), daemon=True)
        up.start()
        self._pump(server, client, True, passed)
        up.join()
        for one in (client, server):
            one.close()
            self._sockets.discard(one)
            self._resetting.discard(one)

    def _take_the_link(self, answer: bool, nbytes: int) -> None:
        """Wait until so many bytes have passed a link of this rate."""
        with self._lock:
            self.passed_bytes[answer] += nbytes
            if self.rate is None:
                return
            now = time.monotonic()
            self._free_at[answer] = max(now, self._free_at[answer]) + nbytes / self.rate
            wait_s = self._free_at[answer] - now
        self._stopping.wait(wait_s)

    def _pump(self, source: socket.socket, sink: socket.socket, answer: bool, passed: list[int]) -> None:
        """passed: bytes of the request, and of the answer, that is under way; a piece of one ends the other."""
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                self.requests += not answer
                passed[not answer] = 0
                while self.hang and not self._stopping.is_set():
                    self._stopping.wait(0.02)
                if answer:
                    if self.slow_s:
                        self._stopping.wait(self.slow_s)
                    if self.flip_after is not None and passed[1] <= self.flip_after < passed[1] + len(data):
                        data[self.flip_after - passed[1]] ^= 1
                    for old, new in self.replace.items():
                        data = data.replace(old, new)
                last = self.reset_after if answer else self.cut_after
                if last is not None and passed[answer] + len(data) > last:
                    sink.sendall(data[: max(0, last - passed[answer])])
                    for one in (source, sink):
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self._resetting.add(one)  # its close() sends the RST; a shutdown would be a polite FIN
                    break
                self._take_the_link(answer, len(data))
                sink.sendall(data)
                passed[answer] += len(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RD if one in self._resetting else socket.SHUT_RDWR)
