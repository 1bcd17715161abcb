"""Cases of storage_bench for our server: chunks of 4 MiB over loopback, against a plain socket stream of as many bytes.

Both sides of the stream touch as much memory as the server and the client do, puts all of the server's capacity in
turn: one that goes round in a small buffer would measure caches. Server, stream and each client are processes of their
own; those of both sides are the same.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import multiprocessing
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from experiments.bench.storage.case import Case
from lmcache.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey
from lmcache.storage.backends.lm.client import Client, ClientConfig
from lmcache.testing.server import ServerProcess

CHUNK_BYTES = 4 << 20
CHUNKS = 64  # of one call, all clients together
CLIENTS = (1, 8)
CAPACITY_BYTES = 2 << 30
FLOOR = 0.8
_RAW = """
import mmap, socket, sys, threading
nbytes, ring, listener = int(sys.argv[1]), int(sys.argv[2]), socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def serve(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = mmap.mmap(-1, ring, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    for at in range(0, ring, nbytes):
        view[at : at + nbytes] = bytes(nbytes)
    start = 0
    while way := sock.recv(1):
        if way == b"g":
            sock.sendall(view[:nbytes])
            continue
        at, end = start, start + nbytes
        while at < end:
            at += sock.recv_into(view[at : min(end, at + (4 << 20))], 0, socket.MSG_WAITALL)
        sock.sendall(b"k")
        start = end % ring
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def cases() -> Iterator[Case]:
    """put and get, with 1 and with 8 clients."""
    for clients in CLIENTS:
        yield from _cases(clients)


def _cases(clients: int) -> Iterator[Case]:
    each = CHUNKS // clients
    server = ServerProcess(f"storage.memory.capacity={CAPACITY_BYTES}")
    stream, raw_port = _start_stream(each * CHUNK_BYTES, CAPACITY_BYTES // clients)
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    for number in range(clients):
        ours, theirs = context.Pipe()
        arguments = (theirs, number, each, server.port, raw_port)
        processes.append(context.Process(target=_client, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)

    def all_do(what: str) -> None:
        for pipe in pipes:
            pipe.send(what)
        for pipe in pipes:
            if (answer := pipe.recv()) != "done":
                raise RuntimeError(answer)

    def close() -> None:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(20)
        server.terminate()
        stream.terminate()
        stream.communicate()

    case = functools.partial(
        Case, size=f"{clients} x {each} x 4 MiB", nbytes=CHUNKS * CHUNK_BYTES, limit_name="socket", floor=FLOOR
    )
    all_do("put")
    # get first: put evicts, in the end also what is read here.
    yield case("server get", run=lambda: all_do("get"), limit=lambda: all_do("get_raw"))
    yield case("server put", run=lambda: all_do("put"), limit=lambda: all_do("put_raw"), close=close)


def _client(pipe: Connection, number: int, each: int, port: int, raw_port: int) -> None:
    """A process of one client: does what it is told until the pipe ends."""
    client = Client(ClientConfig(url=f"lm://127.0.0.1:{port}", timeout_s=60))
    memory = _memory(each * CHUNK_BYTES)
    views = [memory[at : at + CHUNK_BYTES] for at in range(0, memory.nbytes, CHUNK_BYTES)]
    raw = socket.create_connection(("127.0.0.1", raw_port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    rounds = itertools.count()

    def keys(round_: int) -> list[ChunkKey]:
        return [_key(number, round_, at) for at in range(each)]

    calls: dict[str, Callable[[], object]] = {
        # New chunks each time: what is held already would be thrown away.
        "put": lambda: _expect(client.put(keys(next(rounds)), views), each),
        "get": lambda: _expect(client.get(keys(0), views), each),
        "put_raw": lambda: _put_raw(raw, memory),
        "get_raw": lambda: _get_raw(raw, memory),
    }
    with contextlib.suppress(EOFError):
        while True:
            call = calls[pipe.recv()]
            try:
                call()
            except Exception as error:  # told to whoever measures
                pipe.send(f"client {number}: {error!r}")
            else:
                pipe.send("done")
    client.close()
    raw.close()


def _start_stream(nbytes: int, ring_bytes: int) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", _RAW, str(nbytes), str(ring_bytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
