"""What a codec is, and codecs by name: how the KV of a run of tokens becomes bytes.

raw       the bytes of the pages; no codec at all
fp8       e4m3, a scale a token and head
int8      8-bit codes, a scale and a zero a token and head
int4      KIVI: keys by channel in groups of tokens, values by token
int2      the same with 2 bits
rotated   2 to 4 bits a token and head after a randomised Hadamard rotation
cachegen  anchors and differences from them, with the steps of a profile, entropy coded
klt       transform coding with the matrices and steps of a profile, entropy coded
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, Field

from lmcache.config import Config, build
from lmcache.errors import ConfigError, KernelArgumentError
from lmcache.kernels.sides import PlaneCodec, Side
from lmcache.registry import Registry


class CodecConfig(Config):
    """Base of every codec's options. A number must be given as a number: equal options make equal ids."""

    model_config = ConfigDict(strict=True)

    sink_tokens: int = Field(4, description="first tokens of a text, to which all others attend, that stay as they are")


class Codec(ABC):
    """How KV is packed. Built from one ``Config`` of its own; raises KernelArgumentError when that cannot work."""

    name: ClassVar[str]
    Config: ClassVar[type[CodecConfig]]

    def __init__(self, config: CodecConfig) -> None:
        self.sink_tokens = config.sink_tokens
        self._options = {name: getattr(config, name) for name in type(config).model_fields}

    @property
    def id(self) -> str:
        """Name and options, all that the bytes depend on: equal ids read each other's chunks. At most 216 bytes."""
        return f"{self.name}({','.join(f'{name}={value}' for name, value in self._options.items())})"

    @abstractmethod
    def bind(self, sides: Sequence[Side], layers: Sequence[int], first_head: int, device: torch.device) -> PlaneCodec:
        """What packs one plane: `sides` of its layers, which are `layers` of the model, heads first_head and on.

        Raises KernelArgumentError where this codec cannot pack it.
        """


CODECS: Registry[type[Codec]] = Registry(
    "codec",
    {
        "fp8": "lmcache.kernels.codecs.quantised:Fp8Codec",
        "int8": "lmcache.kernels.codecs.quantised:Int8Codec",
        "int4": "lmcache.kernels.codecs.quantised:Int4Codec",
        "int2": "lmcache.kernels.codecs.quantised:Int2Codec",
        "rotated": "lmcache.kernels.codecs.quantised:RotatedCodec",
        "cachegen": "lmcache.kernels.codecs.coded:CacheGenCodec",
        "klt": "lmcache.kernels.codecs.coded:KltCodec",
    },
    "lmcache.codecs",
)
RAW = "raw"


def build_codec(given: str | Mapping[str, Any]) -> Codec | None:
    """`int4`, or `{type: int4, group: 32}` -> a codec; None for raw. ConfigError names what is known."""
    options = {"type": given} if isinstance(given, str) else dict(given)
    name = options.pop("type", None)
    if name == RAW:
        if options:
            raise ConfigError(f"codec (raw): it has no options, got {', '.join(options)}")
        return None
    if name not in CODECS.names():
        raise ConfigError(f"codec: unknown codec {name!r}; known: {', '.join([RAW, *CODECS.names()])}")
    codec = CODECS.get(name)
    try:
        return codec(build(codec.Config, options, f"codec ({name})"))
    except KernelArgumentError as error:
        raise ConfigError(f"codec: {error}") from error
