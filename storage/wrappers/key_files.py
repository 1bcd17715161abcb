"""Files that hold a key: 32 random bytes, raw, in hex or in base64."""

from __future__ import annotations

import binascii
import contextlib
import itertools
import logging
import os
import re
import stat
import string
from pathlib import Path

from lmcache.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_BYTES = 32
_MOST_READ = 4096
_HOW = (
    "A key is 32 random bytes, raw, in hex (64 digits) or in base64 (44 characters). To make one: "
    "(umask 077; openssl rand -hex 32 > FILE), or python -c 'import secrets; print(secrets.token_hex(32))'"
)
# Each is true of fewer than one in 2^42 random keys; tests/storage/wrappers/test_key_files.py has the sums.
_TEXT = frozenset(string.printable.encode())
_FEW_BYTES = 16
_LONG_RUN = 7
_LONG_PERIOD = 26


def read_key(name: str) -> bytes:
    """The key in a file. name: its path, or ``$NAME`` of a variable that holds it.

    ConfigError, which does not show what it holds, for what is no key, cannot be random, or others may write.
    """
    path = _path(name)
    raw = _read(path)
    key = raw if len(raw) == KEY_BYTES else _decoded(raw.strip())
    if key is None or len(key) != KEY_BYTES:
        raise ConfigError(f"encrypted: {path} must hold 32 bytes, it holds {len(raw)}{_as_text(raw)}. {_HOW}")
    if why := not_random(key):
        # 32 characters, most often, that are another spelling of a shorter key.
        raise ConfigError(f"encrypted: the key in {path} is not random: {why}{_as_text(raw)}. {_HOW}")
    return key


def not_random(key: bytes) -> str | None:
    """Why 32 bytes cannot have come from a random source; None when they can."""
    steps = {(after - before) % 256 for before, after in itertools.pairwise(key)}
    if len(steps) == 1:
        return "its bytes are all the same" if steps == {0} else "its bytes are a sequence"
    if _TEXT.issuperset(key):
        return "it is text"
    if len(set(key)) <= _FEW_BYTES:
        return f"it has {len(set(key))} different bytes only"
    if any(key[at : at + _LONG_RUN] == key[at : at + 1] * _LONG_RUN for at in range(len(key))):
        return f"one byte is repeated {_LONG_RUN} times or more, as in a shorter key that was padded"
    if any(key[period:] == key[:-period] for period in range(1, _LONG_PERIOD + 1)):
        return "it repeats itself"
    return None


def _path(name: str) -> Path:
    expanded = os.path.expandvars(name)
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise ConfigError(f"encrypted: keys: {name}: the environment variable {unset[1]} is not set")
    return Path(expanded).expanduser()


def _read(path: Path) -> bytes:
    try:
        # Without waiting for who writes to a pipe.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"encrypted: the key file {path} is not a regular file")
            raw = os.read(file, _MOST_READ)
        finally:
            os.close(file)
    except OSError as error:
        raise ConfigError(f"encrypted: cannot read the key file {path}: {error.strerror}") from None
    if status.st_mode & 0o022:
        raise ConfigError(f"encrypted: the key file {path} can be written by others than its owner: chmod 600 {path}")
    if status.st_mode & 0o044:
        # Not an error: secrets of Kubernetes are mounted like that unless defaultMode says otherwise.
        logger.warning("the key file %s can be read by others than its owner: chmod 600 %s", path, path)
    return raw


def _decoded(text: bytes) -> bytes | None:
    """What hex or base64 stands for."""
    with contextlib.suppress(ValueError):
        return binascii.unhexlify(text)
    with contextlib.suppress(ValueError):
        return binascii.a2b_base64(text, strict_mode=True)
    return None


def _as_text(raw: bytes) -> str:
    text = raw.strip()
    if not text or (decoded := _decoded(text)) is None or len(decoded) == KEY_BYTES:
        return ""
    spelling = "hex" if re.fullmatch(rb"[0-9a-fA-F]+", text) else "base64"
    return f"; this looks like {spelling} text of {len(decoded)} bytes"
