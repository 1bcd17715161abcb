"""Configuration: one way in, and a typo is an error that names what is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache.config import CONFIG_FILE_VARIABLE, load_config, masked
from lmcache.errors import ConfigError


def test_defaults_work_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_FILE_VARIABLE, raising=False)
    assert load_config().memory.capacity == 1 << 30


def test_file_then_overrides_and_mappings_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("chunk_tokens: 256\nmemory: {capacity: 2GiB, eviction: lru}\n")
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(file))
    config = load_config(overrides={"memory": {"capacity": "3GiB"}, "memory.huge_pages": False, "write_queue": "1MiB"})
    assert config.chunk_tokens == 256
    assert (config.memory.capacity, config.memory.huge_pages) == (3 << 30, False)
    assert config.write_queue == 1 << 20


def test_an_explicit_path_beats_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(tmp_path / "absent.yaml"))
    file = tmp_path / "c.yaml"
    file.write_text("chunk_tokens: 32\n")
    assert load_config(file).chunk_tokens == 32
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"chunk_token": 3}, "unknown key chunk_token; known: chunk_tokens, model_id"),
        ({"memory.capactiy": "1GiB"}, "memory: unknown key capactiy; known: capacity"),
        ({"chunk_tokens": "many"}, "chunk_tokens: .*got 'many'"),
        ({"memory": {"capacity": "lots"}}, r"memory\.capacity.*got 'lots'"),
        ({"memory": {"capacity": "4 lots"}}, r"memory\.capacity: expected a size such as 4GiB \(got '4 lots'\)"),
        ({"tiers": {"type": "disk"}}, r"tiers: expected a list, e\.g\. \[\{type: disk, \.\.\.\}\] \(got"),
        ({"tiers": ["disk"]}, r"tiers\.0: expected a mapping, .*got 'disk'"),
        ({"memory": "4GiB"}, "memory: expected a mapping, .*got '4GiB'"),
        ({"read_timeout_s": 0}, "read_timeout_s.*greater than 0"),
    ],
)
def test_mistakes_are_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


def test_a_section_that_is_null_is_absent() -> None:
    config = load_config(overrides={"memory": None, "tiers": None, "quotas": None, "breaker": None})
    assert config == load_config(overrides={"chunk_tokens": None})


def test_a_mistake_in_a_tier_shows_no_secret() -> None:
    tier = {"type": "remote", "password": "hunter2", "url": "redis://me:hunter3@host"}
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={"tiers": tier})
    assert "hunter" not in str(caught.value)
    assert "redis://***@host" in str(caught.value)


def test_secrets_are_masked_at_any_depth() -> None:
    tier = {
        "url": "rediss://me:p@ss@host:1/0?x=a@b",
        "password": "a",
        "sentinel_password": "b",
        "access_key": "c",
        "options": {"secret_key": "d"},
        "token_file": "/etc/token",
    }
    assert masked({"tiers": (tier, {"type": "disk", "password": None})}) == {
        "tiers": [
            {
                "url": "rediss://***@host:1/0?x=a@b",
                "password": "***",
                "sentinel_password": "***",
                "access_key": "***",
                "options": {"secret_key": "***"},
                "token_file": "/etc/token",
            },
            {"type": "disk", "password": None},
        ]
    }


@pytest.mark.parametrize("text", [b"[1, 2]", b"a: [", b"just text", b"model_id: caf\xe9"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(file)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().chunk_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "read"),
    [(True, True), (False, False), ("hugetlb", "hugetlb"), ("transparent", "transparent"), ("false", False)],
)
def test_huge_pages_are_a_switch_or_a_kind(given: object, read: object) -> None:
    assert load_config(overrides={"memory.huge_pages": given}).memory.huge_pages == read


@pytest.mark.parametrize(
    "overrides",
    [
        {"memory.allocator": "slabs"},
        {"memory.low_watermark": 0.9},
        {"memory.huge_pages": "gigantic"},
        {"memory.numa_node": -2},
        {"promote": "sometimes"},
        {"demotion": "never"},
        {"quotas": {"tenant": "much"}},
        {"retry": {"attempts": 0}},
    ],
)
def test_storage_options_that_cannot_be_are_errors(overrides: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(overrides)).replace(".", r"\.")):
        load_config(overrides=overrides)
