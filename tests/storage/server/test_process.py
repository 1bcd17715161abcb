"""Real processes: SIGKILL, restart, SIGTERM, metrics, systemd."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from server_harness import CHUNK, KEYS, WAIT_S, data, get, log_in, put, value

from lmcache.errors import StorageError
from lmcache.storage.backends.lm import protocol
from lmcache.storage.backends.lm.client import Client, ClientConfig
from lmcache.storage.backends.lm.protocol import MAX_HEAD_BYTES, SEAL_BYTES, encode_frame, join_keys
from lmcache.storage.testing import make_key
from lmcache.testing.processes import ROOT
from lmcache.testing.server import ServerProcess


def test_sigkill_loses_no_durable_chunk(tmp_path: Path, connect: Any) -> None:
    dice, acknowledged = random.Random(2), list[int]()
    process = ServerProcess("storage.memory.capacity=16MiB", f"storage.tiers=[{{type: disk, path: {tmp_path}}}]")
    client = connect(process, durable=True, connections=2)
    try:
        for round_ in range(3):
            killer = threading.Timer(dice.uniform(0.02, 0.2), process.process.kill)
            killer.start()
            try:
                for n in range(round_ * 1000, round_ * 1000 + 1000):
                    if put(client, n):
                        acknowledged.append(n)
            except StorageError:
                pass
            killer.join()
            process.kill()
            process.start()
            # Whatever was acknowledged is there, over a connection that the client has to open anew.
            for n in acknowledged:
                assert get(client, n) == [data(n)]
    finally:
        process.terminate()
    assert acknowledged


def test_a_restart_is_survived_by_the_client(connect: Any) -> None:
    process = ServerProcess("storage.memory.capacity=16MiB")
    client = connect(process)
    assert put(client, 0) == 1
    process.kill()
    with pytest.raises(StorageError):
        get(client, 0)
    process.start()
    assert get(client, 0) == []
    assert put(client, 0) == 1
    assert process.terminate()[0] == 0


def test_sigterm_finishes_what_is_under_way_and_writes_what_is_queued(tmp_path: Path, connect: Any) -> None:
    process = ServerProcess("storage.memory.capacity=64MiB", f"storage.tiers=[{{type: disk, path: {tmp_path}}}]")
    assert put(connect(process), *range(50)) == 50
    idle = log_in(process.port)
    channel = log_in(process.port)
    channel.send(encode_frame(protocol.Put(join_keys([make_key(99)]), [CHUNK], False), CHUNK + SEAL_BYTES))
    channel.send(value(99)[:1000])
    probe = Client(ClientConfig(url=f"lm://127.0.0.1:{process.port}"))
    assert probe.sizes([make_key(0)]) == [CHUNK]  # the server has read the head before this, as far as one can tell
    process.process.terminate()
    assert idle.readable(WAIT_S), "idle connections are closed at once"
    channel.send(value(99)[1000:])
    assert channel.receive_frame(protocol.REPLY, MAX_HEAD_BYTES)[0] == protocol.Count(1)
    status, said = process.terminate()
    assert (status, "stopped" in said) == (0, True), said
    assert len(list(tmp_path.rglob("*.kv"))) == 51
    for end in (idle, channel, probe):
        end.close()


def test_sigterm_does_not_wait_for_ever(connect: Any) -> None:
    process = ServerProcess("storage.memory.capacity=16MiB", "drain_timeout_s=0.2")
    channel = log_in(process.port)
    channel.send(encode_frame(protocol.Put(KEYS, [CHUNK, CHUNK], False), 2 * (CHUNK + SEAL_BYTES)))
    channel.send(data(0))
    connect(process).sizes([make_key(0)])
    start = time.monotonic()
    status, said = process.terminate()
    assert time.monotonic() - start < 10
    assert (status, "were not done" in said) == (2, True), said
    channel.close()


def test_metrics_health_and_systemd(tmp_path: Path, connect: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(WAIT_S)
        process = ServerProcess(
            "storage.memory.capacity=16MiB", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        assert systemd.recv(100) == b"READY=1"
        put(connect(process), 0)
        base = f"http://127.0.0.1:{process.http_port}"
        with urllib.request.urlopen(f"{base}/health", timeout=WAIT_S) as page:
            health = json.load(page)
        assert (health["status"], health["chunks"], health["in_flight_bytes"]) == ("ok", 1, 0)
        with urllib.request.urlopen(f"{base}/metrics", timeout=WAIT_S) as page:
            text = page.read().decode()
        assert 'lmcache_server_requests_total{request="put"} 1.0' in text
        with pytest.raises(urllib.error.HTTPError, match="404") as missing:
            urllib.request.urlopen(f"{base}/", timeout=WAIT_S)
        missing.value.close()
        assert process.terminate()[0] == 0
        assert systemd.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize(
    ("argument", "message"),
    [("prot=1", "unknown key prot; known: host, port"), ("port", "expected name=value"), ("port=[", "port: ")],
)
def test_a_wrong_command_line_is_a_message_and_no_traceback(argument: str, message: str) -> None:
    command = [sys.executable, "-m", "lmcache.cli", "server", argument]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
