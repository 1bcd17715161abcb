"""Compression and encryption around backends."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("zstandard", reason="zstandard is not installed")
pytest.importorskip("cryptography", reason="cryptography is not installed")

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lmcache import metrics
from lmcache.engine.engine import pack_tokens
from lmcache.keys import ROOT_DIGEST, ChunkKey, chunk_digest, namespace, tenant_id
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.memory.staging import Staging
from lmcache.storage.registry import build_backend
from lmcache.storage.selection import Selection, clear_backend
from lmcache.storage.testing import BackendTests, make_key, take
from lmcache.storage.wrappers import encryption
from lmcache.storage.wrappers.compression import Zstd
from lmcache.storage.wrappers.encryption import OVERHEAD

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
    selects_tenants = True
    options: Callable[[Path], dict[str, Any]]

    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: build_backend(type(self).options(tmp_path), "test")


class TestZstd(RecodingTests):
    options = zstd


class TestEncrypted(RecodingTests):
    options = encrypted


class TestEncryptedWhileKeysRotate(RecodingTests):
    options = staticmethod(lambda path: encrypted(path, keys=[key_file(path, 1), key_file(path, 0)]))


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
    scratch = Staging(16_384)
    done: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            scratch.give(scratch.take(9000, 20))
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


def name_of(backend: Any, key: ChunkKey) -> ChunkKey:
    """What an encrypted chunk is called inside."""
    (name,) = backend._generations[0]._names([key])
    return name


def prompt(tokens: list[int], tags: dict[str, str] | None = None) -> ChunkKey:
    space = namespace(b"some model's KV.", tags)
    return ChunkKey(space, chunk_digest(space, ROOT_DIGEST, pack_tokens(tokens), 0))


def guessed(folder: Path, guesses: list[list[int]], spaces: list[bytes]) -> int:
    """How many guesses of a prompt somebody confirms who can list names, and knows how keys are made."""
    seen = [path.relative_to(folder).parts for path in folder.rglob("*.kv")]
    assert seen
    names = {parts[-1].removesuffix(".kv") for parts in seen}
    spaces = [*spaces, *{bytes.fromhex("".join(parts[-3:-1])) for parts in seen}]
    digests = {chunk_digest(space, ROOT_DIGEST, pack_tokens(guess), 0).hex() for guess in guesses for space in spaces}
    return len(digests & names)


@pytest.mark.parametrize("inner", [disk, lambda path: {"type": "remote", "url": f"fs://{path}/kv"}])
@pytest.mark.parametrize("tags", [None, {"cache_salt": "unknown"}, {"tag.tenant": "a", "lora.name": "x"}])
def test_who_can_list_names_confirms_no_guess_of_a_prompt(
    tmp_path: Path,
    pool: PinnedPool,
    opened: Opened,
    inner: Callable[[Path], dict[str, Any]],
    tags: dict[str, str] | None,
) -> None:
    known = list(range(63))
    guesses = [[*known, token] for token in range(500)]
    key = prompt(guesses[321], tags)
    plain = opened(inner(tmp_path / "plain"))
    put(plain, pool, key, CHUNK, seed=1)
    assert guessed(tmp_path / "plain", guesses, []) == 1, "the attack works where nothing is encrypted"
    backend = opened(encrypted(tmp_path, inner(tmp_path)))
    data = put(backend, pool, key, CHUNK, seed=1)
    assert guessed(tmp_path / "kv", guesses, [key.namespace]) == 0
    assert get(backend, pool, key, CHUNK) == data
    everything = b"".join(bytes(path) + path.read_bytes() for path in (tmp_path / "kv").rglob("*") if path.is_file())
    parts = [key.digest, key.fingerprint, key.namespace[32:], *([key.tenant] if tags else [])]
    for part in parts:
        assert part not in everything
        assert part.hex().encode() not in everything


def test_the_backend_inside_is_told_names_only(
    tmp_path: Path, pool: PinnedPool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(encrypted(tmp_path, keys=[key_file(tmp_path, 0), key_file(tmp_path, 1)]))
    told: list[object] = []
    for method in ("sizes", "contains", "get", "put", "remove", "clear", "clear_tenant"):
        original = getattr(backend.inner, method)
        monkeypatch.setattr(
            backend.inner, method, lambda *args, original=original: (told.append(args[:1]), original(*args))[1]
        )
    key = make_key(5, format=6, tags=7, tenant="a")
    put(backend, pool, key, CHUNK, seed=1)
    assert get(backend, pool, key, CHUNK) is not None
    assert get(backend, pool, key, CHUNK + 1) is None
    assert (backend.contains([key]), backend.sizes([key]), backend.remove([key])) == (1, [CHUNK], 1)
    backend.clear(key.fingerprint)
    backend.clear_tenant(key.tenant, key.fingerprint)
    assert len(told) > 7
    for part in (key.digest, key.fingerprint, key.tenant, key.namespace[32:]):
        assert repr(part)[2:-1] not in repr(told)
    assert backend.keys() is None, "names cannot be turned back into keys"


def test_tenants_and_formats_are_cleared_by_their_names(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    options = {"keys": [key_file(tmp_path, 0), key_file(tmp_path, 1)], "tenants": {"a": [key_file(tmp_path, 2)]}}
    # A wrapper around passes it on, as the manager's clear does.
    backend = opened({"type": "audit", "inner": {"type": "zstd", "inner": encrypted(tmp_path, **options)}})
    of = {
        (tenant, format, tags): make_key(1, tenant=tenant, format=format, tags=tags)
        for tenant in ("a", "b", "")
        for format in (1, 2)
        for tags in (0, 1)
    }
    for key in of.values():
        put(backend, pool, key, CHUNK, seed=1)

    def left() -> set[tuple[str, int, int]]:
        return {meaning for meaning, key in of.items() if backend.contains([key])}

    # Chunks of before the tenant had a key of its own, and of before a rotation, too.
    early = opened(encrypted(tmp_path, keys=[key_file(tmp_path, 1)]))
    put(early, pool, of["a", 1, 0], CHUNK, seed=1)
    assert clear_backend(backend, Selection(of["a", 1, 0].fingerprint, tenant_id("a"))) == 3
    assert left() == {meaning for meaning in of if meaning[:2] != ("a", 1)}
    assert get(early, pool, of["a", 1, 0], CHUNK) is None
    assert clear_backend(backend, Selection(tenant=tenant_id("b"))) == 4
    assert left() == {meaning for meaning in of if meaning[0] == "" or meaning[:2] == ("a", 2)}
    assert clear_backend(backend, Selection(of["", 2, 0].fingerprint)) == 4
    assert left() == {("", 1, 0), ("", 1, 1)}
    assert clear_backend(backend, Selection()) == 2


def test_the_medium_holds_neither_payload_nor_key(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    backend = opened(encrypted(tmp_path))
    secret = b"what the user wrote " * 500
    store(backend, pool, make_key(1), secret)
    store(backend, pool, make_key(2), secret)
    one, two = (stored_bytes(backend, name_of(backend, make_key(n)), pool) for n in (1, 2))
    assert len(one) == len(secret) + OVERHEAD
    assert secret[:20] not in one
    assert Path(key_file(tmp_path)).read_bytes() not in one
    assert one[32:] != two[32:]


def test_no_two_writings_share_a_key_and_nonce_even_where_random_numbers_repeat(
    tmp_path: Path, pool: PinnedPool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[bytes, bytes]] = []

    class Recorded:
        def __init__(self, key: bytes) -> None:
            self.key, self.cipher = key, AESGCM(key)

        def encrypt_into(self, nonce: bytes, *rest: Any) -> int:
            used.append((self.key, bytes(nonce)))
            return self.cipher.encrypt_into(nonce, *rest)

    monkeypatch.setattr(encryption, "AESGCM", Recorded)
    backend = opened(encrypted(tmp_path))
    for _ in range(20):
        store(backend, pool, make_key(1), b"x" * 100)
        backend.remove([make_key(1)])
    monkeypatch.setattr(encryption.os, "urandom", bytes)  # a machine that was cloned, say
    for number, tenant in ((2, ""), (3, ""), (2, "a")):
        store(backend, pool, make_key(number, tenant=tenant), b"x" * 100)
    assert len({key for key, _ in used}) == len({nonce for _, nonce in used}) == len(used) == 23


@pytest.mark.parametrize("place", [0, 3, 4, 31, 32, 5000, -17, -16, -1])
def test_a_changed_ciphertext_is_a_miss_and_counted(
    tmp_path: Path, pool: PinnedPool, opened: Opened, place: int
) -> None:
    backend = opened(encrypted(tmp_path))
    put(backend, pool, make_key(1), CHUNK, seed=1)
    name = name_of(backend, make_key(1))
    raw = bytearray(stored_bytes(backend, name, pool))
    raw[place] ^= 1
    backend.remove([make_key(1)])
    store(backend.inner, pool, name, bytes(raw))
    before = unreadable("not authentic")
    buffer = take(pool, CHUNK)
    assert backend.get([make_key(1)], [buffer]) == 0
    if place > 3 or place < 0:
        assert not any(buffer.view), "what is not authentic stays nowhere"
    buffer.release()
    assert unreadable("not authentic") == before + 1
    assert backend.contains([make_key(1)]) == 0


@pytest.mark.parametrize("other", [make_key(2), make_key(1, format=1), make_key(1, tags=1), make_key(1, tenant="a")])
def test_a_ciphertext_under_another_name_does_not_decrypt(
    tmp_path: Path, pool: PinnedPool, opened: Opened, other: ChunkKey
) -> None:
    backend = opened(encrypted(tmp_path))
    put(backend, pool, make_key(1), CHUNK, seed=1)
    store(backend.inner, pool, name_of(backend, other), stored_bytes(backend, name_of(backend, make_key(1)), pool))
    before = unreadable("not authentic")
    assert get(backend, pool, other, CHUNK) is None
    assert unreadable("not authentic") == before + 1
    assert get(backend, pool, make_key(1), CHUNK) is not None


def test_another_key_finds_nothing_and_removes_nothing(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    mine = opened(encrypted(tmp_path))
    data = put(mine, pool, make_key(1), CHUNK, seed=1)
    theirs = opened(encrypted(tmp_path, keys=[key_file(tmp_path, 1)]))
    assert theirs.contains([make_key(1)]) == theirs.remove([make_key(1)]) == theirs.clear(make_key(1).fingerprint) == 0
    assert get(theirs, pool, make_key(1), CHUNK) is None
    other = put(theirs, pool, make_key(1), CHUNK, seed=2)
    assert get(mine, pool, make_key(1), CHUNK) == data
    assert get(theirs, pool, make_key(1), CHUNK) == other


def test_keys_rotate(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    old, new = key_file(tmp_path, 0), key_file(tmp_path, 1)
    before = opened(encrypted(tmp_path, keys=[old]))
    data = {n: put(before, pool, make_key(n), CHUNK + n, seed=n) for n in (1, 3)}
    both = opened(encrypted(tmp_path, keys=[new, old]))
    data |= {n: put(both, pool, make_key(n), CHUNK + n, seed=n) for n in (0, 2, 4)}
    keys = [make_key(n) for n in range(6)]
    assert both.sizes(keys) == [CHUNK + n for n in range(5)], "one run, whichever key each was written with"
    assert both.contains(keys) == 5
    buffers = [take(pool, CHUNK + n) for n in range(6)]
    assert both.get(keys, buffers) == 5
    assert [bytes(buffer.view) for buffer in buffers[:5]] == [data[n] for n in range(5)]
    for buffer in buffers:
        buffer.release()
    only = opened(encrypted(tmp_path, keys=[new]))
    assert [only.contains([key]) for key in keys] == [1, 0, 1, 0, 1, 0]
    put(both, pool, make_key(1), CHUNK + 1, seed=1)
    assert only.contains([make_key(1)]) == 1, "what is written is written with the new key"
    assert both.remove([make_key(1)]) == 1, "under both keys"
    assert both.remove(keys) == 4
    assert both.contains(keys) == 0
    assert get(before, pool, make_key(1), CHUNK + 1) is None


def test_tenants_have_keys_of_their_own(tmp_path: Path, pool: PinnedPool, opened: Opened) -> None:
    def of(tags: dict[str, str]) -> ChunkKey:
        return ChunkKey(namespace(bytes(16), tags), bytes(32))

    own, theirs = key_file(tmp_path, 1), key_file(tmp_path, 0)
    backend = opened(encrypted(tmp_path, tenants={"a": [own]}))
    of_a = [{"cache_salt": "a"}, {"tag.tenant": "a"}, {"tag.tenant": "a", "cache_salt": "s", "lora.name": "x"}]
    of_a += [{"cache_salt": "a", "lmcache.kind": "segment"}]  # passages of blends
    others = [{"cache_salt": "other"}, {}, {"tag.tenant": "b", "cache_salt": "a"}]
    for number, tags in enumerate((*of_a, *others)):
        data = put(backend, pool, of(tags), CHUNK, seed=number)
        assert get(backend, pool, of(tags), CHUNK) == data
    only_a, only_default = opened(encrypted(tmp_path, keys=[own])), opened(encrypted(tmp_path, keys=[theirs]))
    assert [only_a.contains([of(tags)]) for tags in (*of_a, *others)] == [1] * 4 + [0] * 3
    assert [only_default.contains([of(tags)]) for tags in (*of_a, *others)] == [0] * 4 + [1] * 3
    # Without a key for everybody else, they are not stored.
    strict = opened(encrypted(tmp_path, disk(tmp_path / "strict"), keys=[], tenants={"a": [own]}))
    assert store(strict, pool, of({"cache_salt": "b"}), b"x" * 100) == 0
    assert store(strict, pool, of({"cache_salt": "a"}), b"x" * 100) == 1
    assert strict.contains([of({"cache_salt": "b"})]) == strict.remove([of({"cache_salt": "b"})]) == 0


def test_logs_show_names_and_never_keys(
    tmp_path: Path, pool: PinnedPool, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    backend = opened(encrypted(tmp_path))
    key = prompt(list(range(64)), {"cache_salt": "a"})
    store(backend.inner, pool, name_of(backend, key), b"LME2" + bytes(200))
    with caplog.at_level(logging.DEBUG):
        assert get(backend, pool, key, 204 - OVERHEAD) is None
    assert "not authentic" in caplog.text
    for part in (key.digest, key.tenant, key.namespace[32:]):
        assert part.hex()[:6] not in caplog.text
