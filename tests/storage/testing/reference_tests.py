"""The conformance suite on the backend that is plainly right, and on its mutants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

import pytest

from lmcache.keys import ChunkKey
from lmcache.storage.base import StorageBackend
from lmcache.storage.testing import BackendTests
from lmcache.storage.testing.reference import FolderBackend, FolderConfig


class FolderTests(BackendTests):
    kind: ClassVar[type[FolderBackend]] = FolderBackend

    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: self.kind(FolderConfig(path=tmp_path / "kv"))

    @pytest.fixture
    def open_small_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return lambda: self.kind(FolderConfig(path=tmp_path / "small", capacity=1 << 20))

    @pytest.fixture
    def damage(self, tmp_path: Path) -> Callable[[ChunkKey], None]:
        def change(key: ChunkKey) -> None:
            name = getattr(self.kind, "_name", lambda key: key)  # of mutants that know it by another key
            file = self.kind(FolderConfig(path=tmp_path / "kv")).file_of(name(key))
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)

        return change

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Callable[[], AbstractContextManager[None]]:
        @contextlib.contextmanager
        def without_folder() -> Iterator[None]:
            (tmp_path / "kv").rename(tmp_path / "away")
            (tmp_path / "kv").write_bytes(b"")
            yield
            (tmp_path / "kv").unlink()
            (tmp_path / "away").rename(tmp_path / "kv")

        return without_folder
