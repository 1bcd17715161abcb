"""Backends and policies by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from lmcache.config import Config, build
from lmcache.errors import ConfigError
from lmcache.registry import Registry, split_type
from lmcache.storage.base import StorageBackend
from lmcache.storage.eviction.base import EvictionPolicy

# Options that say where a place is, by which an owed clear finds it again; of a place without one, all do.
_PLACE = ("url", "path", "paths", "endpoint", "prefix", "bucket")
_BACKENDS = "lmcache.storage.backends"
STORAGE_BACKENDS: Registry[type[StorageBackend]] = Registry(
    "storage backend",
    {
        "disk": f"{_BACKENDS}.disk.backend:DiskBackend",
        "gds": f"{_BACKENDS}.gds:GdsBackend",
        "nixl": f"{_BACKENDS}.nixl.backend:NixlBackend",
        "metered": "lmcache.storage.wrappers.metered:Metered",
        "latency": "lmcache.storage.wrappers.latency:Latency",
        "faults": "lmcache.storage.wrappers.faults:Faults",
        "audit": "lmcache.storage.wrappers.audit:Audit",
        "zstd": "lmcache.storage.wrappers.compression:Zstd",
        "encrypted": "lmcache.storage.wrappers.encryption:Encrypted",
    },
    "lmcache.storage_backends",
)
REMOTE = "remote"  # {type: remote, url: ...}: the class is that of the URL's scheme
REMOTE_SCHEMES: Registry[type[StorageBackend]] = Registry(
    "remote scheme",
    {
        **dict.fromkeys(
            ("redis", "rediss", "valkey", "valkeys", "redis+sentinel", "redis+cluster"),
            f"{_BACKENDS}.redis.backend:RedisBackend",
        ),
        **dict.fromkeys(("s3", "gs", "az"), f"{_BACKENDS}.objects.backend:ObjectStoreBackend"),
        "mooncake": f"{_BACKENDS}.mooncake:MooncakeBackend",
        **dict.fromkeys(("lm", "lms"), f"{_BACKENDS}.lm.backend:LMServerBackend"),
        "fs": f"{_BACKENDS}.fs:SharedFolderBackend",
        "blackhole": f"{_BACKENDS}.blackhole:BlackholeBackend",
    },
    "lmcache.remote_schemes",
)
EVICTION_POLICIES: Registry[Callable[[], EvictionPolicy]] = Registry(
    "eviction policy",
    {
        "lru": "lmcache.storage.eviction.base:LRU",
        "mru": "lmcache.storage.eviction.base:MRU",
        "fifo": "lmcache.storage.eviction.base:FIFO",
        "lfu": "lmcache.storage.eviction.base:LFU",
        "s3fifo": "lmcache.storage.eviction.queues:S3FIFO",
        "s3fifo-paper": "lmcache.storage.eviction.queues:S3FIFOPaper",
        "sieve": "lmcache.storage.eviction.queues:Sieve",
        "reuse": "lmcache.storage.eviction.reuse:Reuse",
    },
    "lmcache.eviction_policies",
)


def build_backend(options: Mapping[str, Any], where: str) -> StorageBackend:
    """``{type: disk, path: ..., capacity: 10GiB}`` -> a backend. ConfigError names what is known."""
    backend, config = check_backend(options, where)
    return backend(config)


def check_backend(options: Mapping[str, Any], where: str) -> tuple[type[StorageBackend], Config]:
    """The class and the config of a backend, of what is inside a wrapper too; opens nothing. ConfigError."""
    backend, config = _resolve(options, where)
    if isinstance(inner := getattr(config, "inner", None), Mapping):
        check_backend(inner, f"{where}.inner")
    return backend, config


def place_of(options: Mapping[str, Any]) -> tuple[str, Path | None]:
    """What tells a tier's place from others, in every process the same, and its folder where it is one of this host."""
    options = dict(options)
    while isinstance(options.get("inner"), Mapping):
        options = dict(options["inner"])
    named = {name: options[name] for name in _PLACE if options.get(name) is not None}
    paths = [options.get("path"), *(options.get("paths") or ())]
    url = urlsplit(str(options.get("url") or ""))
    if "url" in named:
        named["url"] = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()  # whoever logs in
    if url.scheme == "fs":
        paths = [url.path]
    folder = next((Path(path).expanduser() for path in paths if path), None)
    return json.dumps([options.get("type"), named or options], sort_keys=True, default=str), folder


def check_policy(name: str, where: str) -> None:
    """ConfigError unless there is an eviction policy of that name."""
    try:
        EVICTION_POLICIES.get(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _known_policy(name: str) -> str:
    EVICTION_POLICIES.get(name)
    return name


PolicyName = Annotated[str, AfterValidator(_known_policy)]
"""The name of an eviction policy, in a backend's Config."""


def _resolve(options: Mapping[str, Any], where: str) -> tuple[type[StorageBackend], Config]:
    name, rest = split_type(options, where)
    known = STORAGE_BACKENDS
    if name == REMOTE:
        url = rest.get("url")
        if not isinstance(url, str) or "://" not in url:
            raise ConfigError(f"{where}: a remote needs a url such as redis://127.0.0.1:6379, got {url!r}")
        known, name = REMOTE_SCHEMES, urlsplit(url).scheme
    try:
        backend = known.get(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: {name} needs the package {error.name}, which is not installed; pyproject.toml's extras name "
            "what each backend needs (in your clone: pip install -e '.[redis]', for example)"
        ) from error
    except ConfigError as error:
        if known is REMOTE_SCHEMES:
            raise ConfigError(f"{where}.url: {error}") from None
        if name in known.names():  # it is known, and says itself what it lacks
            raise ConfigError(f"{where}: {error}") from None
        hint = f'; write {{type: remote, url: "{name}://..."}}' if name in REMOTE_SCHEMES.names() else ""
        raise ConfigError(f"{where}: {error}, {REMOTE}{hint}") from None
    return backend, build(backend.Config, rest, f"{where} ({name})")


def build_tiers(tiers: Sequence[Mapping[str, Any]]) -> list[StorageBackend]:
    """The tiers of a config, nearest first; those already open are closed when a later one is wrong."""
    built: list[StorageBackend] = []
    try:
        for index, options in enumerate(tiers):
            built.append(build_backend(options, f"tiers[{index}]"))
    except (ConfigError, OSError):
        for backend in built:
            backend.close()
        raise
    return built
