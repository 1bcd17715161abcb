"""Cases of storage_bench for the disk tier, against the same bytes moved with bare O_DIRECT calls by as many threads.

Both sides move the same batch of files in the same folder, one file a job; raw reads are of the very files that the
tier wrote. Neither side uses the page cache; that the tier does not is checked.

write, empty   the last round's files are removed, within the measured time, and new ones made; so does the raw side
write, full    the tier is full, so every chunk evicts one; the raw side writes over the files that it has
"""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.bench.storage.case import Case
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool, PoolBuffer
from lmcache.storage.testing import make_key

BATCH_BYTES = 256 << 20
THREADS = 4
FLOOR = 0.9


class _Bench:
    """A tier, raw files beside it, and buffers for one batch of chunks of ``nbytes``."""

    def __init__(self, folder: Path, nbytes: int, threads: int) -> None:
        self.nbytes, self.count = nbytes, BATCH_BYTES // nbytes
        self.folder = Path(tempfile.mkdtemp(prefix="lmcache-bench-", dir=folder))
        self.disk = self._open("kv", 4 * BATCH_BYTES, threads)
        self.full = self._open("full", self.count * (nbytes + HEADER_BYTES), threads)
        if not self.disk.direct:
            raise RuntimeError(f"{folder}: O_DIRECT is refused here, so there is nothing to compare with")
        self.raw = self.folder / "raw"
        self.raw.mkdir()
        self.pool = PinnedPool(BATCH_BYTES)
        self.buffers: list[PoolBuffer] = []
        for _ in range(self.count):
            buffer = self.pool.allocate(nbytes)
            assert buffer is not None
            buffer.view[:] = os.urandom(1 << 20) * (nbytes >> 20)
            self.buffers.append(buffer)
        self.keys = [make_key(number) for number in range(self.count)]
        self.next = 0
        self.header = memoryview(mmap.mmap(-1, HEADER_BYTES))
        self.threads = ThreadPoolExecutor(threads)

    def _open(self, name: str, capacity: int, threads: int) -> DiskBackend:
        config = DiskConfig(path=self.folder / name, capacity=capacity, threads=threads, in_flight=BATCH_BYTES)
        return DiskBackend(config)

    def put_full(self) -> None:
        keys = [make_key(self.next + number) for number in range(self.count)]
        self.next += self.count
        assert self.full.put(keys, self.buffers) == self.count

    def put(self) -> None:
        self.disk.remove(self.keys)
        assert self.disk.put(self.keys, self.buffers) == self.count

    def get(self) -> None:
        assert self.disk.get(self.keys, self.buffers) == self.count

    def raw_write(self) -> None:
        for file in self.raw.iterdir():
            file.unlink()
        self.raw_overwrite()

    def raw_overwrite(self) -> None:
        list(self.threads.map(self._raw_write, range(self.count)))

    def raw_read(self) -> None:
        list(self.threads.map(self._raw_read, range(self.count)))

    def _raw_write(self, index: int) -> None:
        file = os.open(self.raw / str(index), os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        assert os.pwritev(file, [self.header, self.buffers[index].view], 0) == HEADER_BYTES + self.nbytes
        os.close(file)

    def _raw_read(self, index: int) -> None:
        file = os.open(self.disk.file_of(self.keys[index]), os.O_RDONLY | os.O_DIRECT)
        assert os.preadv(file, [self.header, self.buffers[index].view], 0) == HEADER_BYTES + self.nbytes
        os.close(file)

    def close(self) -> None:
        self.threads.shutdown()
        self.disk.close()
        self.full.close()
        for buffer in self.buffers:
            buffer.release()
        self.buffers.clear()
        self.pool.close()
        shutil.rmtree(self.folder)


def cases(folder: Path | None = None, threads: int = THREADS) -> Iterator[Case]:
    """folder: on the disk to be measured, the current folder by default."""
    for nbytes in (16 << 20, 4 << 20):
        yield from _cases_of(_Bench(folder or Path.cwd(), nbytes, threads))


def _cases_of(bench: _Bench) -> Iterator[Case]:
    """The last one closes the bench."""
    size = f"{bench.count} x {bench.nbytes >> 20} MiB"
    case = functools.partial(Case, size=size, nbytes=BATCH_BYTES)
    yield case("disk write, empty", run=bench.put, limit=bench.raw_write, limit_name="O_DIRECT, new files", floor=FLOOR)
    yield case(
        "disk write, full",
        run=bench.put_full,
        limit=bench.raw_overwrite,
        limit_name="O_DIRECT, in place",
        floor=FLOOR,
    )
    yield case("disk read", run=bench.get, limit=bench.raw_read, limit_name="O_DIRECT", floor=FLOOR, close=bench.close)
