"""Several processes on the folders of one disk tier, and processes that are killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from managers import settle

from lmcache import metrics
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.backends.disk.folder import Folder
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import BackendTests, make_key, take

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 20_000
SIZE = HEADER_BYTES + CHUNK
put, get = BackendTests.put, BackendTests.get


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


def open_disk(path: Path, capacity: int = 1 << 30) -> DiskBackend:
    return DiskBackend(DiskConfig(path=path, capacity=capacity))


def total(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.kv"))


def test_capacity_is_shared(tmp_path: Path, pool: PinnedPool) -> None:
    one, two = open_disk(tmp_path, 10 * SIZE), open_disk(tmp_path, 10 * SIZE)
    for number in range(10):
        put(one, pool, make_key(number), CHUNK, seed=number)
    for number in range(10, 40):
        put(two if number % 3 else one, pool, make_key(number), CHUNK, seed=number)
        assert total(tmp_path) == one.used_bytes == two.used_bytes <= 10 * SIZE
    assert total(tmp_path) == 10 * SIZE


def test_one_that_knows_of_nothing_to_evict_looks_for_what_others_wrote(tmp_path: Path, pool: PinnedPool) -> None:
    two, one = open_disk(tmp_path, 5 * SIZE), open_disk(tmp_path, 5 * SIZE)
    for number in range(5):
        put(one, pool, make_key(number), CHUNK, seed=number)
    data = put(two, pool, make_key(9), CHUNK, seed=9)
    assert get(one, pool, make_key(9), CHUNK) == data
    assert total(tmp_path) == 5 * SIZE
    assert one.contains([make_key(0)]) == 1, "it need not know yet"
    assert get(one, pool, make_key(0), CHUNK) is None, "the longest unused went"


def test_what_another_process_has_used_lately_is_spared(tmp_path: Path, pool: PinnedPool) -> None:
    one = open_disk(tmp_path, 3 * SIZE)
    for number in range(3):
        put(one, pool, make_key(number), CHUNK, seed=number)
    assert get(open_disk(tmp_path, 3 * SIZE), pool, make_key(0), CHUNK) is not None
    put(one, pool, make_key(3), CHUNK, seed=3)
    assert [get(one, pool, make_key(n), CHUNK) is not None for n in range(4)] == [True, False, True, True]


def test_a_put_is_not_taken_for_held_when_another_process_evicted_it(tmp_path: Path, pool: PinnedPool) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    put(one, pool, make_key(1), CHUNK, seed=1)
    two.remove([make_key(1)])
    data = put(one, pool, make_key(1), CHUNK, seed=1)
    assert get(two, pool, make_key(1), CHUNK) == data


def test_of_two_that_write_one_key_the_first_stays_and_bytes_count_once(tmp_path: Path, pool: PinnedPool) -> None:
    one = open_disk(tmp_path)
    folder, buffer = Folder(0, tmp_path, direct=True, fsync=False, tier="disk"), take(pool, CHUNK)
    real = Folder.publish

    def late(self: Folder, *args: object) -> bool:
        folder.publish = real.__get__(folder)
        put(one, pool, make_key(1), CHUNK, seed=1)
        return real(self, *args)

    folder.publish = late.__get__(folder)
    assert folder.write(make_key(1), buffer, []) is False
    buffer.release()
    assert get(one, pool, make_key(1), CHUNK) == random.Random(1).randbytes(CHUNK)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert one.used_bytes == SIZE == total(tmp_path)


def test_what_another_process_wrote_at_the_same_moment_counts_as_held(
    tmp_path: Path, pool: PinnedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    buffer, real = take(pool, CHUNK), Folder.publish

    def late(self: Folder, *args: object) -> bool:
        monkeypatch.setattr(Folder, "publish", real)
        put(one, pool, make_key(1), CHUNK, seed=1)
        return real(self, *args)

    monkeypatch.setattr(Folder, "publish", late)
    assert two.put([make_key(1)], [buffer]) == 1
    buffer.release()
    assert get(two, pool, make_key(1), CHUNK) == random.Random(1).randbytes(CHUNK)


def test_a_temporary_file_that_somebody_unseen_still_locks_is_left_alone(tmp_path: Path, pool: PinnedPool) -> None:
    import fcntl

    put(open_disk(tmp_path), pool, make_key(1), CHUNK, seed=1)
    (folder,) = {file.parent for file in tmp_path.rglob("*.kv")}
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    temporary = folder / f".tmp-{dead.pid}-abc-0"  # its number means somebody else in another container
    with open(temporary, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_disk(tmp_path)
        assert temporary.exists()
    open_disk(tmp_path)
    assert not temporary.exists()


WRITER = """
import sys; from pathlib import Path
from lmcache.storage.backends.disk.backend import DiskBackend, DiskConfig
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import fill, make_key
folder, first, step, capacity, nbytes = Path(sys.argv[1]), *map(int, sys.argv[2:])
disk = DiskBackend(DiskConfig(path=folder, capacity=capacity)); pool = PinnedPool(4 << 20)
buffers = [pool.allocate(nbytes) for _ in range(4)]
for n in range(first, 10**9, step):
    for i, buffer in enumerate(buffers): fill(buffer, n + i)
    assert disk.put([make_key(n + i) for i in range(4)], buffers) == 4
    print(n, flush=True)
"""


def start_writer(path: Path, first: int, step: int, capacity: int, nbytes: int) -> subprocess.Popen[str]:
    arguments = [str(value) for value in (path, first, step, capacity, nbytes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def test_sigkill_loses_nothing_acknowledged_of_two_that_write(tmp_path: Path, pool: PinnedPool) -> None:
    dice, nbytes, first, acknowledged = random.Random(4), 60_001, 0, set[int]()
    corrupt = metrics.CORRUPT_CHUNKS.labels("disk")._value.get()
    for _ in range(3):
        writers = [start_writer(tmp_path, first + 4 * number, 8, 1 << 40, nbytes) for number in range(2)]
        for _ in range(dice.randint(3, 25)):
            for writer in writers:
                acknowledged.add(int(writer.stdout.readline()))
        settle(lambda: any(tmp_path.rglob(".tmp-*")), "no write is under way")
        for writer in writers:
            writer.kill()
            rest, _ = writer.communicate()
            acknowledged.update(int(line) for line in rest.split("\n")[:-1])
        disk = open_disk(tmp_path, 1 << 40)
        assert not list(tmp_path.rglob(".tmp-*"))
        assert disk.used_bytes == total(tmp_path)
        first = 8 * (max(acknowledged) // 8 + 2)
    for number in acknowledged:
        for key in range(number, number + 4):
            assert get(disk, pool, make_key(key), nbytes) == random.Random(key).randbytes(nbytes)
    for number in range(first):
        assert get(disk, pool, make_key(number), nbytes) in (None, random.Random(number).randbytes(nbytes))
    assert metrics.CORRUPT_CHUNKS.labels("disk")._value.get() == corrupt


def test_two_processes_that_write_the_same_keys_share_a_full_tier(tmp_path: Path, pool: PinnedPool) -> None:
    nbytes, most = 150_001, 30 * (150_001 + HEADER_BYTES)
    writers = [start_writer(tmp_path, 0, 4, most, nbytes) for _ in range(2)]
    for _ in range(30):
        for writer in writers:
            assert writer.stdout.readline()
    last = 0  # of the one that is ahead, which on a busy machine may be by hundreds
    for writer in writers:
        writer.kill()
        rest, _ = writer.communicate()
        last = max([last, *map(int, rest.split("\n")[:-1])])
    disk = open_disk(tmp_path, most)
    assert disk.used_bytes == total(tmp_path) <= most
    held = [n for n in range(last + 400) if disk.contains([make_key(n)])]
    assert len(held) >= 20
    assert all(get(disk, pool, make_key(n), nbytes) == random.Random(n).randbytes(nbytes) for n in held)
