"""Where a key's server is: one server, the master that sentinels name, or the nodes of a cluster; by redis-py.

redis://user:password@host:6379/2      rediss:// with TLS; valkey:// and valkeys:// are the same
redis+sentinel://host:26379,host:26379/service/2
redis+cluster://host:6379,host:6379
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import redis
from pydantic import ByteSize, Field, SecretStr, model_validator
from redis._parsers import _RESP2Parser
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, NodesManager
from redis.connection import ConnectionPool
from redis.crc import key_slot
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from lmcache.config import Config
from lmcache.errors import ConfigError
from lmcache.storage.backends.redis.retry import RetryConfig

TLS_SCHEMES = ("rediss", "valkeys")
SENTINEL, CLUSTER = "redis+sentinel", "redis+cluster"
PORT, SENTINEL_PORT = 6379, 26379


class Address(NamedTuple):
    """What a URL says."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    username: str | None
    password: str | None
    service: str
    db: int | None

    def __str__(self) -> str:
        """Without the password."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{self.scheme}://{hosts}" + (f"/{self.service}" if self.service else "")


def parse_url(url: str) -> Address:
    """ValueError, which does not repeat the password, when it is none of the forms above."""
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise ValueError("url: options such as ?db=1 are not read; give them as options of the tier")
    user, _, netloc = parts.netloc.rpartition("@")
    username, _, password = user.partition(":")
    port = SENTINEL_PORT if parts.scheme == SENTINEL else PORT
    hosts = tuple(_host(host, port) for host in netloc.split(","))
    path = [part for part in parts.path.split("/") if part]
    service = path.pop(0) if parts.scheme == SENTINEL and path else ""
    if parts.scheme == SENTINEL and not service:
        raise ValueError("url: the name of the master is missing: redis+sentinel://host:26379,host:26379/service")
    if len(hosts) > 1 and parts.scheme not in (SENTINEL, CLUSTER):
        raise ValueError(f"url: one host for {parts.scheme}://, got {len(hosts)}")
    if len(path) > 1 or (path and not path[0].isdecimal()):
        raise ValueError(f"url: the database is a number, got {parts.path!r}")
    if path and parts.scheme == CLUSTER:
        raise ValueError("url: a cluster has no databases to choose from")
    db = int(path[0]) if path else None
    return Address(parts.scheme, hosts, unquote(username) or None, unquote(password) or None, service, db)


def _host(text: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port or default_port
    except ValueError:
        host = None
    if not host:
        raise ValueError(f"url: expected host:port, got {text!r}")
    return host, port


class RedisConfig(Config):
    """Options of ``{type: remote, url: redis://...}`` and its relatives."""

    url: str = Field(
        repr=False, description="redis[s]:// valkey[s]:// redis+sentinel:// or redis+cluster://, with hosts"
    )
    username: str | None = Field(None, description="ACL user; else the one in the url; null: the default user")
    password: SecretStr | None = Field(None, description="its password; else password_file's or the one in the url")
    password_file: Path | None = Field(None, description="file that holds the password, read once at start")
    sentinel_username: str | None = Field(None, description="ACL user at the sentinels")
    sentinel_password: SecretStr | None = Field(None, description="password at the sentinels")
    tls: bool = Field(False, description="TLS for sentinel and cluster urls; rediss:// and valkeys:// have it anyway")
    tls_ca: Path | None = Field(None, description="PEM file of the authorities to trust; null: the system's")
    tls_cert: Path | None = Field(None, description="PEM file of the client's certificate")
    tls_key: Path | None = Field(None, description="PEM file of the client's key")
    tls_check_hostname: bool = Field(True, description="whether the server's certificate must name the host")
    prefix: str = Field(
        "lmcache:", min_length=1, description="what every key starts with; tenants of one server differ"
    )
    ttl_s: float | None = Field(
        None, ge=0.001, description="seconds that a chunk lives after it was put; null: for ever"
    )
    max_value: ByteSize = Field(
        ByteSize(512 << 20), gt=0, description="bytes of a value that the server takes (its proto-max-bulk-len)"
    )
    connections: int = Field(4, ge=1, description="connections per server, and operations at a time; more wait")
    window: ByteSize = Field(ByteSize(2 << 20), gt=0, description="bytes asked for or sent before replies are awaited")
    connect_timeout_s: float = Field(1.0, gt=0, description="seconds for one connection, handshake and login each")
    timeout_s: float = Field(5.0, gt=0, description="seconds for one operation on a batch, retries included")
    clear_timeout_s: float = Field(
        60.0, gt=0, description="seconds for clear(), which walks over all keys of the server"
    )
    retry: RetryConfig = Field(RetryConfig(), description="tries of an operation whose connection fails")

    @model_validator(mode="after")
    def _check(self) -> RedisConfig:
        parse_url(self.url)
        if self.password is not None and self.password_file is not None:
            raise ValueError("password and password_file: give one of them")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: give both or neither")
        if not self.uses_tls and (self.tls_ca or self.tls_cert):
            raise ValueError("tls_ca and tls_cert need a rediss:// or valkeys:// url, or tls: true")
        return self

    @property
    def uses_tls(self) -> bool:
        return self.tls or parse_url(self.url).scheme in TLS_SCHEMES


class Servers(ABC):
    """Which pool of connections a key belongs to. Thread-safe; redis-py's errors, or OSError, on failure."""

    @abstractmethod
    def pool_of(self, name: bytes) -> ConnectionPool:
        """Of the server that holds ``name``."""

    @abstractmethod
    def pools(self) -> list[ConnectionPool]:
        """Of every server that holds chunks."""

    @abstractmethod
    def look_again(self) -> None:
        """After a failure: forget what may be out of date."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections that nobody uses."""


def open_servers(config: RedisConfig) -> Servers:
    """Connects to nothing yet. ConfigError for files that cannot be read."""
    address = parse_url(config.url)
    options = _options(config, address)
    if address.scheme == CLUSTER:
        return _Cluster(address, options)
    if address.scheme == SENTINEL:
        secret = config.sentinel_password
        sentinel_options = {name: value for name, value in options.items() if name != "db"}
        sentinel_options["username"] = config.sentinel_username
        sentinel_options["password"] = secret.get_secret_value() if secret else None
        sentinel = _Sentinel(address.hosts, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
        for client in sentinel.sentinels:
            _without_hiredis(client)
        return _One(sentinel.master_for(address.service, **options), sentinel)  # type: ignore[no-untyped-call]
    ((host, port),) = address.hosts
    return _One(redis.Redis(host=host, port=port, **options))


class _One(Servers):
    """One server; with sentinels, the one that is the master when a connection is made."""

    def __init__(self, client: redis.Redis, sentinel: Sentinel | None = None) -> None:
        self._pool = _without_hiredis(client).connection_pool
        self._sentinel = sentinel

    def pool_of(self, name: bytes) -> ConnectionPool:
        return self._pool

    def pools(self) -> list[ConnectionPool]:
        return [self._pool]

    def look_again(self) -> None:
        if self._sentinel is not None:
            self._pool.disconnect(inuse_connections=False)  # the next ones ask who the master is

    def close(self) -> None:
        self._pool.disconnect(inuse_connections=False)
        for client in self._sentinel.sentinels if self._sentinel is not None else ():
            client.close()


class _Sentinel(Sentinel):
    def discover_master(self, service_name: str) -> tuple[str, int]:
        """As redis-py's, but its error gives the reasons, as a certificate that is not trusted, and not objects."""
        reasons = []
        for client in list(self.sentinels):
            host, port = (client.connection_pool.connection_kwargs[name] for name in ("host", "port"))
            try:
                masters: Any = client.sentinel_masters()
            except (ConnectionError, TimeoutError) as error:
                reasons.append(f"sentinel {host}:{port}: {error}")
                continue
            state = masters.get(service_name)
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]
                self.sentinels = [client, *(other for other in self.sentinels if other is not client)]
                return state["ip"], state["port"]
            reasons.append(f"sentinel {host}:{port}: {service_name} is not known, or down")
        raise MasterNotFoundError("; ".join(reasons))


class _Cluster(Servers):
    """The primaries of a cluster, found when they are first needed."""

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        self._nodes = [ClusterNode(host, port) for host, port in address.hosts]  # type: ignore[no-untyped-call]
        # A cluster has one database, and redis-py tries none of its nodes twice by itself.
        self._options = {name: value for name, value in options.items() if name not in ("db", "retry")}
        self._lock = threading.Lock()
        self._manager: NodesManager | None = None

    def pool_of(self, name: bytes) -> ConnectionPool:
        return _pool(self._connected().get_node_from_slot(key_slot(name)))

    def pools(self) -> list[ConnectionPool]:
        return [_pool(node) for node in self._connected().get_nodes_by_server_type("primary")]

    def look_again(self) -> None:
        if self._manager is not None:
            self._manager.initialize(disconnect_startup_nodes_pools=False)

    def close(self) -> None:
        manager = self._manager
        for node in list(manager.nodes_cache.values()) if manager is not None else ():
            if node.redis_connection is not None:
                node.redis_connection.connection_pool.disconnect(inuse_connections=False)

    def _connected(self) -> NodesManager:
        manager = self._manager
        if manager is None:
            manager = _Nodes(startup_nodes=self._nodes, **self._options)
            with self._lock:
                self._manager = manager = self._manager or manager
        return manager


class _Nodes(NodesManager):
    def create_redis_node(self, host: str, port: int, **options: Any) -> redis.Redis:
        return _without_hiredis(super().create_redis_node(host, port, **options))  # type: ignore[no-untyped-call]


def _without_hiredis(client: redis.Redis) -> redis.Redis:
    """With the parser in Python: that of hiredis takes TLS 1.3 tickets for data left over, and drops the connection."""
    client.connection_pool.connection_kwargs["parser_class"] = _RESP2Parser
    return client


def _pool(node: ClusterNode) -> ConnectionPool:
    if node.redis_connection is None:
        raise RedisError(f"no connection to the node {node.name} yet")
    pool: ConnectionPool = node.redis_connection.connection_pool
    return pool


def _options(config: RedisConfig, address: Address) -> dict[str, Any]:
    password = config.password.get_secret_value() if config.password else address.password
    try:
        if config.password_file is not None:
            password = config.password_file.expanduser().read_text().strip()
        for file in (config.tls_ca, config.tls_cert, config.tls_key):
            if file is not None:
                file.expanduser().open("rb").close()
    except OSError as error:
        raise ConfigError(f"{address}: {error}") from error
    options: dict[str, Any] = {
        "username": config.username or address.username,
        "password": password,
        "db": address.db or 0,
        # Of the handshake; ours set the time that is left before every call.
        "socket_timeout": config.connect_timeout_s,
        "socket_connect_timeout": config.connect_timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
        # The backend bounds them; one more may ask a cluster's node for the topology.
        "max_connections": config.connections + 1,
    }
    if config.uses_tls:
        files = {"ssl_ca_certs": config.tls_ca, "ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
        options |= {name: str(file.expanduser()) if file else None for name, file in files.items()}
        options |= {"ssl": True, "ssl_check_hostname": config.tls_check_hostname}
    return options
