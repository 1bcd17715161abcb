"""The value types everything shares: what KV is (KVFormat), and which KV it is (ChunkKey).

A ``ChunkKey`` is ``namespace || digest``:

    namespace  32 bytes = fingerprint(KVFormat) [16]  ||  hash(tags of the request) [16]
    digest     32 bytes = blake2b(parent digest || token ids as uint32 || extras, key=namespace)

Everything is hashed with blake2b over explicit bytes, so a key is the same in every process and on every
host, whatever PYTHONHASHSEED is, and two different meanings never share a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

FINGERPRINT_BYTES = 16
NAMESPACE_BYTES = 32
DIGEST_BYTES = 32
ROOT_DIGEST = bytes(DIGEST_BYTES)


class PlaneFormat(msgspec.Struct, frozen=True, kw_only=True):
    """One plane: layers of one cache group whose pages have the same shape and the same block table.

    heads, block_tokens, content: the ``[H, N, C]`` of a page (C: K and V side by side, or the MLA latent).
    dtype: element type of a page, as torch prints it without the prefix ("bfloat16").
    window: sliding window in tokens, 0 for full attention.
    """

    group: int
    layers: tuple[str, ...]
    heads: int
    block_tokens: int
    content: int
    dtype: str
    kind: str
    window: int = 0


class KVFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that changes the bytes of a chunk. Equal formats have equal fingerprints, on any host.

    model: identity of the weights (name and revision, or a content fingerprint of a local folder).
    layout: how the engine lays tokens out inside a page ("token" where a token is addressable; else the name
        of an opaque format such as "vllm-cpu-0.32.0/vec16", valid only for whole blocks).
    extras: (name, value) pairs for whatever else changes KV (rope overrides, quantisation, ...), sorted.
    """

    model: str
    chunk_tokens: int
    planes: tuple[PlaneFormat, ...]
    layout: str = "token"
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    codec: str = "raw"
    extras: tuple[tuple[str, str], ...] = ()

    def fingerprint(self) -> bytes:
        """16 bytes that identify this format."""
        canonical = msgspec.json.encode(self, order="sorted")
        return hashlib.blake2b(canonical, digest_size=FINGERPRINT_BYTES, person=b"lmcache-format").digest()


class ChunkKey(NamedTuple):
    """Which KV: compares and hashes as the 64 bytes it is made of."""

    namespace: bytes
    digest: bytes

    @property
    def fingerprint(self) -> bytes:
        """The 16 bytes of the KVFormat inside the namespace."""
        return self.namespace[:FINGERPRINT_BYTES]

    def to_bytes(self) -> bytes:
        return self.namespace + self.digest

    @classmethod
    def from_bytes(cls, raw: bytes) -> ChunkKey:
        if len(raw) != NAMESPACE_BYTES + DIGEST_BYTES:
            raise ValueError(f"a chunk key has {NAMESPACE_BYTES + DIGEST_BYTES} bytes, got {len(raw)}")
        return cls(raw[:NAMESPACE_BYTES], raw[NAMESPACE_BYTES:])

    def __str__(self) -> str:
        return f"{self.namespace.hex()[:8]}:{self.digest.hex()[:12]}"


@dataclass(frozen=True, slots=True)
class PlaceholderSpan:
    """Token positions ``[start, stop)`` whose KV depends on content that the token ids do not name.

    content: full-width hash of that content (a multimodal item, for example), never shortened.
    """

    start: int
    stop: int
    content: bytes


def namespace(fingerprint: bytes, tags: Mapping[str, str] | None = None) -> bytes:
    """The namespace of a request: its format, and every tagged input that changes KV (LoRA, cache salt, ...).

    Each tag is hashed as (length, name, length, value), so no two sets of tags can read the same.
    Tags with an empty value count as absent.
    """
    h = hashlib.blake2b(digest_size=NAMESPACE_BYTES - FINGERPRINT_BYTES, person=b"lmcache-tags")
    for name, value in sorted((tags or {}).items()):
        if value:
            for field in (name.encode(), value.encode()):
                h.update(len(field).to_bytes(8, "little"))
                h.update(field)
    return fingerprint + h.digest()


def chunk_digest(
    namespace: bytes,
    parent: bytes,
    tokens: bytes | memoryview,
    start: int,
    placeholders: Iterable[PlaceholderSpan] = (),
) -> bytes:
    """Digest of one chunk.

    parent: digest of the chunk before it (ROOT_DIGEST for the first).
    tokens: its token ids as little-endian uint32.
    start: position of its first token, only used to place ``placeholders`` relative to the chunk.
    """
    h = hashlib.blake2b(parent, digest_size=DIGEST_BYTES, key=namespace)
    h.update(tokens)
    stop = start + len(tokens) // 4
    for span in placeholders:
        if span.start < stop and span.stop > start:
            # Where the item lies relative to this chunk, then its content; fixed-width fields, so unambiguous.
            h.update((span.start - start).to_bytes(8, "little", signed=True))
            h.update((span.stop - start).to_bytes(8, "little", signed=True))
            h.update(len(span.content).to_bytes(8, "little"))
            h.update(span.content)
    return h.digest()
