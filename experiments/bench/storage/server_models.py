"""Which threading model moves chunks best: the figures behind lmcache/server/server.py. Run it: it prints a table.

Three servers do the same, b"p" and so many bytes in or b"g" and so many bytes out, into and from memory of their own:
a thread for each client that blocks in the kernel, one thread with an event loop (selectors), and asyncio.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
import time

NBYTES = 64 << 20  # of each client and call
ROUNDS = 7
_COMMON = """
import asyncio, mmap, selectors, socket, sys, threading
nbytes, listener = int(sys.argv[1]), socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def memory():
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(block)
    view[:] = bytes(nbytes)
    return view
"""
MODELS = {
    "thread a client": """
def serve(sock):
    view = memory()
    while way := sock.recv(1):
        if way == b"g":
            sock.sendall(view)
            continue
        at = 0
        while at < nbytes:
            at += sock.recv_into(view[at : at + (4 << 20)], 0, socket.MSG_WAITALL)
        sock.sendall(b"k")
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
""",
    "event loop": """
loop = selectors.DefaultSelector()
def step(sock, state):
    # state: memory, way, bytes done
    if state[1] is None:
        way = sock.recv(1)
        if not way:
            loop.unregister(sock)
            sock.close()
            return
        state[1:] = [way, 0]
        if way == b"g":
            loop.modify(sock, selectors.EVENT_WRITE, state)
        return
    view = state[0][state[2] : state[2] + (4 << 20)]
    state[2] += sock.recv_into(view) if state[1] == b"p" else sock.send(view)
    if state[2] == nbytes:
        if state[1] == b"p":
            sock.send(b"k")
        else:
            loop.modify(sock, selectors.EVENT_READ, state)
        state[1] = None
loop.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in loop.select():
        if key.data is None:
            sock = listener.accept()[0]
            sock.setblocking(False)
            loop.register(sock, selectors.EVENT_READ, [memory(), None, 0])
        else:
            step(key.fileobj, key.data)
""",
    "asyncio": """
async def serve(sock):
    loop, view = asyncio.get_running_loop(), memory()
    while way := await loop.sock_recv(sock, 1):
        if way == b"g":
            await loop.sock_sendall(sock, view)
            continue
        at = 0
        while at < nbytes:
            at += await loop.sock_recv_into(sock, view[at : at + (4 << 20)])
        await loop.sock_sendall(sock, b"k")
async def main():
    listener.setblocking(False)
    tasks = set()
    while True:
        sock = (await asyncio.get_running_loop().sock_accept(listener))[0]
        sock.setblocking(False)
        tasks.add(asyncio.create_task(serve(sock)))
asyncio.run(main())
""",
}


def main() -> None:
    """Medians of interleaved rounds: GB/s, and seconds of the server's processor a GB."""
    for clients in (1, 8):
        servers = {name: _Client(code, clients) for name, code in MODELS.items()}
        for way in (b"p", b"g"):
            figures: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
            for _ in range(ROUNDS):
                for name, server in servers.items():
                    figures[name].append(server.measure(way))
            for name, rows in figures.items():
                seconds, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
                gigabytes = clients * NBYTES / 1e9
                what = "put" if way == b"p" else "get"
                rate = f"{gigabytes / seconds:5.2f} GB/s {cpu / gigabytes:5.2f} CPU s/GB"
                print(f"{clients} clients {what} {name:16} {rate}")
        for server in servers.values():
            server.close()


class _Client:
    def __init__(self, code: str, clients: int) -> None:
        command = [sys.executable, "-c", _COMMON + code, str(NBYTES)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(clients)]
        self._views = [memoryview(bytearray(NBYTES)) for _ in range(clients)]
        for way in (b"p", b"g"):
            self.measure(way)

    def measure(self, way: bytes) -> tuple[float, float]:
        """Seconds of the clock and of the server's processor."""
        before, start = self._cpu_s(), time.perf_counter()
        pairs = zip(self._socks, self._views, strict=True)
        threads = [threading.Thread(target=_move, args=(way, sock, view)) for sock, view in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start, self._cpu_s() - before

    def close(self) -> None:
        for sock in self._socks:
            sock.close()
        self._process.terminate()
        self._process.communicate()

    def _cpu_s(self) -> float:
        with open(f"/proc/{self._process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _move(way: bytes, sock: socket.socket, view: memoryview) -> None:
    sock.sendall(way)
    if way == b"p":
        sock.sendall(view)
        sock.recv(1)
        return
    at = 0
    while at < view.nbytes:
        at += sock.recv_into(view[at : at + (4 << 20)], 0, socket.MSG_WAITALL)


if __name__ == "__main__":
    main()
