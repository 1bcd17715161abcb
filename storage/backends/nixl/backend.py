"""L3/L4 through NIXL's storage plugins: chunks as files (POSIX, GDS, GDS_MT, HF3FS) or as objects (OBJ).

files.py moves files straight between disk and the buffers it is given; objects.py goes through memory of its own;
agent.py is what both need of NIXL.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import ByteSize, Field, SecretStr, model_validator

from lmcache.config import Config
from lmcache.storage.backends.indexed.backend import IndexedBackend, Medium
from lmcache.storage.chunk import HEADER_BYTES
from lmcache.storage.registry import PolicyName

FILE_PLUGINS = ("POSIX", "GDS", "GDS_MT", "HF3FS")


class NixlConfig(Config):
    """Options of ``{type: nixl}``."""

    plugin: Literal["POSIX", "GDS", "GDS_MT", "HF3FS", "OBJ"] = Field("POSIX", description="NIXL's storage plugin")
    path: Path = Field(
        description="folder of the chunk files; for OBJ: the file that the index of the bucket is kept in"
    )
    capacity: ByteSize = Field(ByteSize(10 << 30), gt=HEADER_BYTES, description="bytes of chunks, for example 100GiB")
    eviction: PolicyName = Field("lru", description="name of the eviction policy")
    timeout_s: float = Field(
        10.0, gt=0, description="deadline of an object transfer; a slow file transfer is waited for, and reported"
    )
    direct: bool = Field(True, description="files: bypass the page cache (O_DIRECT) where length and system allow it")
    queue: Literal["aio", "uring", "posix_aio"] = Field(
        "aio", description="POSIX: how the kernel is given the requests"
    )
    bucket: str = Field("", description="OBJ: name of the bucket")
    prefix: str = Field("", description="OBJ: put before the name of every object")
    endpoint: str = Field("", description="OBJ: http(s)://host:port of the S3 service; empty: that of AWS")
    region: str = Field("us-east-1", description="OBJ: region of the bucket")
    access_key: str = Field("", description="OBJ: access key id; empty: the SDK's usual sources")
    secret_key: SecretStr = Field(SecretStr(""), description="OBJ: secret access key")
    staging: ByteSize = Field(ByteSize(64 << 20), gt=0, description="OBJ: bytes of memory that objects go through")
    parameters: dict[str, str] = Field({}, description="further parameters for the plugin, as NIXL names them")

    @model_validator(mode="after")
    def _objects_have_a_bucket(self) -> Self:
        if (self.plugin == "OBJ") != bool(self.bucket):
            raise ValueError("bucket: the plugin OBJ needs one, and no other plugin has one")
        return self


class NixlBackend(IndexedBackend):
    """Chunks as files or objects that NIXL transfers."""

    name: ClassVar[str] = "nixl"
    Config = NixlConfig

    def __init__(self, config: NixlConfig) -> None:
        medium: Medium
        if config.plugin in FILE_PLUGINS:
            from lmcache.storage.backends.nixl.files import NixlFiles

            medium = NixlFiles(config.plugin, config.path, _file_parameters(config), config.timeout_s, config.direct)
        else:
            from lmcache.storage.backends.nixl.objects import NixlObjects

            medium = NixlObjects(
                config.path, config.prefix, object_parameters(config), config.timeout_s, config.staging
            )
        super().__init__(medium, config.capacity, config.eviction)


def _file_parameters(config: NixlConfig) -> dict[str, str]:
    return ({f"use_{config.queue}": "true"} if config.plugin == "POSIX" else {}) | config.parameters


def object_parameters(config: NixlConfig) -> dict[str, str]:
    """What NIXL's OBJ plugin calls our options."""
    values = {
        "bucket": config.bucket,
        "region": config.region,
        "endpoint_override": config.endpoint,
        "scheme": config.endpoint.partition("://")[0],
        "access_key": config.access_key,
        "secret_key": config.secret_key.get_secret_value(),
        "use_virtual_addressing": "false" if config.endpoint else "true",
        "req_checksum": "required",  # other services than AWS know none of the newer checksums
    }
    return {name: value for name, value in values.items() if value} | config.parameters
