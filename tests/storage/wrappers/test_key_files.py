"""Key files: what cannot be random is refused, and what is random never is."""

from __future__ import annotations

import base64
import math
import os
import random
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.storage.wrappers.key_files import not_random, read_key

GOOD = random.Random(7).randbytes(32)
TEXT = b"correct horse battery staple, 32"


def write(path: Path, content: bytes, mode: int = 0o600) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(32), "all the same"),
        (b" " * 32, "all the same"),
        (b"\xff" * 32, "all the same"),
        (b"0" * 64, "all the same"),
        (base64.b64encode(bytes(32)), "all the same"),
        (bytes(range(32)), "a sequence"),
        (bytes(range(0, 64, 2)).hex().encode(), "a sequence"),
        (b"0123456789abcdef0123456789ABCDEF", "it is text; this looks like hex text of 16 bytes"),
        (GOOD[:16].hex().encode(), "it is text; this looks like hex text of 16 bytes"),
        (base64.b64encode(GOOD[:24]), "it is text; this looks like base64 text of 24 bytes"),
        (TEXT, "it is text"),
        (TEXT.hex().encode(), "it is text"),
        (base64.b64encode(TEXT), "it is text"),
        (TEXT[:31] + b"\n", "it is text"),
        (bytes(random.Random(1).choices(range(16), k=32)), "different bytes only"),
        (GOOD[:8] * 4, "different bytes only"),
        (GOOD[:24] + GOOD[:8], "it repeats itself"),
        (GOOD[:20] + bytes(12), "padded"),
        (bytes(8) + GOOD[:24], "padded"),
        (b"", "holds 0"),
        (GOOD[:31], "holds 31"),
        (GOOD + b"\n", "holds 33"),
        (GOOD[:16].hex().encode() + b"\n", "holds 33; this looks like hex text of 16 bytes"),
        (GOOD.hex().encode() * 2, "this looks like hex text of 64 bytes"),
    ],
)
def test_what_is_no_random_key_is_refused_and_not_shown(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_key(write(tmp_path / "key", content))
    said = str(caught.value)
    assert "openssl rand -hex 32" in said
    assert "raw, in hex (64 digits) or in base64 (44 characters)" in said
    for shown in (content.decode("latin-1"), content.hex()):
        assert not shown.strip() or shown.strip() not in said


def test_random_keys_are_not_refused() -> None:
    dice = random.Random(3)
    assert not [key for _ in range(20_000) if not_random(key := dice.randbytes(32))]


def test_fewer_than_one_random_key_in_2_to_the_40_is_refused() -> None:
    # Upper bounds of each rule's chance: the sum over all the ways in which it can come true.
    sequence = 256 * 256 / 256**32
    text = (100 / 256) ** 32
    few = math.comb(256, 16) * (16 / 256) ** 32
    run = 26 / 256**6
    period = sum(256.0 ** -(32 - period) for period in range(1, 27))
    assert sequence + text + few + run + period < 2**-40


@pytest.mark.parametrize(
    "spell", [bytes, lambda key: key.hex().encode(), lambda key: f"{key.hex().upper()}\n".encode()]
)
def test_a_key_is_raw_or_hex(tmp_path: Path, spell: object) -> None:
    assert read_key(write(tmp_path / "key", spell(GOOD))) == GOOD  # type: ignore[operator]


def test_a_key_is_base64_and_a_variable_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_FILE", write(tmp_path / "key", base64.b64encode(GOOD) + b"\n"))
    assert read_key("$KEY_FILE") == read_key("${KEY_FILE}") == GOOD


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/key", "No such file"),
        ("$NO_SUCH_KEY/key", "the environment variable NO_SUCH_KEY is not set"),
        ("${NO_SUCH_KEY}", "the environment variable NO_SUCH_KEY is not set"),
        ("/", "not a regular file"),
        ("/dev/zero", "not a regular file"),
    ],
)
def test_what_is_no_file_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_key(name)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_key(str(tmp_path / "key"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o444])
def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    assert read_key(write(tmp_path / "key", GOOD, mode)) == GOOD
    assert "can be read by others" in caplog.text
    assert GOOD.hex() not in caplog.text


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_key_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="can be written by others than its owner: chmod 600"):
        read_key(write(tmp_path / "key", GOOD, mode))
