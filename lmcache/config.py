"""Configuration: one YAML file, then LMCACHE_CONFIG_FILE, then overrides; unknown keys are errors.

The only place of the package that reads the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from lmcache.errors import ConfigError

CONFIG_FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
NOTIFY_SOCKET_VARIABLE = "NOTIFY_SOCKET"
ConfigT = TypeVar("ConfigT", bound="Config")
MASK = "***"
_SECRET_KEY = re.compile(r"(^|_)(password|secret_key|access_key|token)$")
_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")
# Instead of pydantic's words, by the type of its complaint; the rest are left as they are.
_EXPECTED = {
    "tuple_type": "expected a list, e.g. [{type: disk, ...}]",
    "list_type": "expected a list, e.g. [{type: disk, ...}]",
    "dict_type": "expected a mapping, e.g. {name: value}",
    "model_type": "expected a mapping, e.g. {name: value}",
    "byte_size": "expected a size such as 4GiB",
    "byte_size_unit": "expected a size such as 4GiB",
}


class Config(BaseModel):
    """Base of every config: frozen, and a key that it does not know is an error that names those it does.

    A section (a mapping or a list) that is null is taken as absent, as when all lines below its name are comments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _name_known_keys(cls, data: object) -> object:
        if isinstance(data, Mapping):
            unknown = sorted(str(k) for k in data if k not in cls.model_fields)
            if unknown:
                raise ValueError(f"unknown key {', '.join(unknown)}; known: {', '.join(cls.model_fields)}")
            return {k: value for k, value in data.items() if value is not None or not cls._is_section(k)}
        return data

    @classmethod
    def _is_section(cls, name: str) -> bool:
        kind = cls.model_fields[name].annotation
        return get_origin(kind) in (dict, tuple, list) or (isinstance(kind, type) and issubclass(kind, Config))


class MemoryConfig(Config):
    """L1: chunks in this process's (pinned) host memory."""

    capacity: ByteSize = Field(ByteSize(1 << 30), gt=0, description="bytes of host memory per worker, for example 4GiB")
    eviction: str = Field("lru", description="name of the eviction policy")
    huge_pages: bool | Literal["transparent", "hugetlb"] = Field(
        True, description="true or transparent: ask the kernel for huge pages; hugetlb: take reserved ones (2MiB)"
    )
    numa_node: int | None = Field(
        None, ge=-1, description="NUMA node of the memory; null: the GPU's, else the processors'; -1: any"
    )
    allocator: Literal["auto", "slots", "best_fit"] = Field(
        "auto", description="how the pool is divided; auto: best fit that hands freed blocks of one size on in O(1)"
    )
    slot: ByteSize | None = Field(None, gt=0, description="bytes of one slot, for allocator slots: a full chunk's size")
    low_watermark: float = Field(
        1 / 64, gt=0, le=0.5, description="share of capacity that one eviction frees at least (on_evict: keeps written)"
    )


class BreakerConfig(Config):
    """When a tier that fails is left alone, and for how long."""

    failures: int = Field(3, ge=1, description="consecutive failures that open the breaker")
    cooldown_s: float = Field(10.0, gt=0, description="seconds until one probe is let through")


class RetryConfig(Config):
    """How a read or a write of a lower tier that raised is tried again, within its deadline."""

    attempts: int = Field(2, ge=1, le=10, description="how often it is tried in all")
    backoff_s: float = Field(0.02, gt=0, description="pause before the second attempt, doubled each time, +-50% jitter")


class BlendConfig(Config):
    """CacheBlend in an engine: KV of passages, reused wherever a prompt has them."""

    find: Literal["content", "separator", "request"] = Field(
        "content",
        description="how passages are found: content: any text that was read before; separator: between occurrences of "
        "separator; request: only where a request says (kv_transfer_params: lmcache.blend)",
    )
    separator: tuple[int, ...] = Field((), description="token ids between passages, for find: separator")
    selector: dict[str, Any] = Field(
        {"type": "question"}, description="which reused tokens are computed again: {type: question, ratio: 0.15}, ..."
    )
    min_tokens: int = Field(32, ge=1, description="shortest run of a known passage that is reused")
    piece_tokens: int = Field(
        256, ge=1, description="by content: longest piece in which text that is not known yet is kept"
    )

    @model_validator(mode="after")
    def _check(self) -> BlendConfig:
        if (self.find == "separator") != bool(self.separator) or min(self.separator, default=0) < 0:
            raise ValueError(f"find is {self.find}, separator {list(self.separator)}: the one needs the other")
        if self.piece_tokens < self.min_tokens:
            raise ValueError(f"piece_tokens is {self.piece_tokens}, less than min_tokens ({self.min_tokens})")
        return self


class LMCacheConfig(Config):
    """Everything a user may set."""

    chunk_tokens: int | None = Field(
        None, ge=1, description="tokens per chunk; rounded up to whole engine blocks; null: chosen from the block size"
    )
    model_id: str | None = Field(
        None, description="identity of the weights; null: hub name and revision, or a fingerprint of the local folder"
    )
    memory: MemoryConfig = Field(MemoryConfig(), description="the L1 tier")
    tiers: tuple[dict[str, Any], ...] = Field((), description="tiers below memory, nearest first: {type: disk, ...}")
    codec: str | dict[str, Any] = Field(
        "raw", description="how KV is packed: raw, fp8, int8, int4, int2, rotated, cachegen, klt, or {type: int4, ...}"
    )
    blend: BlendConfig | None = Field(
        None,
        description="reuse of passages anywhere in a prompt (approximate); null: exact prefixes only; {} for defaults",
    )
    reset: Literal["memory", "tiers"] = Field(
        "memory",
        description="what vLLM's reset_prefix_cache(reset_connector=True) and sleep() forget: memory: what this engine "
        "holds in memory; tiers: this model's chunks in every tier too, also those of other engines",
    )
    store_generated: bool = Field(True, description="also store the KV of generated tokens, block by block")
    write_queue: ByteSize = Field(
        ByteSize(256 << 20), gt=0, description="bytes per tier that may wait to be written; more are shed, and counted"
    )
    read_timeout_s: float = Field(10.0, gt=0, description="deadline of one lookup's reads from lower tiers")
    lookup_timeout_s: float = Field(
        2.0, gt=0, description="the scheduler takes a lookup that is unanswered for this long beyond reads as a miss"
    )
    lease_timeout_s: float = Field(120.0, gt=0, description="how long found chunks are held for a request that waits")
    close_timeout_s: float = Field(10.0, gt=0, description="how long close() waits for queued writes")
    breaker: BreakerConfig = Field(BreakerConfig(), description="circuit breaker of every lower tier")
    retry: RetryConfig = Field(RetryConfig(), description="second attempts of every lower tier")
    read_threads: int = Field(2, ge=1, le=64, description="reads of one lower tier that are in flight at once")
    read_batch: ByteSize = Field(
        ByteSize(16 << 20), gt=0, description="bytes of one such read; times read_threads: bytes in flight per tier"
    )
    promote: Literal["always", "second_hit", "never"] = Field(
        "always", description="which chunks read from a lower tier stay in memory"
    )
    demotion: Literal["write_all", "on_evict"] = Field(
        "write_all", description="when a chunk is written below: at once to all tiers, or to the next before eviction"
    )
    quotas: dict[str, ByteSize] = Field(
        {}, description="bytes of memory that a tenant's chunks may take up, by the tenant's name; others: all of it"
    )


def build(cls: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """``cls(**values)``, with pydantic's complaints turned into one ConfigError that says where."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = ".".join(str(part) for part in problem["loc"])
            # What a mistake was found in may be the whole mapping, secrets included.
            silent = problem["type"] in ("value_error", "missing")
            got = (
                "" if silent else f" (got {_masked(problem['loc'][-1] if problem['loc'] else '', problem['input'])!r})"
            )
            words = _EXPECTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
            lines.append(f"{path + ': ' if path else ''}{words}{got}")
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def masked(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which secrets (passwords, keys, tokens, the user part of URLs) are ``***``, at any depth."""
    return {name: _masked(name, value) for name, value in values.items()}


def _masked(name: object, value: Any) -> Any:
    if isinstance(value, Mapping):
        return masked(value)
    if isinstance(value, list | tuple):
        return [_masked(name, item) for item in value]
    if value is not None and _SECRET_KEY.search(str(name)):
        return MASK
    return _USERINFO.sub(f"{MASK}@", value) if isinstance(value, str) else value


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> LMCacheConfig:
    """The config of ``path`` (else of $LMCACHE_CONFIG_FILE, else defaults), with ``overrides`` on top; see ``load``."""
    return load(LMCacheConfig, path if path is not None else os.environ.get(CONFIG_FILE_VARIABLE), overrides)


def load(
    cls: type[ConfigT], path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> ConfigT:
    """The ``cls`` of a YAML file (else defaults), with ``overrides`` on top.

    overrides: nested mappings or dotted names (``{"memory.capacity": "4GiB"}``); mappings merge, other values
        replace.
    Raises ConfigError for a file that cannot be read or parsed, an unknown key or a wrong value.
    """
    values: dict[str, Any] = {}
    where = "config"
    if path:
        where = str(path)
        try:
            loaded = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the config file {where}: {error}") from error
        if loaded is not None and not isinstance(loaded, Mapping):
            raise ConfigError(f"{where}: expected a mapping of option names, got {type(loaded).__name__}")
        values = dict(loaded or {})
    for name, value in (overrides or {}).items():
        _merge(values, name.split("."), value)
    return build(cls, values, where)


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """``["memory.capacity=4GiB"]`` -> ``{"memory.capacity": "4GiB"}``; values are YAML. ConfigError."""
    values = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"expected name=value, got {item!r}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: {error}") from error
    return values


def service_manager_socket() -> str | None:
    """Where systemd wants to be told that a service is ready; None when it does not."""
    return os.environ.get(NOTIFY_SOCKET_VARIABLE) or None


def _merge(into: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        child = into.get(name)
        into[name] = dict(child) if isinstance(child, Mapping) else {}
        into = into[name]
    current = into.get(path[-1])
    if isinstance(value, Mapping) and isinstance(current, Mapping):
        merged = dict(current)
        for name, inner in value.items():
            _merge(merged, [name], inner)
        value = merged
    into[path[-1]] = value
