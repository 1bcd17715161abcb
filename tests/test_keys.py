"""Keys: equal meanings give equal keys in every process, different meanings never share one."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.engine.token_database import TokenDatabase
from lmcache.keys import NO_TENANT, ChunkKey, KVFormat, PlaceholderSpan, PlaneFormat, namespace, tenant_id, tenant_of

PLANE = PlaneFormat(
    group=0, layers=("a", "b"), heads=2, block_tokens=16, content=128, dtype="bfloat16", kind="full_attention"
)
FORMAT = KVFormat(model="m@main", chunk_tokens=64, planes=(PLANE,))

OTHER_FORMATS = {
    "model": {"model": "m2@main"},
    "revision": {"model": "m@dev"},
    "dtype": {"planes": (msgspec.structs.replace(PLANE, dtype="float16"),)},
    "layout": {"layout": "vllm-cpu"},
    "groups": {"planes": (PLANE, msgspec.structs.replace(PLANE, group=1))},
    "group index": {"planes": (msgspec.structs.replace(PLANE, group=1),)},
    "window": {"planes": (msgspec.structs.replace(PLANE, window=512),)},
    "layers": {"planes": (msgspec.structs.replace(PLANE, layers=("a", "c")),)},
    "tp rank": {"tp_rank": 1},
    "tp size": {"tp_size": 2},
    "pp rank": {"pp_rank": 1},
    "chunk": {"chunk_tokens": 128},
    "codec": {"codec": "int8"},
    "extras": {"extras": (("rope", "yarn"),)},
}


def pack(tokens: list[int]) -> bytes:
    return b"".join(t.to_bytes(4, "little") for t in tokens)


def keys(tokens: list[int], *, format: KVFormat = FORMAT, **inputs: object) -> list[ChunkKey]:
    prompt = TokenDatabase(format, 16).prompt(pack(tokens), **inputs)  # type: ignore[arg-type]
    return [span.key for span in prompt.chunks]


@pytest.mark.parametrize("field", OTHER_FORMATS)
def test_every_field_of_the_format_changes_the_key(field: str) -> None:
    other = msgspec.structs.replace(FORMAT, **OTHER_FORMATS[field])
    assert other.fingerprint() != FORMAT.fingerprint()
    if other.chunk_tokens == 64:
        assert set(keys(list(range(64)))).isdisjoint(keys(list(range(64)), format=other))


def test_the_fingerprints_of_different_formats_all_differ() -> None:
    prints = {msgspec.structs.replace(FORMAT, **change).fingerprint() for change in OTHER_FORMATS.values()}
    assert len(prints) == len(OTHER_FORMATS)


def test_keys_do_not_depend_on_the_process_or_its_hash_seed() -> None:
    program = (
        "from tests.test_keys import keys, FORMAT; print(keys(list(range(200)), tags={'lora.name': 'x', 'a': 'b'}))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(seen) == 1
    assert "ChunkKey" in seen.pop()


def test_a_known_key_stays_what_it_is() -> None:
    # A change here makes every cache on disk unreadable: raise the chunk header's version with it.
    assert keys(list(range(64)))[0].to_bytes().hex() == GOLDEN


tags_strategy = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=4)


@given(tags_strategy, tags_strategy)
def test_two_tag_sets_share_a_namespace_only_when_they_mean_the_same(a: dict[str, str], b: dict[str, str]) -> None:
    def meaning(tags: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in tags.items() if value}

    assert (namespace(b"f" * 16, a) == namespace(b"f" * 16, b)) == (meaning(a) == meaning(b))


@pytest.mark.parametrize(
    ("tags", "tenant"),
    [
        (None, ""),
        ({}, ""),
        ({"cache_salt": "", "tag.tenant": ""}, ""),
        ({"lora.name": "x", "tag.other": "y"}, ""),
        ({"cache_salt": "s"}, "s"),
        ({"cache_salt": "s", "tag.tenant": ""}, "s"),
        ({"cache_salt": "s", "tag.tenant": "a"}, "a"),
        ({"tag.tenant": "a", "lora.name": "x"}, "a"),
    ],
)
def test_the_tenant_is_the_tag_of_that_name_else_the_salt_and_keys_carry_it(
    tags: dict[str, str] | None, tenant: str
) -> None:
    assert tenant_of(tags) == tenant
    (key,) = keys(list(range(64)), tags=tags)
    assert key.tenant == tenant_id(tenant)
    assert (key.tenant == NO_TENANT) == (tenant == "")


def test_requests_of_one_tenant_share_what_all_their_tags_say_and_no_more() -> None:
    tokens = list(range(64))
    many = [{"tag.tenant": "a"}, {"cache_salt": "a"}, {"tag.tenant": "a", "cache_salt": "s"}]
    many += [{"tag.tenant": "a", "lora.name": "x"}]
    found = [keys(tokens, tags=tags)[0] for tags in many]
    assert {key.tenant for key in found} == {tenant_id("a")}
    assert len(set(found)) == len({key.namespace for key in found}) == len(many)


def test_what_a_log_shows_of_a_key_is_of_no_use_in_another_process() -> None:
    key = keys(list(range(64)))[0]
    program = "from tests.test_keys import keys; print(keys(list(range(64)))[0])"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "PYTHONPATH": root}
    other = subprocess.check_output([sys.executable, "-c", program], env=env, cwd=root, text=True)
    assert str(key) == str(ChunkKey.from_bytes(key.to_bytes())), "the same throughout a process"
    assert other.strip() != str(key)
    for part in (key.digest, key.namespace[16:]):
        assert part.hex()[:6] not in str(key)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300), st.lists(st.integers(0, 2**32 - 1), max_size=300))
def test_prompts_share_exactly_the_chunks_of_their_common_prefix(a: list[int], b: list[int]) -> None:
    ka, kb = keys(a), keys(b)
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    whole = min(common // 64, len(ka), len(kb))
    assert ka[:whole] == kb[:whole]
    assert set(ka[whole:]).isdisjoint(kb[whole:])


@given(st.integers(0, 400), st.data())
def test_tails_are_whole_blocks_behind_the_last_chunk_longest_first(count: int, data: st.DataObject) -> None:
    prompt = TokenDatabase(FORMAT, 16).prompt(pack(list(range(count))))
    index = data.draw(st.integers(0, len(prompt.chunks)))
    tails = prompt.tails(index)
    assert all(t.start == index * 64 for t in tails)
    assert [t.stop - t.start for t in tails] == list(range(min(count - index * 64, 48) // 16 * 16, 0, -16))
    assert len({t.key for t in tails} | {c.key for c in prompt.chunks}) == len(tails) + len(prompt.chunks)


def test_a_tail_of_one_prompt_is_found_by_a_longer_one() -> None:
    database = TokenDatabase(FORMAT, 16)
    short = database.prompt(pack(list(range(64 + 33))))
    longer = database.prompt(pack(list(range(64 + 60))))
    assert short.tails(1)[0].key in {tail.key for tail in longer.tails(1)}


@pytest.mark.parametrize("tags", [{"lora.name": "x"}, {"cache_salt": "x"}, {"tag.a": "x"}, {"cache_salt": "y"}])
def test_lora_salt_and_tags_separate_keys(tags: dict[str, str]) -> None:
    others = [{}, {"lora.name": "x"}, {"cache_salt": "x"}, {"tag.a": "x"}, {"cache_salt": "y"}]
    for other in others:
        assert (keys([1] * 64, tags=tags) == keys([1] * 64, tags=other)) == (tags == other)


def test_placeholders_contribute_content_and_place_from_their_chunk_on() -> None:
    tokens = [7] * 192
    plain = keys(tokens)
    image = keys(tokens, placeholders=[PlaceholderSpan(70, 80, b"hash-a")])
    other = keys(tokens, placeholders=[PlaceholderSpan(70, 80, b"hash-b")])
    moved = keys(tokens, placeholders=[PlaceholderSpan(71, 81, b"hash-a")])
    assert plain[0] == image[0] == other[0] == moved[0]
    assert len({k[1] for k in (plain, image, other, moved)}) == 4
    assert len({k[2] for k in (plain, image, other, moved)}) == 4


def test_chunk_keys_survive_a_round_trip_and_refuse_other_lengths() -> None:
    key = keys([1] * 64)[0]
    assert ChunkKey.from_bytes(key.to_bytes()) == key
    with pytest.raises(ValueError, match="80 bytes, got 3"):
        ChunkKey.from_bytes(b"abc")


GOLDEN = (
    "3f429ada5c781401ee1d731c7cffe1d900000000000000000000000000000000a0cbb19c426ae4306bf392398ea50fbe"
    "f5b0d7161d8c5a5cb28a4200df063e7bc09b7462a6f70f41222c63f36a8972f7"
)
