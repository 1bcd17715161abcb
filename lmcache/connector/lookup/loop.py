"""A thread that receives requests at a socket and sends replies that any thread may queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import zmq

from lmcache.connector.lookup.sockets import SCHEME, bind


class RequestLoop:
    """Serves one address until ``close``.

    handle: called on the loop's thread with the sender and the body of each request; it must not raise.
    woken: called on the loop's thread after ``wake``.
    A ZMQ socket belongs to one thread, and lookups end on the storage's threads: so replies are queued, and the loop is
    woken to send them.
    """

    def __init__(self, address: str, handle: Callable[[bytes, bytes], None], woken: Callable[[], None]) -> None:
        self._address, self._handle, self._on_wake = address, handle, woken
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.set_hwm(0)  # a reply that is dropped would be a lookup that waits for its deadline
        try:
            bind(self._socket, address)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._wake_in = self._context.socket(zmq.PULL)
        self._wake_in.bind("inproc://wake")
        self._wake_out = self._context.socket(zmq.PUSH)
        self._wake_out.connect("inproc://wake")
        self._lock = threading.Lock()
        self._replies: list[tuple[bytes, bytes]] = []
        self._stopping = self._closed = self._woken = False
        self._thread = threading.Thread(target=self._serve, name="lmcache-lookup", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reply(self, client: bytes, body: bytes) -> None:
        """Send ``body`` to whom a request came from, soon."""
        with self._lock:
            self._replies.append((client, body))
        if threading.current_thread() is not self._thread:
            self.wake()

    def wake(self) -> None:
        """Have the loop call ``woken`` and send what is queued."""
        with self._lock:
            # One wake at a time: a full pipe would block its sender with the lock that the loop needs to drain it.
            if not self._closed and not self._woken:
                self._woken = True
                self._wake_out.send(b"")

    def close(self) -> None:
        """Stop, and give the address back. To be called once."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout=5)
        with self._lock:
            self._closed = True
        if not self._thread.is_alive():
            for socket in (self._socket, self._wake_in, self._wake_out):
                socket.close(linger=0)
            self._context.term()
        Path(self._address.removeprefix(SCHEME)).unlink(missing_ok=True)  # ZMQ leaves the file behind

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_in, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll())
            if self._wake_in in ready:
                self._wake_in.recv()
                with self._lock:
                    self._woken = False
                self._on_wake()
                self._send_replies()
            if self._socket in ready:
                client, body = self._socket.recv_multipart()[:2]
                self._handle(client, body)
                self._send_replies()

    def _send_replies(self) -> None:
        with self._lock:
            replies, self._replies = self._replies, []
        for client, body in replies:
            self._socket.send_multipart([client, body])
