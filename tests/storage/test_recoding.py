"""Compression and encryption around backends."""

from __future__ import annotations

import base64
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zstandard", reason="zstandard is not installed")
pytest.importorskip("cryptography", reason="cryptography is not installed")

from lmcache import metrics
from lmcache.errors import ConfigError
from lmcache.keys import ChunkKey, namespace
from lmcache.storage.base import StorageBackend
from lmcache.storage.compression import Zstd
from lmcache.storage.encryption import OVERHEAD
from lmcache.storage.pool import PinnedPool
from lmcache.storage.recoding import Scratch
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key, take

put, get = BackendTests.put, BackendTests.get
CHUNK = 20_000


def disk(path: Path) -> dict[str, Any]:
    return {"type": "disk", "path": str(path / "kv")}


def key_file(path: Path, number: int = 0) -> str:
    file = path / f"key-{number}"
    if not file.exists():
        file.write_bytes(random.Random(number).randbytes(32))
        file.chmod(0o600)
    return str(file)


def encrypted(path: Path, inner: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"type": "encrypted", "keys": [key_file(path)], "inner": inner or disk(path), **options}


def zstd(path: Path, inner: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"type": "zstd", "inner": inner or disk(path), **options}


class RecodingTests(BackendTests):
    options: Callable[[Path], dict[str, Any]]

    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: build_backend(type(self).options(tmp_path), "test")


class TestZstd(RecodingTests):
    options = zstd


class TestEncrypted(RecodingTests):
    options = encrypted


class TestZstdOverEncrypted(RecodingTests):
    options = staticmethod(lambda path: zstd(path, encrypted(path)))


class TestEncryptedOverZstd(RecodingTests):
    options = staticmethod(lambda path: encrypted(path, zstd(path)))


class TestAuditOverAll(RecodingTests):
    options = staticmethod(lambda path: {"type": "audit", "inner": zstd(path, encrypted(path), scratch=2 << 20)})


@pytest.fixture
def pool() -> Iterator[PinnedPool]:
    pool = PinnedPool(16 << 20)
    yield pool
    assert pool.used_bytes == 0
    pool.close()


Opened = Callable[[dict[str, Any]], Any]


@pytest.fixture
def opened() -> Iterator[Opened]:
    backends: list[StorageBackend] = []

    def make(options: dict[str, Any]) -> StorageBackend:
        backends.append(build_backend(options, "test"))
        return backends[-1]

    yield make
    for backend in backends:
        scratch = getattr(backend, "_scratch", None)
        assert scratch is None or scratch._pool.used_bytes == 0, "scratch memory leaked"
        backend.close()


def store(backend: StorageBackend, pool: PinnedPool, key: ChunkKey, data: bytes) -> int:
    buffer = take(pool, len(data))
    buffer.view[:] = data
    try:
        return backend.put([key], [buffer])
    finally:
        buffer.release()


def stored_bytes(backend: Any, key: ChunkKey, pool: PinnedPool) -> bytes:
    (size,) = backend.inner.sizes([key])
    data = get(backend.inner, pool, key, size)
    assert data is not None
    return data


# -- zstd --------------------------------------------------------------------------------------------------------------


def test_what_shrinks_is_stored_small_and_what_does_not_costs_16_bytes(
    tmp_path: Path, pool: PinnedPool, opened: Opened
) -> None:
    backend = opened(zstd(tmp_path))
    store(backend, pool, make_key(1), b"KV" * 50_000)
    noise = random.Random(1).randbytes(100_000)
    store(backend, pool, make_key(2), noise)
    assert backend.inner.sizes([make_key(1)])[0] < 1000
    assert backend.inner.sizes([make_key(2)]) == [100_016]
    assert get(backend, pool, make_key(1), 100_000) == b"KV" * 50_000
    assert get(backend, pool, make_key(2), 100_000) == noise


def test_lengths_are_known_in_another_process_too(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    keys, lengths = [make_key(n) for n in range(5)], [1, 5000, 70_000, 5000, 123]
    for key, length in zip(keys, lengths, strict=True):
        store(opened(zstd(tmp_path)), pool, key, b"x" * length)
    fresh = opened(zstd(tmp_path))
    assert fresh.sizes(keys) == lengths
    assert fresh.contains(keys) == 5


def test_a_question_for_sizes_reads_no_more_than_its_lookahead(
    tmp_path: Path, pool: PinnedPool, opened: Opened
) -> None:
    writer = opened(zstd(tmp_path))
    keys = [make_key(n) for n in range(10)]
    for number, key in enumerate(keys):
        store(writer, pool, key, random.Random(number).randbytes(10_000))
    fresh = opened(zstd(tmp_path, lookahead=35_000))
    assert fresh.contains(keys) == 10
    assert fresh.sizes(keys) == [10_000] * 3
    assert fresh.sizes(keys) == [10_000] * 6, "those that were read are known, and the next are read"
    assert opened(zstd(tmp_path, lookahead=1)).sizes(keys) == [10_000], "one at least, or nothing could be read"


def test_of_a_uniform_format_one_length_tells_of_all(
    tmp_path: Path, pool: PinnedPool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = opened(zstd(tmp_path))
    keys = [make_key(n) for n in range(10)] + [make_key(0, format=1)]
    for number, key in enumerate(keys):
        store(writer, pool, key, random.Random(number).randbytes(10_000 if number < 10 else 500))
    fresh: Zstd = opened(zstd(tmp_path, uniform=True))
    reads: list[int] = []
    inner_get = fresh.inner.get
    monkeypatch.setattr(fresh.inner, "get", lambda k, b: reads.append(len(k)) or inner_get(k, b))
    assert fresh.sizes(keys) == [10_000] * 10 + [500]
    assert reads == [1, 1]  # one of each format


def test_another_length_under_the_same_key_is_a_miss_once(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    one, two = opened(zstd(tmp_path)), opened(zstd(tmp_path))
    store(one, pool, make_key(1), b"a" * 1000)
    store(two, pool, make_key(1), b"b" * 2000)  # held already
    assert get(two, pool, make_key(1), 2000) is None
    assert two.sizes([make_key(1)]) == [1000]
    assert get(two, pool, make_key(1), 1000) == b"a" * 1000


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"x",
        lambda raw: raw[:16],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: b"XXXX" + raw[4:],
        lambda raw: raw[:4] + b"\7" + raw[5:],
        lambda raw: raw[:4] + b"\0" + raw[5:],  # says that it is not compressed
        lambda raw: raw[:16] + b"\0" * (len(raw) - 16),
        lambda raw: raw[:8] + (CHUNK - 1).to_bytes(8, "little") + raw[16:],
    ],
)
def test_what_is_no_frame_is_a_miss_and_goes(
    tmp_path: Path, pool: PinnedPool, opened: Opened, damage: Callable[[bytes], bytes]
) -> None:
    backend = opened(zstd(tmp_path))
    store(backend, pool, make_key(1), b"abc" * (CHUNK // 3 - 1) + b"12345")
    raw = stored_bytes(backend, make_key(1), pool)
    backend.remove([make_key(1)])
    store(backend.inner, pool, make_key(1), damage(raw))
    before = metrics.CORRUPT_CHUNKS.labels("zstd")._value.get()
    for nbytes in (CHUNK, CHUNK - 1):
        assert get(backend, pool, make_key(1), nbytes) is None
    assert metrics.CORRUPT_CHUNKS.labels("zstd")._value.get() == before + 1
    assert backend.contains([make_key(1)]) == 0


def test_a_frame_that_unfolds_to_gigabytes_fills_only_the_buffer(
    tmp_path: Path, pool: PinnedPool, opened: Opened
) -> None:
    import zstandard

    backend = opened(zstd(tmp_path))
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    store(backend.inner, pool, make_key(1), b"LMZ1\1\0\0\0" + CHUNK.to_bytes(8, "little") + bomb)
    assert get(backend, pool, make_key(1), CHUNK) is None
    assert backend.contains([make_key(1)]) == 0


# -- scratch memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [zstd, encrypted])
def test_batches_larger_than_scratch_go_in_parts_and_chunks_larger_than_it_are_not_held(
    tmp_path: Path, pool: PinnedPool, opened: Opened, options: Callable[..., dict[str, Any]]
) -> None:
    backend = opened(options(tmp_path, scratch=100_000))
    keys = [make_key(n) for n in range(20)]
    data = [random.Random(n).randbytes(30_000) for n in range(20)]
    buffers = [take(pool, 30_000) for _ in keys]
    for buffer, content in zip(buffers, data, strict=True):
        buffer.view[:] = content
    assert backend.put(keys, buffers) == 20
    for buffer in buffers:
        buffer.view[:] = bytes(30_000)
    assert backend.get(keys, buffers) == 20
    assert [bytes(buffer.view) for buffer in buffers] == data
    for buffer in buffers:
        buffer.release()
    assert store(backend, pool, make_key(99), random.Random(9).randbytes(120_000)) == 0


def test_threads_wait_for_scratch_memory_and_all_get_some() -> None:
    scratch = Scratch(16_384)
    done: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            buffer = scratch.take(9000, wait=True)
            assert buffer is not None
            scratch.give([buffer])
        done.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(done) == [0, 1, 2, 3]
    scratch.close()


# -- encryption --------------------------------------------------------------------------------------------------------


def unreadable(why: str) -> float:
    return metrics.UNREADABLE_CHUNKS.labels(why)._value.get()


def test_the_medium_holds_neither_payload_nor_key(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    backend = opened(encrypted(tmp_path))
    secret = b"what the user wrote " * 500
    store(backend, pool, make_key(1), secret)
    store(backend, pool, make_key(2), secret)
    one, two = (stored_bytes(backend, make_key(n), pool) for n in (1, 2))
    assert len(one) == len(secret) + OVERHEAD
    assert secret[:20] not in one
    assert Path(key_file(tmp_path)).read_bytes() not in one
    assert one[20:] != two[20:]


@pytest.mark.parametrize("place", [0, 4, 19, 20, 31, 32, 5000, -17, -16, -1])
def test_a_changed_ciphertext_is_a_miss_and_counted(
    tmp_path: Path, pool: PinnedPool, opened: Opened, place: int
) -> None:
    backend = opened(encrypted(tmp_path))
    put(backend, pool, make_key(1), CHUNK, seed=1)
    raw = bytearray(stored_bytes(backend, make_key(1), pool))
    raw[place] ^= 1
    backend.remove([make_key(1)])
    store(backend.inner, pool, make_key(1), bytes(raw))
    why = "no key" if 4 <= place < 20 else "not authentic"
    before = unreadable(why)
    buffer = take(pool, CHUNK)
    assert backend.get([make_key(1)], [buffer]) == 0
    if why == "not authentic" and place != 0:
        assert not any(buffer.view), "what is not authentic stays nowhere"
    buffer.release()
    assert unreadable(why) == before + 1
    assert backend.contains([make_key(1)]) == (why == "no key")


@pytest.mark.parametrize("other", [make_key(2), make_key(1, format=1), make_key(1, tags=1)])
def test_a_ciphertext_under_another_name_does_not_decrypt(
    tmp_path: Path, pool: PinnedPool, opened: Opened, other: ChunkKey
) -> None:
    backend = opened(encrypted(tmp_path))
    put(backend, pool, make_key(1), CHUNK, seed=1)
    store(backend.inner, pool, other, stored_bytes(backend, make_key(1), pool))
    before = unreadable("not authentic")
    assert get(backend, pool, other, CHUNK) is None
    assert unreadable("not authentic") == before + 1
    assert get(backend, pool, make_key(1), CHUNK) is not None


def test_another_key_reads_nothing_and_removes_nothing_unless_told_to(
    tmp_path: Path, pool: PinnedPool, opened: Opened
) -> None:
    mine = opened(encrypted(tmp_path))
    data = put(mine, pool, make_key(1), CHUNK, seed=1)
    before = unreadable("no key")
    theirs = opened(encrypted(tmp_path, keys=[key_file(tmp_path, 1)]))
    assert get(theirs, pool, make_key(1), CHUNK) is None
    assert unreadable("no key") == before + 1
    assert get(mine, pool, make_key(1), CHUNK) == data
    assert (
        get(opened(encrypted(tmp_path, keys=[key_file(tmp_path, 1)], remove_unknown=True)), pool, make_key(1), CHUNK)
        is None
    )
    assert get(mine, pool, make_key(1), CHUNK) is None


def test_keys_rotate(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    old, new = key_file(tmp_path, 0), key_file(tmp_path, 1)
    data = put(opened(encrypted(tmp_path, keys=[old])), pool, make_key(1), CHUNK, seed=1)
    both = opened(encrypted(tmp_path, keys=[new, old]))
    assert get(both, pool, make_key(1), CHUNK) == data
    fresh = put(both, pool, make_key(2), CHUNK, seed=2)
    only = opened(encrypted(tmp_path, keys=[new]))
    assert get(only, pool, make_key(2), CHUNK) == fresh
    assert get(only, pool, make_key(1), CHUNK) is None


def test_tenants_have_keys_of_their_own(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    def of(salt: str) -> ChunkKey:
        return ChunkKey(namespace(bytes(16), {"cache_salt": salt} if salt else {}), bytes(32))

    tenants = [{"tags": {"cache_salt": "a"}, "keys": [key_file(tmp_path, 1)]}]
    backend = opened(encrypted(tmp_path, tenants=tenants))
    data = {salt: put(backend, pool, of(salt), CHUNK, seed=len(salt)) for salt in ("a", "other", "")}
    for salt, content in data.items():
        assert get(backend, pool, of(salt), CHUNK) == content
    ids = {salt: stored_bytes(backend, of(salt), pool)[4:20] for salt in data}
    assert ids["a"] != ids["other"] == ids[""]
    # Without a key for everybody else, they are not stored.
    strict = opened(encrypted(tmp_path, disk(tmp_path / "strict"), keys=[], tenants=tenants))
    assert store(strict, pool, of("b"), b"x" * 100) == 0
    assert store(strict, pool, of("a"), b"x" * 100) == 1
    assert strict.contains([of("b")]) == 0


def test_keys_come_in_three_spellings_and_through_a_variable(
    tmp_path: Path, pool: PinnedPool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Path(key_file(tmp_path)).read_bytes()
    data = put(opened(encrypted(tmp_path)), pool, make_key(1), CHUNK, seed=1)
    for name, content in (("hex", raw.hex() + "\n"), ("base64", base64.b64encode(raw).decode() + "\n")):
        file = tmp_path / name
        file.write_text(content)
        file.chmod(0o600)
        monkeypatch.setenv("KEY_FILE", str(file))
        assert get(opened(encrypted(tmp_path, keys=["$KEY_FILE"])), pool, make_key(1), CHUNK) == data


def test_keys_that_cannot_be_used_are_refused_and_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = tmp_path / "bad"
    bad.write_text("topsecret" * 5)
    for keys, message in (
        ([str(bad)], "must hold 32 bytes"),
        ([str(tmp_path / "none")], "No such file"),
        ([], "needs"),
        (["$NO_SUCH_KEY/key"], "the environment variable NO_SUCH_KEY is not set"),
        (["${NO_SUCH_KEY}"], "the environment variable NO_SUCH_KEY is not set"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            build_backend(encrypted(tmp_path, keys=keys), "test")
        assert "topsecret" not in str(caught.value)
    open_to_all = Path(key_file(tmp_path, 3))
    os.chmod(open_to_all, 0o644)
    build_backend(encrypted(tmp_path, keys=[str(open_to_all)]), "test").close()
    assert "can be read by others" in caplog.text
    assert open_to_all.read_bytes().hex() not in caplog.text
