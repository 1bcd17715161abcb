"""What goes over the wire between a client and the server.

A frame is a prefix, a head and a payload. Integers are little-endian.

    0      4        6         8      12        16       24        32      32 + head      + payload
    magic  version  reserved  head   reserved  payload  xxh3-64   head    values
           u16      0         bytes  0         bytes    of 0..24  msgpack
                              u32              u64      and head

A *value* is a chunk and its seal, 16 bytes that the writer made and that the reader checks, so that no damage underway
or in the server's memory or on its disks is taken for data. The server keeps the seal with the chunk:

    0          n                 n + 8                                                       n + 16
    payload    xxh3-64 of that   xxh3-64 of (version, key, n, the checksum before)

Handshake: the server says Hello with a nonce; the client answers Login with a nonce of its own and, where there is a
token, the HMAC of both; the server answers Welcome with the HMAC the other way round, so that neither side learns the
token from an impostor. Then the client sends one request at a time: Sizes, Get, Put, Remove or Clear. Get is answered
by Found frames with the values behind them, until one has no ``more``; the others by Found or Count; any by Failed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

import msgspec
import xxhash

from lmcache.errors import ProtocolError
from lmcache.keys import KEY_BYTES, NAMESPACE_BYTES, ChunkKey

MAGIC: Final = b"LMCS"
VERSION: Final = 2
NONCE_BYTES: Final = 32
SEAL_BYTES: Final = 16
MAX_KEYS: Final = 10_240
"""Keys of one request: a lookup of 10,000 is one round trip."""
MAX_HEAD_BYTES: Final = MAX_KEYS * (KEY_BYTES + 9) + 256
MAX_HELLO_BYTES: Final = 1024
"""Of a head before the handshake is done."""

_FIELDS = struct.Struct("<4sHHIIQ")
_CHECKSUM = struct.Struct("<Q")
PREFIX_BYTES: Final = _FIELDS.size + _CHECKSUM.size
_SEALED = struct.Struct(f"<4sH{KEY_BYTES}sQQ")
_SEAL = struct.Struct("<QQ")

Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Keys = Annotated[bytes, msgspec.Meta(max_length=MAX_KEYS * KEY_BYTES)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
SizeList = Annotated[list[Size], msgspec.Meta(max_length=MAX_KEYS)]


class Message(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Base of all heads; the class's name is its tag."""


class Hello(Message, frozen=True):
    """First words of the server."""

    nonce: Nonce
    needs_token: bool


class Login(Message, frozen=True):
    """proof: of the token, empty where the server needs none."""

    nonce: Nonce
    proof: bytes


class Welcome(Message, frozen=True):
    """durable: whether the server can write a chunk below memory before it acknowledges it."""

    proof: bytes
    durable: bool


class Sizes(Message, frozen=True):
    """keys: KEY_BYTES each. Answered by Found with the payload sizes of the leading run that is held."""

    keys: Keys


class Get(Message, frozen=True):
    """sizes: payload bytes that are expected; a chunk of another size ends the run."""

    keys: Keys
    sizes: SizeList


class Put(Message, frozen=True):
    """Values of these payload sizes follow. Answered by Count, of those that are held; durable: below memory."""

    keys: Keys
    sizes: SizeList
    durable: bool


class Remove(Message, frozen=True):
    keys: Keys


class Clear(Message, frozen=True):
    """fingerprint: of the format whose chunks go; None for all. tenant: whose chunks go; None for everybody's."""

    fingerprint: bytes | None
    tenant: bytes | None = None


class Found(Message, frozen=True):
    sizes: SizeList
    more: bool = False


class Count(Message, frozen=True):
    count: int


class Failed(Message, frozen=True):
    """The request was not done. code: one of ``CODES``."""

    code: str
    message: str


CODES: Final = {
    "auth": "the token is missing or wrong; trying again is of no use",
    "protocol": "the request makes no sense; trying again is of no use",
    "busy": "too much is under way; try later",
    "closing": "the server is going down; try again",
    "failed": "something else",
}
Request: TypeAlias = Sizes | Get | Put | Remove | Clear
Reply: TypeAlias = Found | Count | Failed
REQUEST = msgspec.msgpack.Decoder(Request)
REPLY = msgspec.msgpack.Decoder(Reply)
HELLO = msgspec.msgpack.Decoder(Hello | Failed)
LOGIN = msgspec.msgpack.Decoder(Login)
WELCOME = msgspec.msgpack.Decoder(Welcome | Failed)
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: Message, payload_bytes: int = 0) -> bytes:
    """Prefix and head; ``payload_bytes`` of values have to follow."""
    head = _encoder.encode(message)
    fields = _FIELDS.pack(MAGIC, VERSION, 0, len(head), 0, payload_bytes)
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields + head)) + head


def decode_prefix(prefix: bytes, max_head_bytes: int) -> tuple[int, int]:
    """Bytes of the head and of the payload. ProtocolError when this is no frame that may be sent here."""
    magic, version, reserved, head_bytes, reserved_too, payload_bytes = _FIELDS.unpack_from(prefix)
    if magic != MAGIC:
        raise ProtocolError("not a frame: wrong magic")
    if version != VERSION:
        raise ProtocolError(f"protocol version {version}, this release speaks {VERSION}")
    if reserved or reserved_too:
        raise ProtocolError("reserved bytes of a frame are set")
    if head_bytes > max_head_bytes:
        raise ProtocolError(f"a head of {head_bytes} bytes, at most {max_head_bytes} are allowed here")
    return head_bytes, payload_bytes


def check_head(prefix: bytes, head: bytes | bytearray) -> None:
    """ProtocolError unless the checksum of the frame is right."""
    digest = xxhash.xxh3_64(prefix[: _FIELDS.size])
    digest.update(head)
    if _CHECKSUM.unpack_from(prefix, _FIELDS.size)[0] != digest.intdigest():
        raise ProtocolError("the checksum of a frame is wrong")


def join_keys(keys: Sequence[ChunkKey]) -> bytes:
    return b"".join([part for key in keys for part in key])


def split_keys(raw: bytes) -> list[ChunkKey]:
    if len(raw) % KEY_BYTES:
        raise ProtocolError(f"keys of {KEY_BYTES} bytes each cannot have {len(raw)} in all")
    middle = NAMESPACE_BYTES
    return [ChunkKey(raw[at : at + middle], raw[at + middle : at + KEY_BYTES]) for at in range(0, len(raw), KEY_BYTES)]


def seal(key: ChunkKey, nbytes: int, checksum: int) -> bytes:
    """What is kept behind a payload of ``nbytes`` under ``key``; checksum: its xxh3-64."""
    sealed = _SEALED.pack(MAGIC, VERSION, key.to_bytes(), nbytes, checksum)
    return _SEAL.pack(checksum, xxhash.xxh3_64_intdigest(sealed))


def seal_fits(key: ChunkKey, nbytes: int, kept: memoryview) -> bool:
    """Whether ``kept`` can be a seal of ``key`` and so many bytes, which are not looked at."""
    return kept == seal(key, nbytes, _SEAL.unpack(kept)[0])


def prove(token: bytes, who: str, first: bytes, second: bytes) -> bytes:
    """Proof that ``who`` ("client" or "server") knows the token, for two nonces of one connection."""
    return hmac.digest(token, b"lmcache " + who.encode() + first + second, hashlib.sha256)
