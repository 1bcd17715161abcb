"""The configuration of the server: one YAML file, then overrides; unknown keys are errors."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import ByteSize, Field, field_validator, model_validator

from lmcache.config import Config, LMCacheConfig
from lmcache.storage.backends.lm.client import DEFAULT_PORT

# Of an engine's configuration; a server has no tokens and packs nothing.
ENGINE_ONLY = ("chunk_tokens", "model_id", "codec", "blend", "store_generated", "lookup_timeout_s", "patience", "reset")


class TlsConfig(Config):
    """TLS of the chunk port."""

    cert_file: Path = Field(description="certificate of the server, with its chain")
    key_file: Path | None = Field(None, description="private key; null: it is in cert_file")
    client_ca_file: Path | None = Field(None, description="clients must show a certificate that one of these signed")


class ServerConfig(Config):
    """Everything that ``lmcache server`` may be told."""

    host: str = Field("127.0.0.1", description="address to listen on; one that is not loopback needs a token")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="port of chunks; 0: any that is free")
    http_host: str = Field("127.0.0.1", description="address of /metrics and /health")
    http_port: int | None = Field(DEFAULT_PORT + 1, ge=0, le=65535, description="their port; 0: any; null: none")
    token_file: Path | None = Field(None, description="file with the token that clients must know")
    tls: TlsConfig | None = Field(None, description="TLS of the chunk port; null: none")
    storage: LMCacheConfig = Field(LMCacheConfig(), description="memory and tiers, as in an engine's configuration")
    durable: bool = Field(False, description="acknowledge no put before a tier below memory has the chunk")
    max_chunk: ByteSize = Field(ByteSize(256 << 20), gt=0, description="bytes of one chunk; larger ones are not held")
    in_flight: ByteSize = Field(
        ByteSize(256 << 20),
        gt=0,
        description="bytes of memory that all requests under way may hold together; at most a quarter of memory",
    )
    max_connections: int = Field(512, ge=1, description="more are turned away")
    login_timeout_s: float = Field(5.0, gt=0, description="deadline of a handshake")
    request_timeout_s: float = Field(30.0, gt=0, description="deadline of a request's head, and of each chunk")
    busy_timeout_s: float = Field(2.0, gt=0, description="how long a request may wait for memory before it is refused")
    idle_timeout_s: float = Field(600.0, gt=0, description="connections that are silent for this long are closed")
    drain_timeout_s: float = Field(15.0, gt=0, description="how long requests under way may take when the server stops")

    @field_validator("storage")
    @classmethod
    def _no_engine_options(cls, storage: LMCacheConfig) -> LMCacheConfig:
        if pointless := sorted(storage.model_fields_set & set(ENGINE_ONLY)):
            raise ValueError(f"{', '.join(pointless)}: only an engine has that")
        return storage

    @model_validator(mode="after")
    def _check(self) -> ServerConfig:
        if self.token_file is None and not _is_loopback(self.host):
            raise ValueError(f"host {self.host} can be reached from elsewhere: set token_file")
        if self.durable and not self.storage.tiers:
            raise ValueError("durable needs a tier below memory: set storage.tiers")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
