"""The value types everything shares: what KV is (KVFormat), and which KV it is (ChunkKey).

A ``ChunkKey`` is ``namespace || digest``:

    namespace  48 bytes = fingerprint(KVFormat) [16]  ||  tenant [16]  ||  hash(all tags of the request) [16]
    digest     32 bytes = blake2b(parent digest || token ids as uint32 || extras, key=namespace)

The tenant of a request is a name, ``tenant_of(tags)``: the value of its tag ``tenant`` (``lmcache.tags`` in vLLM), else
its cache salt, else "". Quotas, keys of encryption, ``clear`` and metrics all mean this name. Keys carry its hash,
``tenant_id(name)``: zeros for "". It tells whose chunks these are, whatever else (an adapter, other tags) they depend
on; what may share KV is told by all of the namespace, so two tenants never share any.

Everything is hashed with blake2b over explicit bytes, so a key is the same in every process and on every
host, whatever PYTHONHASHSEED is, and two different meanings never share a key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

FINGERPRINT_BYTES = 16
TENANT_BYTES = 16
TAGS_BYTES = 16
NAMESPACE_BYTES = FINGERPRINT_BYTES + TENANT_BYTES + TAGS_BYTES
DIGEST_BYTES = 32
KEY_BYTES = NAMESPACE_BYTES + DIGEST_BYTES
ROOT_DIGEST = bytes(DIGEST_BYTES)
TENANT_TAG, SALT_TAG = "tag.tenant", "cache_salt"
NO_TENANT = bytes(TENANT_BYTES)
# Mixed into what ``str`` shows of a key: a digest in a log would let its readers confirm guesses of a prompt.
_LOG_KEY = os.urandom(32)


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
    """Which KV: compares and hashes as the 80 bytes it is made of."""

    namespace: bytes
    digest: bytes

    @property
    def fingerprint(self) -> bytes:
        """The 16 bytes of the KVFormat inside the namespace."""
        return self.namespace[:FINGERPRINT_BYTES]

    @property
    def tenant(self) -> bytes:
        """The 16 bytes of the tenant inside the namespace: ``tenant_id`` of its name."""
        return self.namespace[FINGERPRINT_BYTES : FINGERPRINT_BYTES + TENANT_BYTES]

    def to_bytes(self) -> bytes:
        return self.namespace + self.digest

    @classmethod
    def from_bytes(cls, raw: bytes) -> ChunkKey:
        if len(raw) != KEY_BYTES:
            raise ValueError(f"a chunk key has {KEY_BYTES} bytes, got {len(raw)}")
        return cls(raw[:NAMESPACE_BYTES], raw[NAMESPACE_BYTES:])

    def __str__(self) -> str:
        """For logs and errors: the same for the same key in one process, and of no use to who guesses at prompts."""
        alias = hashlib.blake2b(self.to_bytes(), digest_size=6, key=_LOG_KEY).hexdigest()
        return f"{self.namespace.hex()[:8]}:{alias}"


@dataclass(frozen=True, slots=True)
class PlaceholderSpan:
    """Token positions ``[start, stop)`` whose KV depends on content that the token ids do not name.

    content: full-width hash of that content (a multimodal item, for example), never shortened.
    """

    start: int
    stop: int
    content: bytes


def tenant_of(tags: Mapping[str, str] | None) -> str:
    """The name of the tenant that a request with these tags belongs to; "" for one that names none."""
    tags = tags or {}
    return tags.get(TENANT_TAG) or tags.get(SALT_TAG) or ""


def tenant_id(name: str) -> bytes:
    """The 16 bytes by which keys name a tenant."""
    if not name:
        return NO_TENANT
    return hashlib.blake2b(name.encode(), digest_size=TENANT_BYTES, person=b"lmcache-tenant").digest()


def namespace(fingerprint: bytes, tags: Mapping[str, str] | None = None) -> bytes:
    """The namespace of a request: its format, its tenant, and every tagged input that changes KV (LoRA, salt, ...).

    Each tag is hashed as (length, name, length, value), so no two sets of tags can read the same.
    Tags with an empty value count as absent.
    """
    h = hashlib.blake2b(digest_size=TAGS_BYTES, person=b"lmcache-tags")
    for name, value in sorted((tags or {}).items()):
        if value:
            for field in (name.encode(), value.encode()):
                h.update(len(field).to_bytes(8, "little"))
                h.update(field)
    return fingerprint + tenant_id(tenant_of(tags)) + h.digest()


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
