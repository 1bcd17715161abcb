"""AES-256-GCM around a backend: names and contents of chunks tell nothing to who lacks their tenant's key.

    name      fingerprint, tenant and tags of the key, each through a keyed hash, and one of the whole key for a digest
    content   "LME2"   salt   ciphertext   tag
              4        28                  16

keys         A key file's 32 bytes are the key of keyed hashes (blake2b) only; what is used elsewhere is derived with
             them, for one purpose and one tenant each.
names        Backends inside, their headers, folders, logs and servers see names only. Parts are hashed apart, so that
             the chunks of one format or of one tenant can still be cleared.
content      Each chunk is encrypted with a key of its own, derived from its tenant's key, its true chunk key and 28
             random bytes, with a nonce from the same hash. The true key is authenticated too: a ciphertext that was
             moved to the name of another chunk does not decrypt.
rotation     New chunks use the first key of a list. Names differ by key, so those of the others are looked for in turn.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.errors import ConfigError
from lmcache.keys import DIGEST_BYTES, FINGERPRINT_BYTES, TAGS_BYTES, TENANT_BYTES, ChunkKey, tenant_id
from lmcache.storage.base import Buffer, StorageBackend
from lmcache.storage.memory.staging import Staging
from lmcache.storage.registry import build_backend
from lmcache.storage.wrappers.base import WrapperConfig
from lmcache.storage.wrappers.key_files import KEY_BYTES, read_key
from lmcache.storage.wrappers.recoding import Fill, Recoding

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ModuleNotFoundError as error:
    raise ConfigError("encrypted needs cryptography; in your clone: pip install -e '.[encryption]'") from error

logger = logging.getLogger(__name__)

MAGIC = b"LME2"
SALT_BYTES, NONCE_BYTES, TAG_BYTES = 28, 12, 16
_HEAD = len(MAGIC) + SALT_BYTES
OVERHEAD = _HEAD + TAG_BYTES
# Namespaces and tenants whose hashes are kept ready; making one anew takes some microseconds.
_KEPT = 1024


class EncryptedConfig(WrapperConfig):
    """Options of ``{type: encrypted}``."""

    keys: tuple[str, ...] = Field(
        (),
        description="files of 32 random bytes (raw, hex or base64), newest first, or $NAME of a variable that holds a "
        "path; none: tenants that are not listed are not stored",
    )
    tenants: dict[str, tuple[str, ...]] = Field(
        {}, description="tenants with keys of their own, as in keys, by the tenant's name: {a: [/etc/lmcache/a.key]}"
    )
    # What the cipher takes at once is less than 2 GiB, and a chunk is never larger than this.
    scratch: ByteSize = Field(ByteSize(64 << 20), gt=4096, lt=1 << 31, description="bytes of memory for ciphertexts")


class _Secret:
    """What is derived from one key file."""

    def __init__(self, material: bytes) -> None:
        self.label = _derive(material, b"label", b"", 4).hex()
        """Tells keys apart in logs."""
        self._material = material
        self._namespace = functools.lru_cache(_KEPT)(self._named_namespace)
        self._tenant_key = functools.lru_cache(_KEPT)(lambda tenant: _derive(material, b"content", tenant, KEY_BYTES))

    def fingerprint(self, fingerprint: bytes) -> bytes:
        """The name of a format."""
        return _derive(self._material, b"name of format", fingerprint, FINGERPRINT_BYTES)

    def tenant(self, tenant: bytes) -> bytes:
        """The name of a tenant."""
        return _derive(self._material, b"name of tenant", tenant, TENANT_BYTES)

    def name(self, key: ChunkKey) -> ChunkKey:
        """The name of a chunk."""
        digest = _derive(self._material, b"name of chunk", key.to_bytes(), DIGEST_BYTES)
        return ChunkKey(self._namespace(key.namespace), digest)

    def cipher(self, key: ChunkKey, salt: bytes) -> tuple[AESGCM, bytes]:
        """The cipher of one writing of a chunk, and its nonce."""
        derived = _derive(self._tenant_key(key.tenant), b"chunk", key.to_bytes() + salt, KEY_BYTES + NONCE_BYTES)
        return AESGCM(derived[:KEY_BYTES]), derived[KEY_BYTES:]

    def _named_namespace(self, namespace: bytes) -> bytes:
        key = ChunkKey(namespace, b"")
        tags = _derive(self._material, b"name of tags", namespace, TAGS_BYTES)
        return self.fingerprint(key.fingerprint) + self.tenant(key.tenant) + tags


class _Generation(Recoding):
    """Chunks under the keys of one age: the newest of each tenant, the second, ..."""

    name: ClassVar[str] = "encrypted"

    def __init__(
        self, inner: StorageBackend, scratch: Staging, secret_of: Callable[[ChunkKey], _Secret | None]
    ) -> None:
        self.inner = inner
        self._scratch = scratch
        self._secret_of = secret_of

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        sizes: list[int] = []
        for key, size in zip(keys, self.inner.sizes(self._names(keys)), strict=False):
            if size <= OVERHEAD:
                self._damaged(key, f"{size} bytes are no ciphertext")
                break
            sizes.append(size - OVERHEAD)
        return sizes

    def _name(self, key: ChunkKey) -> ChunkKey | None:
        secret = self._secret_of(key)
        return None if secret is None else secret.name(key)

    def _stored_sizes(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[int]:
        return [OVERHEAD + buffer.nbytes for buffer in into]

    def _encode(self, key: ChunkKey, payload: memoryview) -> tuple[int, Fill]:
        def fill(stored: memoryview) -> None:
            salt = os.urandom(SALT_BYTES)
            cipher, nonce = self._secret(key).cipher(key, salt)
            stored[:_HEAD] = MAGIC + salt
            cipher.encrypt_into(nonce, payload, MAGIC + key.to_bytes(), stored[_HEAD:])

        return OVERHEAD + payload.nbytes, fill

    def _decode(self, key: ChunkKey, stored: memoryview, payload: memoryview) -> bool:
        if stored[: len(MAGIC)] != MAGIC:
            return self._not_authentic(key, "not an encrypted chunk")
        cipher, nonce = self._secret(key).cipher(key, bytes(stored[len(MAGIC) : _HEAD]))
        try:
            cipher.decrypt_into(nonce, stored[_HEAD:], MAGIC + key.to_bytes(), payload)
        except InvalidTag:
            payload[:] = bytes(payload.nbytes)  # what is not authentic stays nowhere
            return self._not_authentic(key, "its ciphertext is not authentic")
        return True

    def _secret(self, key: ChunkKey) -> _Secret:
        secret = self._secret_of(key)
        assert secret is not None, "a chunk without a name"
        return secret

    def _not_authentic(self, key: ChunkKey, why: str) -> bool:
        metrics.UNREADABLE_CHUNKS.labels("not authentic").inc()
        self._damaged(key, why)
        return False


class Encrypted(StorageBackend):
    """Chunks under names that only the key can make, as ciphertexts that only the key can read.

    What was changed is a miss, and counted. Chunks of other keys are not found, and cannot be told from others.
    """

    name: ClassVar[str] = "encrypted"
    Config = EncryptedConfig

    def __init__(self, config: EncryptedConfig) -> None:
        if not config.keys and not config.tenants:
            raise ConfigError("encrypted: needs keys, or tenants with keys")
        for name, files in config.tenants.items():
            if not files:
                raise ConfigError(f"encrypted: tenants: {name!r} has no key files; leave it out to have it use keys")
        make = functools.cache(_Secret)  # one of each key
        self._default = _ring(config.keys, make)
        self._rings = {tenant_id(name): _ring(files, make) for name, files in config.tenants.items()}
        every = (self._default, *self._rings.values())
        self._secrets = list(dict.fromkeys(secret for ring in every for secret in ring))
        self.inner = build_backend(config.inner, "encrypted.inner")
        self._scratch = Staging(config.scratch)
        self._generations = [
            _Generation(self.inner, self._scratch, functools.partial(self._secret_of, age))
            for age in range(max(len(ring) for ring in every))
        ]
        logger.info("encrypted: keys %s", ", ".join(secret.label for secret in self._secrets))

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        sizes: list[int] = []

        def ask(generation: _Generation, first: int) -> int:
            found = generation.sizes(keys[first:])
            sizes.extend(found)
            return len(found)

        self._leading(len(keys), ask)
        return sizes

    def contains(self, keys: Sequence[ChunkKey]) -> int:
        return self._leading(len(keys), lambda generation, first: generation.contains(keys[first:]))

    def get(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> int:
        return self._leading(len(keys), lambda generation, first: generation.get(keys[first:], into[first:]))

    def put(self, keys: Sequence[ChunkKey], buffers: Sequence[Buffer]) -> int:
        return self._generations[0].put(keys, buffers)

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        # One that was written again after a rotation lies there twice, and may count so among others that are missing.
        return min(len(set(keys)), sum([generation.remove(keys) for generation in self._generations]))

    def clear(self, fingerprint: bytes | None = None) -> int:
        if fingerprint is None:
            return self.inner.clear()
        return sum([self.inner.clear(secret.fingerprint(fingerprint)) for secret in self._secrets])

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        # Under every key: it may have had others before it was given its own.
        count = 0
        for secret in self._secrets:
            named = None if fingerprint is None else secret.fingerprint(fingerprint)
            count += self.inner.clear_tenant(secret.tenant(tenant), named)
        return count

    def close(self) -> None:
        self.inner.close()
        self._scratch.close()

    def _secret_of(self, age: int, key: ChunkKey) -> _Secret | None:
        ring = self._rings.get(key.tenant, self._default)
        return ring[age] if age < len(ring) else None

    def _leading(self, count: int, ask: Callable[[_Generation, int], int]) -> int:
        """The leading run of ``count`` keys, each under whichever key it was written with.

        ask: how many a generation has from a key on. The one that has just come to an end is not asked again at once.
        """
        done, last = 0, None
        while done < count:
            for generation in self._generations:
                if generation is not last and (found := ask(generation, done)):
                    done, last = done + found, generation
                    break
            else:
                break
        return done


def _ring(files: Sequence[str], make: Callable[[bytes], _Secret]) -> list[_Secret]:
    return list(dict.fromkeys(make(read_key(file)) for file in files))


def _derive(key: bytes, purpose: bytes, message: bytes, nbytes: int) -> bytes:
    """A keyed hash: whoever lacks ``key`` cannot tell it from random bytes; purposes are independent of each other."""
    return hashlib.blake2b(message, digest_size=nbytes, key=key, person=purpose).digest()
