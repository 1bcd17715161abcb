"""The header of a chunk outside process memory: 4096 bytes, so that the payload behind it stays page-aligned.

0     8        12       16          96       128        136          144          152            4096
magic version  reserved  chunk key  codec    payload    payload      header       zero
                         80 bytes   32 bytes length     xxh3-64      xxh3-64
"""

from __future__ import annotations

import struct

import xxhash

from lmcache.errors import CorruptChunkError
from lmcache.keys import KEY_BYTES, ChunkKey

HEADER_BYTES = 4096
MAGIC = b"LMCACHE\x00"
VERSION = 2
_FIELDS = struct.Struct(f"<8sI4x{KEY_BYTES}s32sQQ")
_CHECKSUM = struct.Struct("<Q")
_USED = _FIELDS.size + _CHECKSUM.size


def encode_header(key: ChunkKey, payload: memoryview, codec: str = "raw") -> bytes:
    """The header for ``payload`` under ``key``."""
    fields = _FIELDS.pack(
        MAGIC, VERSION, key.to_bytes(), codec.encode(), payload.nbytes, xxhash.xxh3_64_intdigest(payload)
    )
    return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(HEADER_BYTES, b"\0")


def check_chunk(
    header: bytes | memoryview, key: ChunkKey, payload: memoryview, payload_checksum: int | None = None
) -> None:
    """CorruptChunkError, saying what is off, unless ``header`` and ``payload`` are the chunk of ``key``.

    payload_checksum: xxh3-64 of ``payload``, where it was made while the payload came.
    """
    nbytes, checksum = check_header(header, key)
    if nbytes != payload.nbytes:
        raise CorruptChunkError(f"payload of {nbytes} bytes, expected {payload.nbytes}")
    if payload_checksum is None:
        payload_checksum = xxhash.xxh3_64_intdigest(payload)
    if payload_checksum != checksum:
        raise CorruptChunkError("the payload's checksum is wrong")


def check_header(header: bytes | memoryview, key: ChunkKey) -> tuple[int, int]:
    """Payload bytes and payload checksum that a header states; CorruptChunkError unless it is one of ``key``."""
    if len(header) != HEADER_BYTES:
        raise CorruptChunkError(f"header of {len(header)} bytes, expected {HEADER_BYTES}")
    magic, version, raw_key, _, nbytes, checksum = _FIELDS.unpack_from(header)
    (own,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
    if magic != MAGIC:
        raise CorruptChunkError("not a chunk: wrong magic")
    if xxhash.xxh3_64_intdigest(header[: _FIELDS.size]) != own or any(header[_USED:]):
        raise CorruptChunkError("the header's checksum is wrong")
    if version != VERSION:
        raise CorruptChunkError(f"chunk version {version}, this release reads {VERSION}")
    if raw_key != key.to_bytes():
        raise CorruptChunkError(f"the chunk of another key, {ChunkKey.from_bytes(raw_key)}")
    return nbytes, checksum
