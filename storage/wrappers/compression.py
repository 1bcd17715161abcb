"""Lossless compression around a backend.

    stored:  "LMZ1"   method   zero     payload bytes   frame, or the payload where it did not shrink
             4        1        3        8

The length of a payload is known from its stored form only. It is remembered when it is written or read; for others the
stored form is read once, which is why ``sizes`` looks no further ahead than ``lookahead``. Where all chunks of a format
are of one length (every codec but the entropy coded ones), say ``uniform: true``, and one read tells of all.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import ClassVar

from pydantic import ByteSize, Field

from lmcache import metrics
from lmcache.errors import ConfigError
from lmcache.keys import ChunkKey
from lmcache.storage.base import Buffer
from lmcache.storage.index import RecentSizes
from lmcache.storage.memory.staging import Staging
from lmcache.storage.registry import build_backend
from lmcache.storage.wrappers.base import WrapperConfig
from lmcache.storage.wrappers.recoding import Fill, Recoding

try:
    import zstandard
except ModuleNotFoundError as error:
    raise ConfigError("zstd needs zstandard; in your clone: pip install -e '.[zstd]'") from error

MAGIC = b"LMZ1"
PLAIN, ZSTD = 0, 1
_PREAMBLE = struct.Struct("<4sB3xQ")
# A frame that is not shorter than this share of the payload is not worth decompressing.
_WORTH = 0.98


class ZstdConfig(WrapperConfig):
    """Options of ``{type: zstd}``."""

    level: int = Field(1, ge=-7, le=19, description="1 is fast, 19 is small")
    scratch: ByteSize = Field(ByteSize(64 << 20), gt=4096, description="bytes of memory for what is stored")
    lookahead: ByteSize = Field(
        ByteSize(64 << 20), gt=0, description="bytes that one question for sizes may read, where it must read"
    )
    index_entries: int = Field(200_000, ge=1, description="chunks whose lengths are remembered")
    uniform: bool = Field(False, description="all chunks of a format are of one length, so that one tells of all")


class Zstd(Recoding):
    """Payloads as zstd frames. ``sizes`` may end before the run does, where it would have to read too much."""

    name: ClassVar[str] = "zstd"
    Config = ZstdConfig

    def __init__(self, config: ZstdConfig) -> None:
        self._config = config
        self._index = RecentSizes(config.index_entries, float("inf"))
        self._of_format: dict[bytes, int] = {}  # empty unless ``uniform``
        self._local = threading.local()  # zstandard's objects are for one thread each
        self.inner = build_backend(config.inner, "zstd.inner")
        self._scratch = Staging(config.scratch)

    def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        stored = self.inner.sizes(keys)
        found = self._index.among(keys[: len(stored)])
        sizes: list[int] = []
        budget = int(self._config.lookahead)
        for key, nbytes in zip(keys, stored, strict=False):
            size = found.get(key) or self._of_format.get(key.fingerprint)
            if size is None:
                budget -= nbytes
                size = self._learn(key, nbytes) if budget >= 0 or not sizes else None
            if size is None:
                break
            sizes.append(size)
        return sizes

    def remove(self, keys: Sequence[ChunkKey]) -> int:
        self._index.drop(keys)
        return super().remove(keys)

    def clear(self, fingerprint: bytes | None = None) -> int:
        self._index.clear()
        self._of_format.clear()
        return super().clear(fingerprint)

    def clear_tenant(self, tenant: bytes, fingerprint: bytes | None = None) -> int:
        self._index.clear()
        return super().clear_tenant(tenant, fingerprint)

    def _learn(self, key: ChunkKey, stored_bytes: int) -> int | None:
        """The length that the stored form of a chunk states; it is read for that."""
        lengths: list[int | None] = []

        def look(_: int, stored: memoryview) -> bool:
            lengths.append(self._length(key, stored))
            return True

        self._read([key], [stored_bytes], look)
        return lengths[0] if lengths else None

    def _length(self, key: ChunkKey, stored: memoryview) -> int | None:
        """The payload's length as the stored form states it, remembered; None, and removed, when it is none of ours."""
        if stored.nbytes >= _PREAMBLE.size:
            magic, method, nbytes = _PREAMBLE.unpack_from(stored)
            if magic == MAGIC and method in (PLAIN, ZSTD) and nbytes > 0:
                self._remember(key, nbytes)
                return int(nbytes)
        self._index.drop([key])
        self._damaged(key, "not a compressed chunk")
        return None

    def _remember(self, key: ChunkKey, nbytes: int) -> None:
        self._index.add(key, nbytes)
        if self._config.uniform and len(self._of_format) < self._config.index_entries:
            self._of_format[key.fingerprint] = nbytes

    def _stored_sizes(self, keys: Sequence[ChunkKey], into: Sequence[Buffer]) -> list[int]:
        return self.inner.sizes(keys)

    def _encode(self, key: ChunkKey, payload: memoryview) -> tuple[int, Fill]:
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=self._config.level)
        frame = memoryview(compressor.compress(payload))
        method = ZSTD
        if frame.nbytes > payload.nbytes * _WORTH:
            method, frame = PLAIN, payload
        metrics.COMPRESSED_BYTES.labels("before").inc(payload.nbytes)
        metrics.COMPRESSED_BYTES.labels("after").inc(frame.nbytes)

        def fill(stored: memoryview) -> None:
            _PREAMBLE.pack_into(stored, 0, MAGIC, method, payload.nbytes)
            stored[_PREAMBLE.size :] = frame

        # Should a chunk of another length be held already, and stay, then reading it puts this right.
        if not self._index.among([key]):
            self._remember(key, payload.nbytes)
        return _PREAMBLE.size + frame.nbytes, fill

    def _decode(self, key: ChunkKey, stored: memoryview, payload: memoryview) -> bool:
        nbytes = self._length(key, stored)
        if nbytes is None or nbytes != payload.nbytes:
            return False
        content = stored[_PREAMBLE.size :]
        if stored[4] == PLAIN:
            whole = content.nbytes == nbytes
            if whole:
                payload[:] = content
        else:
            whole = self._decompress(content, payload)
        if not whole:
            self._index.drop([key])
            self._damaged(key, "its frame does not decompress to what it states")
        return whole

    def _decompress(self, frame: memoryview, payload: memoryview) -> bool:
        """Straight into ``payload``; whether that is exactly what the frame holds."""
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        offset = 0
        try:
            with decompressor.stream_reader(frame) as reader:
                while offset < payload.nbytes:
                    count = reader.readinto(payload[offset:])
                    if not count:
                        return False
                    offset += count
                return not reader.read(1)
        except zstandard.ZstdError:
            return False
