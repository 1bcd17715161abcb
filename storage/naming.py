"""The name of a chunk's file or object: ``<format fingerprint>/<tenant and tags>/<digest>.kv``, all in hex.

Folders and buckets share this layout, so the content of one can be copied into the other.
"""

from __future__ import annotations

from lmcache.keys import DIGEST_BYTES, FINGERPRINT_BYTES, NAMESPACE_BYTES, ChunkKey

SUFFIX = ".kv"
FORMAT_LENGTH, TAGS_LENGTH = 2 * FINGERPRINT_BYTES, 2 * (NAMESPACE_BYTES - FINGERPRINT_BYTES)
"""Of the names of folders."""
_LENGTHS = [FORMAT_LENGTH, TAGS_LENGTH, 2 * DIGEST_BYTES]


def namespace_path(namespace: bytes) -> str:
    """The folder of a namespace."""
    return f"{namespace[:FINGERPRINT_BYTES].hex()}/{namespace[FINGERPRINT_BYTES:].hex()}"


def chunk_name(key: ChunkKey) -> str:
    """The name of a chunk in the folder of its namespace."""
    return f"{key.digest.hex()}{SUFFIX}"


def chunk_path(key: ChunkKey) -> str:
    """The name of a chunk, relative to the root."""
    return f"{namespace_path(key.namespace)}/{chunk_name(key)}"


def chunk_key(path: str) -> ChunkKey | None:
    """The key that a relative path names; None where it is not the path of a chunk."""
    parts = path.removesuffix(SUFFIX).split("/")
    if not path.endswith(SUFFIX) or [len(part) for part in parts] != _LENGTHS:
        return None
    try:
        key = ChunkKey.from_bytes(bytes.fromhex("".join(parts)))
    except ValueError:
        return None
    return key if chunk_path(key) == path else None
