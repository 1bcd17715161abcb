"""AES-256-GCM around a backend: what is stored can be read with its tenant's key only, and only under its own name.

    stored:  "LME1"   key id   nonce   ciphertext   tag
             4        16       12                   16

key id       a hash of the key material, so two keys never share one and files may be renamed
per tenant   a chunk is encrypted with a key derived (HKDF-SHA256) from the key material and the tag part of its
             namespace: requests with other tags (cache_salt, LoRA) use other keys, also where the material is the same
additional   the key id and the chunk's full key are authenticated too: a ciphertext that was moved to the name of
data         another chunk does not decrypt
rotation     new chunks use the first key of a list; those of the others can still be read
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.config import Config
from lmcache.errors import ConfigError
from lmcache.keys import FINGERPRINT_BYTES, ChunkKey, namespace
from lmcache.storage.base import Buffer
from lmcache.storage.recoding import Fill, Recoding, Scratch
from lmcache.storage.registry import build_backend
from lmcache.storage.wrappers import WrapperConfig

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ModuleNotFoundError as error:
    raise ConfigError("encrypted needs cryptography; in your clone: pip install -e '.[encryption]'") from error

logger = logging.getLogger(__name__)

MAGIC = b"LME1"
KEY_BYTES, ID_BYTES, NONCE_BYTES, TAG_BYTES = 32, 16, 12, 16
_HEAD = len(MAGIC) + ID_BYTES
OVERHEAD = _HEAD + NONCE_BYTES + TAG_BYTES
# Derived keys that are kept ready; deriving one anew takes some microseconds.
_CIPHERS = 4096


class TenantKeys(Config):
    """Keys of the requests that carry exactly these tags."""

    tags: dict[str, str] = Field(description="every tag of the requests, as {cache_salt: ...}")
    keys: tuple[str, ...] = Field(min_length=1, description="as in keys")


class EncryptedConfig(WrapperConfig):
    """Options of ``{type: encrypted}``."""

    keys: tuple[str, ...] = Field(
        (),
        description="files of 32 bytes (raw, hex or base64), newest first, or $NAME of a variable that holds a path; "
        "none: tenants that are not listed are not stored",
    )
    tenants: tuple[TenantKeys, ...] = Field((), description="tenants with keys of their own")
    remove_unknown: bool = Field(
        False, description="remove chunks of a key that is not listed; only once no process uses that key any more"
    )
    scratch: ByteSize = Field(ByteSize(64 << 20), gt=4096, description="bytes of memory for ciphertexts")


class _KeyRing:
    """The key material of one tenant, newest first."""

    def __init__(self, materials: Sequence[bytes]) -> None:
        self.by_id = {_key_id(material): material for material in materials}
        self.newest = next(iter(self.by_id))


class Encrypted(Recoding):
    """Payloads as AES-GCM ciphertexts. A wrong key or a changed ciphertext is a miss, and counted."""

    name: ClassVar[str] = "encrypted"
    Config = EncryptedConfig

    def __init__(self, config: EncryptedConfig) -> None:
        if not config.keys and not config.tenants:
            raise ConfigError("encrypted: needs keys, or tenants with keys")
        self._default = _KeyRing([_read_key(path) for path in config.keys]) if config.keys else None
        self._tenants: Mapping[bytes, _KeyRing] = {
            _tenant(namespace(bytes(FINGERPRINT_BYTES), tenant.tags)): _KeyRing([_read_key(p) for p in tenant.keys])
            for tenant in config.tenants
        }
        self._remove_unknown = config.remove_unknown
        self._ciphers: dict[tuple[bytes, bytes], AESGCM] = {}
        self._lock = threading.Lock()
        self.inner = build_backend(config.inner, "encrypted.inner")
        self._scratch = Scratch(config.scratch)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        sizes: list[int] = []
        for key, size in zip(keys, self.inner.sizes(keys), strict=False):
            if size <= OVERHEAD:
                self._damaged(key, f"{size} bytes are no ciphertext")
                break
            sizes.append(size - OVERHEAD)
        return sizes

    def _stored_sizes(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[int]:
        return [OVERHEAD + buffer.nbytes for buffer in into]

    def _encode(self, key: ChunkKey, payload: memoryview) -> tuple[int, Fill] | None:
        ring = self._ring(key)
        if ring is None:
            return None
        head = MAGIC + ring.newest
        cipher = self._cipher(ring, ring.newest, key)

        def fill(stored: memoryview) -> None:
            nonce = os.urandom(NONCE_BYTES)
            stored[:_HEAD] = head
            stored[_HEAD : _HEAD + NONCE_BYTES] = nonce
            cipher.encrypt_into(nonce, payload, head + key.to_bytes(), stored[_HEAD + NONCE_BYTES :])

        return OVERHEAD + payload.nbytes, fill

    def _decode(self, key: ChunkKey, stored: memoryview, payload: memoryview) -> bool:
        head, nonce = bytes(stored[:_HEAD]), bytes(stored[_HEAD : _HEAD + NONCE_BYTES])
        ring, key_id = self._ring(key), head[len(MAGIC) :]
        if head[: len(MAGIC)] != MAGIC:
            metrics.UNREADABLE_CHUNKS.labels("not authentic").inc()
            self._damaged(key, "not an encrypted chunk")
            return False
        if ring is None or key_id not in ring.by_id:
            metrics.UNREADABLE_CHUNKS.labels("no key").inc()
            if self._remove_unknown:
                self.inner.remove([key])
            return False
        try:
            self._cipher(ring, key_id, key).decrypt_into(
                nonce, stored[_HEAD + NONCE_BYTES :], head + key.to_bytes(), payload
            )
        except InvalidTag:
            payload[:] = bytes(payload.nbytes)  # what is not authentic stays nowhere
            metrics.UNREADABLE_CHUNKS.labels("not authentic").inc()
            self._damaged(key, "its ciphertext is not authentic")
            return False
        return True

    def _ring(self, key: ChunkKey) -> _KeyRing | None:
        return self._tenants.get(_tenant(key.namespace), self._default)

    def _cipher(self, ring: _KeyRing, key_id: bytes, key: ChunkKey) -> AESGCM:
        """The cipher of a tenant, by one of the keys of ``ring``."""
        tenant = _tenant(key.namespace)
        with self._lock:
            cipher = self._ciphers.get((key_id, tenant))
        if cipher is None:
            derive = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"lmcache-chunk" + tenant)
            cipher = AESGCM(derive.derive(ring.by_id[key_id]))
            with self._lock:
                if len(self._ciphers) >= _CIPHERS:
                    self._ciphers.clear()
                self._ciphers[key_id, tenant] = cipher
        return cipher


def _tenant(name: bytes) -> bytes:
    """The part of a namespace that tells requests by their tags."""
    return name[FINGERPRINT_BYTES:]


def _key_id(material: bytes) -> bytes:
    return hashlib.blake2b(material, digest_size=ID_BYTES, person=b"lmcache-key-id").digest()


def _read_key(name: str) -> bytes:
    """The 32 bytes in a file. ConfigError, which does not show them, when it holds something else."""
    expanded = os.path.expandvars(name)
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise ConfigError(f"encrypted: keys: {name}: the environment variable {unset[1]} is not set")
    path = Path(expanded).expanduser()
    try:
        raw = path.read_bytes()
        shared = path.stat().st_mode & 0o077
    except OSError as error:
        raise ConfigError(f"encrypted: cannot read the key file {path}: {error.strerror}") from None
    if shared:
        logger.warning("the key file %s can be read by others than its owner", path)
    if len(raw) == KEY_BYTES:
        return raw
    text = raw.strip()
    for decode in (binascii.unhexlify, lambda text: base64.b64decode(text, validate=True)):
        try:
            material = decode(text)
        except ValueError:
            continue
        if len(material) == KEY_BYTES:
            return bytes(material)
    raise ConfigError(f"encrypted: {path} must hold 32 bytes, raw, in hex or in base64; it holds {len(raw)} bytes")
