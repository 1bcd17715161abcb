"""Configuration: one way in, and a typo is an error that names what is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmcache.config import CONFIG_FILE_VARIABLE, BlendConfig, LMCacheConfig, MemoryConfig, load_config, masked
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


UPSTREAM = {
    "LMCACHE_LOCAL_DISK": "file:///kv",
    "LMCACHE_MAX_LOCAL_CPU_SIZE": "20",
    "LMCACHE_SOME_NEW_THING": "secret",
    "LMCACHE_CONFIG_FILE": "",
    "LMCACHE_KERNEL_MODE": "cpu",
    "LMCACHE_KEY_FILE": "k",
}


@pytest.fixture
def upstream_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.config._warned", set(), raising=False)
    for name, value in UPSTREAM.items():
        monkeypatch.setenv(name, value)


def test_variables_that_are_not_read_are_named_once_with_what_to_write_instead(
    upstream_variables: None, caplog: pytest.LogCaptureFixture
) -> None:
    tier = {"type": "encrypted", "keys": ["$LMCACHE_KEY_FILE"], "inner": {"type": "disk", "path": "/kv"}}
    load_config(overrides={"tiers": [tier]})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "these environment variables are set and not read: "
        "LMCACHE_LOCAL_DISK (write tiers: [{type: disk, path: ..., capacity: 100GiB}]), "
        "LMCACHE_MAX_LOCAL_CPU_SIZE (write memory.capacity, with a unit: 5GiB), LMCACHE_SOME_NEW_THING. "
        "Settings belong into a YAML file that LMCACHE_CONFIG_FILE names, or into kv_connector_extra_config"
    )
    load_config(overrides={"tiers": [tier]})
    assert len(caplog.records) == 1
    load_config()
    assert "LMCACHE_KEY_FILE" in caplog.records[1].getMessage(), "nothing names it any more"


def test_other_commands_say_it_too(upstream_variables: None, caplog: pytest.LogCaptureFixture) -> None:
    from lmcache.config import load
    from lmcache.server.config import ServerConfig

    load(ServerConfig)
    assert "LMCACHE_LOCAL_DISK" in caplog.text


def test_without_such_variables_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("lmcache.config._warned", set(), raising=False)
    load_config()
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "ours"),
    [("chunk_size", "chunk_tokens"), ("local_disk", "tiers: "), ("lmcache.max_local_cpu_size", "without the prefix")],
)
def test_upstreams_names_in_a_configuration_are_errors_that_say_ours(name: str, ours: str) -> None:
    key = name.partition(".")[0]
    with pytest.raises(ConfigError, match=rf"unknown key {key}; .*; {key} is upstream LMCache's: write .*{ours}"):
        load_config(overrides={name: 5})


def test_every_upstream_name_leads_to_options_that_exist() -> None:
    from lmcache.upstream import INSTEAD

    for name, ours in INSTEAD.items():
        option = ours.partition(":")[0].partition(",")[0].partition(" ")[0]
        if option in ("nothing", "options"):
            continue
        fields = LMCacheConfig.model_fields
        for part in option.split("."):
            assert part in fields, f"{name} -> {option}"
            kind = {"memory": MemoryConfig, "blend": BlendConfig}.get(part)
            fields = kind.model_fields if kind else {}
