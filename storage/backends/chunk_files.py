"""A folder of chunk files for backends whose library does the reading and writing.

    <path>/<format fingerprint>/<tag hash>/<digest>.kv      header (4096 bytes), payload

A file is written under a temporary name and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from lmcache.errors import ConfigError, CorruptChunkError, StorageError
from lmcache.keys import DIGEST_BYTES, FINGERPRINT_BYTES, NAMESPACE_BYTES, ChunkKey
from lmcache.storage.chunk import HEADER_BYTES, check_header

logger = logging.getLogger(__name__)

SUFFIX, TEMPORARY = ".kv", ".tmp-"
_LENGTHS = [2 * FINGERPRINT_BYTES, 2 * (NAMESPACE_BYTES - FINGERPRINT_BYTES), 2 * DIGEST_BYTES]
# The token tells our temporary files from those of a killed process that had our pid, as in a restarted container.
_TOKEN = secrets.token_hex(4)
_serial = itertools.count()


def chunk_name(key: ChunkKey) -> str:
    """Path of a chunk below its root."""
    tags = key.namespace[FINGERPRINT_BYTES:]
    return f"{key.fingerprint.hex()}/{tags.hex()}/{key.digest.hex()}{SUFFIX}"


class ChunkFiles:
    """Names, temporary names and scans of one folder. ConfigError when it cannot be written."""

    def __init__(self, root: Path, tier: str) -> None:
        self.root, self._tier = root.expanduser().absolute(), tier
        probe = self.root / _temporary_name()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"the {tier} tier cannot write to {self.root}: {error}") from error

    def path(self, key: ChunkKey) -> Path:
        return self.root / chunk_name(key)

    def find(self, key: ChunkKey) -> int:
        """Bytes of its file, 0 where there is none that may be whole."""
        try:
            size = self.path(key).stat().st_size
        except OSError:
            return 0
        return size if size > HEADER_BYTES else 0

    def temporary(self, key: ChunkKey) -> Path:
        """A name beside that of ``key``, in a folder that exists."""
        path = self.path(key).with_name(_temporary_name())
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def delete(self, key: ChunkKey) -> bool:
        """Whether there was one. StorageError when it cannot be removed."""
        try:
            self.path(key).unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise StorageError(f"cannot remove {self.path(key)}: {error}") from error
        return True

    def misfit(self, key: ChunkKey, file: int, wanted: int) -> bool | StorageError | None:
        """None when the open file has ``wanted`` bytes, False when it is whole but of another length, or an error."""
        path = self.path(key)
        try:
            size = os.fstat(file).st_size
            if size == wanted:
                return None
            with path.open(
                "rb"
            ) as again:  # not by the descriptor, that may bypass the page cache and ask for alignment
                if size == HEADER_BYTES + check_header(again.read(HEADER_BYTES), key)[0]:
                    return False
        except CorruptChunkError as error:
            return error
        except OSError as error:
            return StorageError(f"cannot read {path}: {error}")
        return CorruptChunkError(f"{path} has {size} bytes, expected {wanted}")

    def used(self, key: ChunkKey) -> None:
        """Note that it was used, so that the order of use survives a restart."""
        with contextlib.suppress(OSError):
            os.utime(self.path(key))

    def scan(self) -> list[tuple[ChunkKey, int]]:
        """Every chunk and the bytes of its file, the longest unused first; removes what killed writers left."""
        found: list[tuple[int, ChunkKey, int]] = []
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if entry.name.startswith(TEMPORARY):
                    _remove_if_orphaned(entry)
                elif (key := self._key(entry.path)) is not None:
                    stat = entry.stat()
                    if stat.st_size > HEADER_BYTES:
                        found.append((stat.st_mtime_ns, key, stat.st_size))
        return [(key, size) for _, key, size in sorted(found)]

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for folder in self.root.glob("*/*"):
            with contextlib.suppress(NotADirectoryError, FileNotFoundError), os.scandir(folder) as entries:
                yield from entries

    def _key(self, path: str) -> ChunkKey | None:
        """The key that a file is named after; None for a file that is not ours."""
        parts = path.removesuffix(SUFFIX).split("/")[-3:]
        if not path.endswith(SUFFIX) or [len(part) for part in parts] != _LENGTHS:
            return None
        try:
            return ChunkKey.from_bytes(bytes.fromhex("".join(parts)))
        except ValueError:
            return None


def reserve(file: int, nbytes: int) -> None:
    """Ask for the room before a library writes: the kernel says why there is none, where the library may not."""
    os.posix_fallocate(file, 0, nbytes)


def _temporary_name() -> str:
    return f"{TEMPORARY}{os.getpid()}-{_TOKEN}-{next(_serial)}"


def _remove_if_orphaned(entry: os.DirEntry[str]) -> None:
    pid, _, rest = entry.name.removeprefix(TEMPORARY).partition("-")
    if not pid.isdecimal() or not rest:
        return  # not one of ours
    if int(pid) == os.getpid():
        if not rest.startswith(_TOKEN):
            os.unlink(entry.path)
        return
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return
    except (ProcessLookupError, OverflowError):
        os.unlink(entry.path)
