"""The suite on places of one file a chunk: damage in a file, and a disk that fails."""

from __future__ import annotations

import contextlib
import errno
import os
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lmcache.keys import ChunkKey
from lmcache.storage.testing import BackendTests


class InFiles(BackendTests):
    """Files lie below ``tmp_path``, by the digests of their keys."""

    @pytest.fixture
    def damage(self, tmp_path: Path) -> Callable[[ChunkKey], None]:
        def change(key: ChunkKey) -> None:
            (file,) = tmp_path.rglob(f"{key.digest.hex()}.kv")
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)

        return change

    @pytest.fixture
    def broken(self) -> Callable[[], AbstractContextManager[None]]:
        @contextlib.contextmanager
        def failing() -> Iterator[None]:
            error = OSError(errno.EIO, os.strerror(errno.EIO))
            with (
                unittest.mock.patch.object(os, "preadv", side_effect=error),
                unittest.mock.patch.object(os, "pwritev", side_effect=error),
            ):
                yield

        return failing
