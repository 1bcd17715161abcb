"""The socket between scheduler and worker: answers, lateness, garbage, death."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
import zmq

import lmcache
from lmcache.connector.blending import Blending
from lmcache.connector.identity.adapters import Adapter
from lmcache.connector.lookup.client import LookupClient
from lmcache.connector.lookup.messages import Reply
from lmcache.connector.lookup.server import LookupServer
from lmcache.connector.passages import Passages
from lmcache.engine.engine import CacheEngine, pack_tokens
from lmcache.engine.layout import PagedCache
from lmcache.errors import ClosedError

TOKENS = pack_tokens(list(range(64)))


@pytest.fixture
def engine() -> Iterator[CacheEngine]:
    config = lmcache.load_config(overrides={"memory.capacity": "4MiB", "chunk_tokens": 32})
    with CacheEngine.open(config, "m", PagedCache.from_layers([torch.zeros(8, 2, 16, 8)])) as engine:
        engine.store(TOKENS, [[1, 2, 3, 4]])
        yield engine
    assert engine.storage.pool.used_bytes == 0


@pytest.fixture
def server(engine: CacheEngine, tmp_path: Path) -> Iterator[LookupServer]:
    server = LookupServer(engine, f"ipc://{tmp_path}/s")
    yield server
    server.close()
    server.close()
    assert not (tmp_path / "s").exists()


@pytest.fixture
def client(server: LookupServer, tmp_path: Path) -> Iterator[LookupClient]:
    client = LookupClient([f"ipc://{tmp_path}/s"])
    yield client
    client.close()


def test_a_lookup_is_held_until_it_is_taken_or_released(
    engine: CacheEngine, server: LookupServer, client: LookupClient
) -> None:
    first = client.acquire(TOKENS, {}, ())
    assert client.answer(first, 10)[:2] == (64, 0)
    held = server.take(first)
    assert held is not None
    assert held.lookup is not None
    assert held.lookup.tokens == 64
    held.close()
    assert server.take(first) is None
    second = client.acquire(TOKENS, {}, ())
    assert client.answer(second, 10)[:2] == (64, 0)
    client.release(second)
    client.reset()
    third = client.acquire(TOKENS, {}, ())  # answered after both were handled: one socket keeps its order
    assert client.answer(third, 10)[:2] == (0, 0)
    held = server.take(third)
    assert held is not None
    held.close()
    assert server.take(second) is None
    assert engine.storage.stats()["leases"] == 0


def test_tags_reach_the_keys(client: LookupClient) -> None:
    assert client.answer(client.acquire(TOKENS, {"cache_salt": "x"}, ()), 10)[:2] == (0, 0)


def test_an_adapter_that_is_not_the_one_asked_for_is_a_miss(engine: CacheEngine, tmp_path: Path) -> None:
    server = LookupServer(engine, f"ipc://{tmp_path}/a", admits=lambda adapter: adapter.files == "old")
    client = LookupClient([f"ipc://{tmp_path}/a"])
    for files, tokens in (("old", 64), ("new", 0)):
        lookup = client.acquire(TOKENS, {}, (), adapter=Adapter(1, "x", files))
        assert client.answer(lookup, 10)[:2] == (tokens, 0)
        held = server.take(lookup)
        assert (held is not None) is (tokens > 0)
        if held is not None:
            held.close()
    client.close()
    server.close()


def test_several_workers_answer_with_what_all_of_them_hold(
    engine: CacheEngine, server: LookupServer, tmp_path: Path
) -> None:
    config = lmcache.load_config(overrides={"memory.capacity": "4MiB", "chunk_tokens": 32})
    with CacheEngine.open(config, "m", PagedCache.from_layers([torch.zeros(8, 2, 16, 8)])) as other:
        other.store(TOKENS[: 4 * 32], [[1, 2]])
        second = LookupServer(other, f"ipc://{tmp_path}/t")
        client = LookupClient([f"ipc://{tmp_path}/s", f"ipc://{tmp_path}/t"])
        assert client.answer(client.acquire(TOKENS, {}, ()), 10)[:2] == (32, 0)
        client.close()
        second.close()


def test_nobody_there_is_no_answer_within_the_wait(tmp_path: Path) -> None:
    client = LookupClient([f"ipc://{tmp_path}/nobody"])
    start = time.monotonic()
    lookup = client.acquire(TOKENS, {}, ())
    assert client.answer(lookup, 0.1) is None
    client.reset()
    assert time.monotonic() - start < 2
    client.release(lookup)
    assert client.answer(lookup)[:2] == (0, 0)
    client.close()


def test_garbage_does_not_stop_the_server(
    client: LookupClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(f"ipc://{tmp_path}/s")
    for body in (b"", b"\xff" * 100, msgspec.msgpack.encode({"type": "Acquire", "lookup_id": "x"})):
        socket.send(body)
    socket.send(msgspec.msgpack.encode({"type": "Acquire", "lookup_id": 7, "tokens": 5, "tags": {}}))
    assert socket.poll(10_000)
    assert msgspec.msgpack.decode(socket.recv()) == {
        "lookup_id": 7,
        "tokens": -1,
        "reach": 0,
        "weights": "",
        "reading": False,
    }
    socket.close(0)
    context.term()
    assert client.answer(client.acquire(TOKENS, {}, ()), 10)[:2] == (64, 0)
    assert "counts as a miss" in caplog.text


def test_a_failing_engine_is_a_miss(
    engine: CacheEngine, client: LookupClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(engine, "lookup", fail)
    assert client.answer(client.acquire(TOKENS, {}, ()), 10)[:2] == (-1, 0)
    assert "broken" in caplog.text


def test_answers_that_end_on_other_threads_arrive(engine: CacheEngine, client: LookupClient) -> None:
    original, waiting = engine.lookup, threading.Event()

    def slow(tokens: bytes, on_done=None, **kwargs: object):  # type: ignore[no-untyped-def]
        lookup = original(tokens, **kwargs)  # type: ignore[arg-type]
        threading.Thread(target=lambda: waiting.wait(10) and on_done(lookup)).start()
        return lookup

    engine.lookup = slow  # type: ignore[method-assign]
    lookup_id = client.acquire(TOKENS, {}, ())
    assert client.answer(lookup_id, 0.05) is None
    waiting.set()
    assert client.answer(lookup_id, 10)[:2] == (64, 0)
    client.release(lookup_id)


def test_lookups_of_two_schedulers_are_told_apart(
    engine: CacheEngine, server: LookupServer, client: LookupClient, tmp_path: Path
) -> None:
    # One that was started anew, say: the worker still holds what the one before it asked for.
    other = LookupClient([f"ipc://{tmp_path}/s"])
    first, second = client.acquire(TOKENS, {}, ()), other.acquire(TOKENS[: 4 * 32], {}, ())
    assert first != second
    assert client.answer(first, 10)[:2] == (64, 0)
    assert other.answer(second, 10)[:2] == (32, 0)
    for lookup_id, tokens in ((first, 64), (second, 32)):
        held = server.take(lookup_id)
        assert held is not None
        assert held.lookup is not None
        assert held.lookup.tokens == tokens
        held.close()
    other.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_by_fork_is_refused_and_closes_nothing_of_its_parent(
    engine: CacheEngine, server: LookupServer, client: LookupClient, tmp_path: Path
) -> None:
    asks: list[Callable[[], object]] = [
        lambda: client.acquire(TOKENS, {}, ()),
        lambda: engine.lookup(TOKENS),
        lambda: engine.store(TOKENS, [[1, 2, 3, 4]]),
        engine.clear,
    ]

    def work() -> None:
        for ask in asks:
            with pytest.raises(ClosedError, match=f"opened by process {os.getppid()}, not this one"):
                ask()
        for each in (server, client, engine):
            each.close()

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert (tmp_path / "s").exists()
    assert client.answer(client.acquire(TOKENS, {}, ()), 10)[:2] == (64, 0)


def test_thousands_of_answers_during_a_long_call_do_not_block_anyone(
    engine: CacheEngine, server: LookupServer, client: LookupClient
) -> None:
    entered, go = threading.Event(), threading.Event()

    def clear() -> int:
        entered.set()
        assert go.wait(20)
        return 0

    engine.reset = clear  # type: ignore[method-assign]
    client.reset()
    assert entered.wait(10)
    burst = threading.Thread(target=lambda: [server._answer(b"nobody", Reply(n, 0)) for n in range(5000)])
    burst.start()
    burst.join(10)
    assert not burst.is_alive()
    assert server.take(12345) is None
    go.set()


class Finder:
    """Stands in for a worker's Blending: passages up to token 90, found when the test lets them be."""

    def __init__(self) -> None:
        self.asked, self.may_end = threading.Semaphore(0), threading.Event()
        self.closed = 0
        self.error: Exception | None = None

    def find(self, *args: object) -> Any:
        self.asked.release()
        assert self.may_end.wait(10)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(reach=90, close=self.close)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def finder() -> Finder:
    return Finder()


@pytest.fixture
def blending(engine: CacheEngine, finder: Finder, tmp_path: Path) -> Iterator[tuple[LookupServer, LookupClient]]:
    server = LookupServer(engine, f"ipc://{tmp_path}/b", cast(Blending, finder))
    client = LookupClient([f"ipc://{tmp_path}/b"])
    yield server, client
    finder.may_end.set()
    client.close()
    server.close()


PROMPT = pack_tokens(list(range(96)))  # passages behind the 64 tokens that are held


def test_passages_are_answered_and_held(blending: tuple[LookupServer, LookupClient], finder: Finder) -> None:
    _, client = blending
    finder.may_end.set()
    lookup = client.acquire(PROMPT, {}, (), Passages())
    assert client.answer(lookup, 10)[:2] == (64, 90)
    client.release(lookup)
    assert client.answer(client.acquire(TOKENS, {}, (), Passages()), 10)[:2] == (64, 0)  # one socket keeps its order
    assert finder.closed == 1


def test_passages_that_come_after_the_release_are_let_go(
    blending: tuple[LookupServer, LookupClient], finder: Finder
) -> None:
    server, client = blending
    lookup = client.acquire(PROMPT, {}, (), Passages())
    assert finder.asked.acquire(timeout=10)
    client.release(lookup)
    assert client.answer(client.acquire(TOKENS, {}, (), Passages()), 10)[:2] == (64, 0)  # the release was handled
    finder.may_end.set()
    server._finders.shutdown()
    assert finder.closed == 1
    assert server.take(lookup) is None


def test_passages_of_a_request_that_has_gone_are_not_looked_for(
    blending: tuple[LookupServer, LookupClient], finder: Finder
) -> None:
    server, client = blending
    busy = [client.acquire(PROMPT, {}, (), Passages()) for _ in range(2)]
    for _ in busy:
        assert finder.asked.acquire(timeout=10)
    client.release(client.acquire(PROMPT, {}, (), Passages()))
    assert client.answer(client.acquire(TOKENS, {}, (), Passages()), 10)[:2] == (64, 0)
    finder.may_end.set()
    for lookup in busy:
        assert client.answer(lookup, 10)[:2] == (64, 90)
    server._finders.shutdown()
    assert not finder.asked.acquire(blocking=False)
    server.close()
    assert finder.closed == 2


def test_a_failing_search_leaves_the_exact_prefix(blending: tuple[LookupServer, LookupClient], finder: Finder) -> None:
    _, client = blending
    finder.error = RuntimeError("no")
    finder.may_end.set()
    assert client.answer(client.acquire(PROMPT, {}, (), Passages()), 10)[:2] == (64, 0)


def test_passages_that_nobody_waits_for_any_more_are_let_go(
    blending: tuple[LookupServer, LookupClient], finder: Finder
) -> None:
    server, client = blending
    lookup = client.acquire(PROMPT, {}, (), Passages())
    assert finder.asked.acquire(timeout=10)
    client.settle(lookup)
    assert client.answer(lookup, 10)[:2] == (64, 0)
    finder.may_end.set()
    server._finders.shutdown()
    assert finder.closed == 1
    held = server.take(lookup)
    assert held is not None
    assert held.found is None
    held.close()
