"""Object stores: conformance against real servers, few round trips, damage, what is wrong from the start."""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("obstore", reason="obstore is not installed")

import obstore
from object_places import CHUNK, QUICK, Opened, opened, options, pool, prefix_of, seaweed

from lmcache import metrics
from lmcache.errors import ConfigError, StorageError
from lmcache.keys import NAMESPACE_BYTES, ChunkKey
from lmcache.storage.backends.objects.backend import ObjectStoreBackend
from lmcache.storage.base import StorageBackend
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.naming import chunk_key, chunk_path
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key, take
from lmcache.testing.processes import free_port, wait_until

__all__ = ["opened", "options", "pool", "seaweed"]
put, get = BackendTests.put, BackendTests.get


class TestSeaweedFS(BackendTests):
    @pytest.fixture
    def open_backend(self, options: dict[str, Any]) -> Callable[[], StorageBackend]:
        return lambda: build_backend(options, "test")


class TestSeaweedFSWithoutIndex(BackendTests):
    """Every question goes to the server."""

    @pytest.fixture
    def open_backend(self, options: dict[str, Any]) -> Callable[[], StorageBackend]:
        return lambda: build_backend({**options, "index_ttl_s": 0, "lookups": 2, "concurrency": 2}, "test")


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("moto_server is not installed (pip install 'moto[server]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path_factory.mktemp("moto") / "log").open("wb") as log:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: reachable(port), 30)
        make = urllib.request.Request(f"{endpoint}/chunks", method="PUT")
        urllib.request.urlopen(make, timeout=10).close()
        yield endpoint
    finally:
        server.kill()
        server.wait()


class TestMoto(BackendTests):
    """A second implementation of S3."""

    @pytest.fixture
    def open_backend(self, moto: str, request: pytest.FixtureRequest) -> Callable[[], StorageBackend]:
        options = {"type": "remote", "url": f"s3://chunks/{prefix_of(request)}", "endpoint": moto, "allow_http": True}
        return lambda: build_backend({**options, "access_key": "a", "secret_key": "b"}, "test")


def reachable(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def hashed_key(number: int, namespace: bytes = bytes(NAMESPACE_BYTES)) -> ChunkKey:
    """As real keys are: spread over the whole range."""
    return ChunkKey(namespace, hashlib.blake2b(number.to_bytes(8, "big"), digest_size=32).digest())


def corrupt_count() -> float:
    return metrics.CORRUPT_CHUNKS.labels("object_store")._value.get()


class Counted:
    """Counts the calls of some of obstore's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heads, self.pages = 0, 0
        self._lock = threading.Lock()
        head, list_ = obstore.head, obstore.list

        def counting_head(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.heads += 1
            return head(*args, **kwargs)

        def counting_list(*args: Any, **kwargs: Any) -> Any:
            for page in list_(*args, **kwargs):
                with self._lock:
                    self.pages += 1
                yield page

        monkeypatch.setattr(obstore, "head", counting_head)
        monkeypatch.setattr(obstore, "list", counting_list)


def test_thousands_of_keys_are_looked_up_in_two_rounds_and_then_in_none(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, lookups = 3000, 32
    writer = opened(options)
    buffer = take(pool, 16)
    keys = [hashed_key(n) for n in range(count)]
    assert writer.put(keys, [buffer] * count) == count
    buffer.release()
    reader = opened({**options, "lookups": lookups})
    counted = Counted(monkeypatch)
    assert reader.sizes(keys) == [16] * count
    # Round 1: 32 HEADs and a page, at once. Round 2: pages, at once.
    assert counted.heads == lookups
    assert 1 + 2 <= counted.pages <= 1 + 8
    before = (counted.heads, counted.pages)
    assert reader.contains(keys) == count
    assert (counted.heads, counted.pages) == before, "recent answers are not asked for again"


def test_a_missing_key_ends_the_run_wherever_it_is(options: dict[str, Any], pool: PinnedPool, opened: Opened) -> None:
    backend = opened({**options, "lookups": 4, "index_ttl_s": 0})
    namespaces = [bytes(NAMESPACE_BYTES), bytes(NAMESPACE_BYTES - 1) + b"\1"]
    keys = [hashed_key(n, namespaces[n % 2]) for n in range(60)]
    buffer = take(pool, 100)
    backend.put(keys, [buffer] * len(keys))
    buffer.release()
    assert backend.contains(keys) == 60
    for gone in (59, 30, 9, 5, 4, 3, 0):
        assert backend.remove([keys[gone]]) == 1
        assert backend.contains(keys) == gone


def test_keys_of_a_crowded_corner_are_asked_for_singly(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened({**options, "lookups": 8, "index_ttl_s": 0})
    buffer = take(pool, 16)
    backend.put([make_key(n) for n in range(1030)], [buffer] * 1030)
    buffer.release()
    counted = Counted(monkeypatch)
    assert backend.contains([make_key(n) for n in range(1005, 1030)]) == 25
    assert counted.pages <= 1  # none of the first page's names is wanted, so further pages would be wasted
    assert counted.heads == 25


def test_paths_and_keys_name_each_other() -> None:
    key = hashed_key(5)
    assert chunk_key(chunk_path(key)) == key
    for wrong in ("", "x.kv", chunk_path(key)[:-1], chunk_path(key).upper(), "../" + chunk_path(key), "a/b/c.kv"):
        assert chunk_key(wrong) is None


DAMAGE: dict[str, Callable[[bytearray], bytes]] = {
    "empty": lambda raw: b"",
    "header only": lambda raw: bytes(raw[:HEADER_BYTES]),
    "truncated by a byte": lambda raw: bytes(raw[:-1]),
    "longer": lambda raw: bytes(raw) + b"x",
    "foreign": lambda raw: b"x" * len(raw),
    "bit in the header": lambda raw: bytes([raw[0] ^ 1]) + bytes(raw[1:]),
    "bit in the payload": lambda raw: bytes(raw[:-1]) + bytes([raw[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_object_is_a_miss_counted_and_removed(
    options: dict[str, Any], pool: PinnedPool, opened: Opened, damage: str, known: bool
) -> None:
    backend = opened({**options, "index_ttl_s": 30 if known else 0})
    put(backend, pool, make_key(1), CHUNK, seed=1)
    path = chunk_path(make_key(1))
    raw = bytearray(obstore.get(backend._store, path).bytes())
    obstore.put(backend._store, path, DAMAGE[damage](raw), use_multipart=False)
    before = corrupt_count()
    backend.sizes([make_key(1)])
    assert get(backend, pool, make_key(1), CHUNK) is None
    assert corrupt_count() == before + 1
    with pytest.raises(FileNotFoundError):
        obstore.head(backend._store, path)
    data = put(backend, pool, make_key(1), CHUNK, seed=1)
    assert get(backend, pool, make_key(1), CHUNK) == data


def test_the_object_of_another_key_is_a_miss(options: dict[str, Any], pool: PinnedPool, opened: Opened) -> None:
    backend = opened(options)
    put(backend, pool, make_key(1), CHUNK, seed=1)
    raw = obstore.get(backend._store, chunk_path(make_key(1))).bytes()
    obstore.put(backend._store, chunk_path(make_key(2)), raw, use_multipart=False)
    assert backend.sizes([make_key(2)]) == [CHUNK]
    assert get(backend, pool, make_key(2), CHUNK) is None
    assert backend.sizes([make_key(2)]) == []


def test_asking_for_a_wrong_length_does_not_remove_a_good_object(
    options: dict[str, Any], pool: PinnedPool, opened: Opened
) -> None:
    backend = opened(options)
    data = put(backend, pool, make_key(1), CHUNK, seed=1)
    assert get(backend, pool, make_key(1), CHUNK + 1) is None
    assert get(backend, pool, make_key(1), CHUNK) == data


def test_objects_that_are_not_ours_are_left_alone(options: dict[str, Any], pool: PinnedPool, opened: Opened) -> None:
    backend = opened(options)
    put(backend, pool, make_key(1), CHUNK, seed=1)
    names = ["notes.txt", "00/00/x.kv", chunk_path(make_key(1)) + ".bak"]
    for name in names:
        obstore.put(backend._store, name, b"mine")
    assert backend.clear() == 1
    for name in names:
        assert bytes(obstore.get(backend._store, name).bytes()) == b"mine"


def test_two_processes_share_a_bucket(options: dict[str, Any], pool: PinnedPool, opened: Opened) -> None:
    one, two = opened(options), opened(options)
    data = put(one, pool, make_key(1), CHUNK, seed=1)
    assert put(two, pool, make_key(1), CHUNK, seed=2) != data  # held already: the first writer wins
    assert get(two, pool, make_key(1), CHUNK) == data
    assert one.remove([make_key(1)]) == 1
    assert get(two, pool, make_key(1), CHUNK) is None
    assert two.contains([make_key(1)]) == 0


def test_writers_of_one_key_and_readers_see_whole_chunks(
    options: dict[str, Any], pool: PinnedPool, opened: Opened
) -> None:
    backends = [opened({**options, "index_ttl_s": 0}) for _ in range(2)]
    expected = {random.Random(seed).randbytes(300_000) for seed in range(2)}
    wrong: list[bytes] = []

    def work(number: int) -> None:
        for _ in range(5):
            put(backends[number], pool, make_key(1), 300_000, seed=number)
            got = get(backends[1 - number], pool, make_key(1), 300_000)
            if got is not None and got not in expected:
                wrong.append(got)
            backends[number].remove([make_key(1)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"secret_key": "wrong"}, "SignatureDoesNotMatch"),
        ({"access_key": "nobody"}, "InvalidAccessKeyId"),
        ({"url": "s3://no-such-bucket/x"}, "NoSuchBucket"),
        ({"url": "s3:///x"}, "bucket/prefix"),
        ({"options": {"nonsense": "1"}}, "nonsense"),
        ({"allow_http": False}, "endpoint is http://: set allow_http: true"),
        ({"endpiont": "x"}, "unknown key endpiont; known: url, endpoint"),
        ({"url": "gs://b/x"}, "gs:// takes no access_key, secret_key; it takes endpoint"),
    ],
)
def test_what_cannot_work_is_refused_at_start(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_backend({**options, **change}, "tiers[0]")
    assert "SKTEST12345" not in str(caught.value)


def test_secrets_are_not_shown(options: dict[str, Any]) -> None:
    rest = {name: value for name, value in options.items() if name != "type"}
    assert "SKTEST12345" not in repr(ObjectStoreBackend.Config(**rest))


@pytest.mark.parametrize(
    ("url", "more"),
    [("gs://bucket/x", {}), ("az://container/x", {"access_key": "account", "secret_key": "a2V5"})],
)
def test_other_clouds_are_opened_and_may_be_away(url: str, more: dict[str, Any], opened: Opened) -> None:
    options = {"type": "remote", "url": url, "endpoint": f"http://127.0.0.1:{free_port()}", "allow_http": True}
    if url.startswith("gs"):
        more = {"options": {"skip_signature": "true"}}
    backend = opened({**options, **more, **QUICK})
    with pytest.raises(StorageError, match=url):
        backend.sizes([make_key(1)])
