"""The Redis family over TLS and with users: who is trusted, what is refused, and that no password is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Certificates
from redis_places import REDIS, VALKEY, cleared, connect, needs_redis, needs_valkey, pool, tls_options

from lmcache.errors import StorageError
from lmcache.storage.memory.pool import PinnedPool
from lmcache.storage.testing import BackendTests, OpenBackend, make_key, take
from lmcache.testing.redis import RedisServer

__all__ = ["pool"]
USER, PASSWORD = "kv", "p@ss:w/rd"
# Everything that the backend asks for, and nothing else.
COMMANDS = "-@all +get +set +strlen +pexpire +unlink +scan"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secured(certificates: Certificates) -> Iterator[RedisServer]:
    """Redis with TLS, client certificates, and one user who may do only what the backend needs under its prefix."""
    if REDIS is None:
        pytest.skip("needs a redis-server with TLS: apt-get install redis-tools")
    users = f"user default off\nuser {USER} on >{PASSWORD} ~lmcache:* {COMMANDS}\n"
    with RedisServer(REDIS, tls=certificates.server, config=users) as server:
        yield server


@pytest.fixture
def tls(certificates: Certificates) -> dict[str, object]:
    return {**tls_options(certificates.client), "username": USER, "password": PASSWORD}


@needs_redis
class TestRedisOverTLSWithALeastPrivilegedUser(BackendTests):
    selects_tenants = True

    @pytest.fixture
    def open_backend(self, secured: RedisServer, tls: dict[str, object]) -> OpenBackend:
        return cleared(f"rediss://127.0.0.1:{secured.port}", **tls, ttl_s=600)


@needs_redis
def test_the_password_may_be_in_the_url_or_in_a_file(
    secured: RedisServer, tls: dict[str, object], tmp_path: Path
) -> None:
    del tls["username"], tls["password"]
    tls["prefix"] = "lmcache:passwords:"
    with contextlib.closing(connect(f"rediss://kv:p%40ss%3Aw%2Frd@127.0.0.1:{secured.port}", **tls)) as backend:
        assert backend.contains([make_key(1)]) == 0
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    url = f"valkeys://127.0.0.1:{secured.port}"
    with contextlib.closing(connect(url, **tls, username=USER, password_file=str(file))) as backend:
        assert backend.contains([make_key(1)]) == 0


@needs_redis
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": "wrong-secret"}, "(?i)invalid username-password|WRONGPASS"),
        ({"password": None, "username": None}, "(?i)auth"),
        ({"prefix": "other:"}, "(?i)NOPERM|permission"),
        ({"tls_cert": None, "tls_key": None}, "rediss:"),  # the server closes, at a moment of its choice
        ({"tls_ca": None}, "(?i)certificate"),
    ],
)
def test_what_the_server_refuses_is_an_error_that_does_not_repeat_the_password(
    secured: RedisServer, tls: dict[str, object], change: dict[str, object], message: str
) -> None:
    options = {name: value for name, value in (tls | change).items() if value is not None}
    backend = connect(f"rediss://127.0.0.1:{secured.port}", **options)
    with contextlib.closing(backend), pytest.raises(StorageError, match=message) as caught:
        backend.contains([make_key(1)])
    assert PASSWORD not in str(caught.value)
    assert "wrong-secret" not in str(caught.value)


@needs_redis
def test_a_certificate_for_another_host_is_refused(secured: RedisServer, tls: dict[str, object]) -> None:
    url = f"rediss://localhost:{secured.port}"
    tls["prefix"] = "lmcache:hosts:"
    with contextlib.closing(connect(url, **tls)) as backend, pytest.raises(StorageError, match=r"(?i)certificate"):
        backend.contains([make_key(1)])
    with contextlib.closing(connect(url, **tls, tls_check_hostname=False)) as backend:
        assert backend.contains([make_key(1)]) == 0


@needs_valkey
def test_a_server_that_wants_a_password_and_gets_none_is_an_error(pool: PinnedPool) -> None:
    assert VALKEY is not None
    with RedisServer(VALKEY, "--requirepass", "secret") as server:
        url = f"redis://127.0.0.1:{server.port}"
        buffer = take(pool, 1 << 20)
        with contextlib.closing(connect(url)) as backend:
            for call in (lambda: backend.contains([make_key(1)]), lambda: backend.put([make_key(1)], [buffer])):
                with pytest.raises(StorageError, match=r"(?i)auth"):
                    call()
        buffer.release()
        with contextlib.closing(connect(url, password="secret")) as backend:
            assert backend.contains([make_key(1)]) == 0


def test_a_password_is_not_shown() -> None:
    with contextlib.closing(connect("redis://u:hunter2@127.0.0.1:1", sentinel_password="hunter2")) as backend:
        assert "hunter2" not in repr(backend._config)
        with pytest.raises(StorageError, match=r"redis://127\.0\.0\.1:1: ") as caught:
            backend.contains([make_key(1)])
    assert "hunter2" not in str(caught.value)
