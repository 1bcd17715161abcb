"""Cases of storage_bench for our server: chunks of 4 MiB over loopback, against a plain socket stream of as many bytes.

Both sides of the stream touch as much memory as the server and the client do: one that goes round in a small buffer
would measure caches. Server and stream are processes of their own; the clients are threads of this one, in both cases.
"""

from __future__ import annotations

import itertools
import mmap
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from experiments.storage_case import Case
from lmcache.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey
from lmcache.server.client import Client, ClientConfig

CHUNK_BYTES = 4 << 20
CHUNKS = 64  # of one call, all clients together
CLIENTS = (1, 8)
FLOOR = 0.8
_RAW = """
import mmap, socket, sys, threading
nbytes, listener = int(sys.argv[1]), socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def serve(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    view[:] = bytes(nbytes)
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
"""


def cases() -> Iterator[Case]:
    """put and get, with 1 and with 8 clients."""
    for clients in CLIENTS:
        yield from _cases(clients)


def _cases(clients: int) -> Iterator[Case]:
    each = CHUNKS // clients
    server, port = start_server("storage.memory.capacity=2GiB")
    stream, raw_port = _start_stream(each * CHUNK_BYTES)
    config = ClientConfig(url=f"lm://127.0.0.1:{port}", connections=clients, timeout_s=60)
    client = Client(config)
    memory = [_memory(each * CHUNK_BYTES) for _ in range(clients)]
    views = [[view[at : at + CHUNK_BYTES] for at in range(0, view.nbytes, CHUNK_BYTES)] for view in memory]
    raw = [socket.create_connection(("127.0.0.1", raw_port)) for _ in range(clients)]
    for sock in raw:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    rounds = itertools.count()

    def keys(number: int, round_: int) -> list[ChunkKey]:
        return [_key(number, round_, at) for at in range(each)]

    def put() -> None:
        round_ = next(rounds)  # new chunks each time: what is held already would be thrown away
        _all(clients, lambda number: _expect(client.put(keys(number, round_), views[number]), each))

    last = next(rounds)
    _all(clients, lambda number: _expect(client.put(keys(number, last), views[number]), each))

    def get() -> None:
        _all(clients, lambda number: _expect(client.get(keys(number, last), views[number]), each))

    def close() -> None:
        client.close()
        for sock in raw:
            sock.close()
        for process in (server, stream):
            process.terminate()
            process.wait(20)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    size, nbytes = f"{clients} x {each} x 4 MiB", CHUNKS * CHUNK_BYTES
    # get first: put evicts, in the end also what is read here.
    yield Case(
        "server get", size, nbytes, get, lambda: _all(clients, lambda n: _get_raw(raw[n], memory[n])), "socket", FLOOR
    )
    yield Case(
        "server put",
        size,
        nbytes,
        put,
        lambda: _all(clients, lambda n: _put_raw(raw[n], memory[n])),
        "socket",
        FLOOR,
        close=close,
    )


def start_server(*overrides: str) -> tuple[subprocess.Popen[str], int]:
    """``lmcache server`` on a free port of loopback."""
    command = [sys.executable, "-m", "lmcache.cli", "server", "port=0", "http_port=null", *overrides]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            return process, int(line.split(":")[-1])
    raise RuntimeError("the server did not start")


def _start_stream(nbytes: int) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", _RAW, str(nbytes)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def _memory(nbytes: int) -> memoryview:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    view[:] = bytes(range(256)) * (nbytes // 256)
    return view


def _key(client: int, round_: int, at: int) -> ChunkKey:
    return ChunkKey(client.to_bytes(NAMESPACE_BYTES, "big"), (round_ << 32 | at).to_bytes(DIGEST_BYTES, "big"))


def _all(clients: int, work: Callable[[int], object]) -> None:
    """``work(0)`` ... ``work(clients - 1)`` at the same time."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _expect(count: int, wanted: int) -> None:
    if count != wanted:
        raise RuntimeError(f"{count} of {wanted} chunks")


def _put_raw(sock: socket.socket, view: memoryview) -> None:
    sock.sendall(b"p")
    sock.sendall(view)
    _expect(len(sock.recv(1)), 1)


def _get_raw(sock: socket.socket, view: memoryview) -> None:
    sock.sendall(b"g")
    at = 0
    while at < view.nbytes:
        at += sock.recv_into(view[at : at + CHUNK_BYTES], 0, socket.MSG_WAITALL)


def main(chosen: Sequence[Case] | None = None) -> None:
    """A table of these cases alone: medians of interleaved rounds."""
    import statistics
    import time

    for case in chosen or cases():
        times: dict[str, list[float]] = {"own": [], "raw": []}
        assert case.limit is not None
        for _ in range(case.repeats):
            for name, call in (("own", case.run), ("raw", case.limit)):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        own, raw = (statistics.median(times[name]) for name in ("own", "raw"))
        rates = [f"{case.nbytes / seconds / 1e9:.2f}" for seconds in (own, raw)]
        best = min(times["raw"]) / min(times["own"])
        print(
            f"{case.name:12} {case.size:14} {rates[0]} GB/s, socket {rates[1]}, ratio {raw / own:.2f}, bests {best:.2f}"
        )
        case.close()


if __name__ == "__main__":
    main()
