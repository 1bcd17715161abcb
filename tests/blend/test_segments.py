"""Segments: by separator, by spans, and by content, where a brute-force search is the oracle."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache.blend.reuse import Segment
from lmcache.blend.segments import (
    ContentIndex,
    Hashes,
    Match,
    Tokens,
    as_tokens,
    explicit_spans,
    rolling_hashes,
    split_by_separator,
)

FEW = st.integers(0, 2)
TEXT = st.lists(FEW, max_size=40)


def pack(tokens: list[int]) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


def zero_hashes(tokens: Tokens, width: int) -> Hashes:
    """Every window collides with every other."""
    return np.zeros(max(0, len(tokens) - width + 1), dtype=np.uint64)


def parity_hashes(tokens: Tokens, width: int) -> Hashes:
    return rolling_hashes(tokens, width) & np.uint64(1)


# ---- by separator


@given(TEXT, st.lists(FEW, min_size=1, max_size=3))
def test_separator_splits_as_a_scan_from_the_left_does(tokens: list[int], separator: list[int]) -> None:
    want, start, at = [], 0, 0
    while at <= len(tokens):
        here = tokens[at : at + len(separator)] == separator
        if here or at == len(tokens):
            want += [(start, at)] if at > start else []
            start = at + len(separator)
        at = start if here else at + 1
    assert [(s.start, s.stop) for s in split_by_separator(tokens, separator)] == want


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), max_size=5), st.integers(1, 3), st.booleans())
def test_joined_passages_are_split_again(passages: list[list[int]], repeats: int, around: bool) -> None:
    gap = [0, 0] * repeats
    prompt = [token for number, p in enumerate(passages) for token in (gap if number else []) + p]
    if around:
        prompt = gap + prompt + gap
    found = split_by_separator(np.asarray(prompt, dtype=np.int64), [0, 0])
    assert [prompt[s.start : s.stop] for s in found] == passages


def test_a_prompt_that_is_shorter_than_the_separator_is_one_segment() -> None:
    assert split_by_separator([1, 2], [1, 2, 3]) == [Segment(0, 2)]
    assert split_by_separator([], [1, 2, 3]) == []
    assert split_by_separator([1, 2, 3], [1, 2, 3]) == []


def test_a_separator_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        split_by_separator([1, 2], [])


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([-1], "got -1"), ([1 << 32], "got 4294967296"), ([0.5], "float64"), ([[1, 2]], r"\(1, 2\)"), ("ab", "integers")],
)
def test_what_is_no_token_id_is_refused(tokens: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        as_tokens(tokens)  # type: ignore[arg-type]


@settings(deadline=None)  # a busy machine is no reason to fail
@given(st.lists(st.integers(0, (1 << 32) - 1)))
def test_tokens_are_the_same_in_every_form(tokens: list[int]) -> None:
    assert as_tokens(tokens).tolist() == as_tokens(pack(tokens)).tolist() == tokens
    assert as_tokens(np.asarray(tokens, dtype=np.uint64)).tolist() == tokens


# ---- by spans


@given(st.sets(st.integers(0, 50)).map(sorted))
def test_disjoint_spans_are_taken_as_they_are(edges: list[int]) -> None:
    pairs = [list(pair) for pair in zip(edges[::2], edges[1::2], strict=False)]
    assert explicit_spans(pairs, 50) == [Segment(*pair) for pair in pairs]


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([[0, 11]], r"span 0 is \[0, 11\]; 0 <= start < stop <= 10"),
        ([[-1, 3]], "-1"),
        ([[3, 3]], "start < stop"),
        ([[0, 5], [4, 6]], r"span 1 is \[4, 6\] and the one before ends at 5"),
        ([[4, 6], [0, 2]], "sorted"),
        ([[0, 1, 2]], "pair"),
        (["ab"], "pair"),
        ([3], "pair"),
        ([[0, 2.0]], "integers"),
        ([[False, True]], "integers"),
    ],
)
def test_spans_that_cannot_be_are_refused_by_name(spans: list[object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        explicit_spans(spans, 10)  # type: ignore[arg-type]


# ---- by content


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=60), st.integers(1, 9), st.integers(0, 50))
def test_a_hash_is_of_the_window_alone(tokens: list[int], width: int, before: int) -> None:
    array = as_tokens(tokens)
    hashes = rolling_hashes(array, width)
    assert len(hashes) == max(0, len(tokens) - width + 1)
    moved = rolling_hashes(np.concatenate([np.full(before, 7, np.uint32), array]), width)
    assert np.array_equal(moved[before:][: len(hashes)], hashes)
    for at in range(len(hashes)):
        assert rolling_hashes(array[at : at + width], width)[0] == hashes[at]


def test_windows_of_real_sized_vocabularies_do_not_collide() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 200_000).astype(np.uint32)
    assert len(np.unique(rolling_hashes(tokens, 16))) == 200_000 - 15


def brute_force(prompt: list[int], passages: list[tuple[int, list[int]]], least: int) -> list[Match]:
    """The contract, read out: again and again the best run of what is still free."""
    free = [True] * len(prompt)
    found = []
    while True:
        best: tuple[tuple[int, ...], list[int]] | None = None
        for number, passage in passages:
            for start in range(len(prompt)):
                for offset in range(len(passage)):
                    n = 0
                    while (
                        start + n < len(prompt)
                        and offset + n < len(passage)
                        and free[start + n]
                        and prompt[start + n] == passage[offset + n]
                    ):
                        n += 1
                    rank = (-n, start, len(passage), number, offset)
                    if n >= least and (best is None or rank < best[0]):
                        best = rank, passage
        if best is None:
            return sorted(found, key=lambda match: match.start)
        (n, start, _, _, offset), passage = best
        found.append(Match(start, start - n, pack(passage), offset))
        free[start : start - n] = [False] * -n


HASHES = st.sampled_from([rolling_hashes, zero_hashes, parity_hashes])


def quoting(passages: list[list[int]]) -> st.SearchStrategy[list[int]]:
    """Prompts that are parts of passages, and a little between them."""
    quotes = st.tuples(st.sampled_from(passages or [[]]), st.integers(0, 9), st.integers(1, 14))
    parts = quotes.map(lambda quote: quote[0][quote[1] : quote[1] + quote[2]]) | st.lists(FEW, max_size=2)
    return st.lists(parts, max_size=5).map(lambda several: [token for part in several for token in part])


PASSAGES = st.lists(st.lists(FEW, max_size=14), max_size=4)


@settings(max_examples=300)
@given(PASSAGES.flatmap(lambda some: st.tuples(st.just(some), quoting(some))), st.integers(1, 6), HASHES)
def test_matches_are_those_of_a_brute_force_search_whatever_the_hash(
    given_: tuple[list[list[int]], list[int]], least: int, hashes: object
) -> None:
    passages, prompt = given_
    index = ContentIndex(least, most_repeats=10**6, most_candidates=10**6, hash_windows=hashes)  # type: ignore[arg-type]
    known: list[tuple[int, list[int]]] = []
    for passage in passages:
        fresh = index.add(passage) and all(passage != other for _, other in known)
        if fresh:
            known.append((len(known), passage))
    assert index.find(prompt) == brute_force(prompt, known, least)


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([0, 1, 5, 31, 64]), st.sampled_from([0, 1, 17]))
def test_a_passage_is_found_at_any_alignment(seed: int, least: int, before: int, cut: int) -> None:
    dice = random.Random(seed)
    passage = [dice.randrange(50_000) for _ in range(cut + least + dice.randrange(40))]
    index = ContentIndex(least)
    assert index.add(passage)
    prompt = [60_000 + i for i in range(before)] + passage[cut:] + [70_000]
    assert index.find(prompt) == [Match(before, before + len(passage) - cut, pack(passage), cut)]
    assert index.find(prompt[: before + least - 1]) == []


def test_two_passages_that_share_a_border_are_both_found() -> None:
    """The longer one also has the first tokens of the other, which are then the shorter one's no more."""
    first, second = list(range(100, 140)), list(range(200, 230))
    index = ContentIndex(8)
    index.add([*first, 200, 201])
    index.add(second)
    found = index.find(first + second)
    assert [(m.start, m.stop, m.offset) for m in found] == [(0, 42, 0), (42, 70, 2)]
    assert found[1].passage == pack(second)


def test_the_longest_goes_before_the_leftmost() -> None:
    index = ContentIndex(3)
    index.add([1, 2, 3, 4, 5])
    index.add([4, 5, 6, 7, 8, 9])
    found = index.find([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert [(m.start, m.stop, m.offset) for m in found] == [(0, 3, 0), (3, 9, 0)]


def test_rare_windows_are_looked_at_first() -> None:
    index = ContentIndex(8, most_candidates=1)
    for n in range(5):
        index.add([7] * (20 + n))
    rare = list(range(100, 120))
    index.add(rare)
    assert index.find([7] * 30 + rare) == [Match(30, 50, pack(rare), 0)]


@pytest.mark.parametrize("hashes", [zero_hashes, parity_hashes])
def test_a_hash_collision_never_decides(hashes: object) -> None:
    index = ContentIndex(4, hash_windows=hashes)  # type: ignore[arg-type]
    index.add(list(range(100)))
    assert index.find(list(range(1000, 1100))) == []
    assert index.find([*range(1000, 1010), 7, 8, 9, 10, 55]) == [Match(10, 14, pack(list(range(100))), 7)]


def test_passages_that_are_too_short_or_too_long_are_not_known() -> None:
    index = ContentIndex(4, capacity_tokens=10)
    assert not index.add([1, 2, 3])
    assert not index.add(list(range(11)))
    assert len(index) == 0
    assert index.find([]) == []
    assert index.add(list(range(10)))


@pytest.mark.parametrize("options", [{"min_tokens": 0}, {"capacity_tokens": 0}])
def test_an_index_that_cannot_be_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ContentIndex(**options)  # type: ignore[arg-type]


def test_repetitive_text_costs_matches_and_not_time() -> None:
    index = ContentIndex(32)
    for n in range(300):
        index.add([7] * (400 + n))
    assert max(map(len, index._windows.values())) == 8
    begun = time.perf_counter()
    found = index.find([7] * 10_000)
    assert time.perf_counter() - begun < 5, "it took seconds"
    assert found
    assert all(set(np.frombuffer(m.passage, "<u4").tolist()) == {7} for m in found)


def test_threads_may_add_find_and_forget_at_once() -> None:
    index = ContentIndex(4, capacity_tokens=300)
    passages = [[100 * n + i for i in range(20)] for n in range(40)]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(300):
                passage = dice.choice(passages)
                dice.choice([index.add, index.add, index.discard, index.find])(passage)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


class IndexMachine(RuleBasedStateMachine):
    """Against a list that is searched by brute force. The latest used stands last."""

    capacity = 40

    def __init__(self) -> None:
        super().__init__()
        self.index = ContentIndex(3, self.capacity, most_repeats=10**6, most_candidates=10**6)
        self.known: list[tuple[int, list[int]]] = []
        self.count = 0

    def touch(self, passage: list[int]) -> None:
        self.known.sort(key=lambda each: each[1] == passage)

    @rule(passage=st.lists(FEW, max_size=12))
    def add(self, passage: list[int]) -> None:
        assert self.index.add(passage) == (len(passage) >= 3)
        if len(passage) < 3:
            return
        if any(passage == other for _, other in self.known):
            self.touch(passage)
            return
        while sum(len(other) for _, other in self.known) + len(passage) > self.capacity:
            del self.known[0]
        self.known.append((self.count, passage))
        self.count += 1

    @rule(passage=st.lists(FEW, max_size=5), pick=st.integers(0, 9))
    def discard(self, passage: list[int], pick: int) -> None:
        if pick < len(self.known):
            passage = self.known[pick][1]
        assert self.index.discard(passage) == any(passage == other for _, other in self.known)
        self.known = [each for each in self.known if each[1] != passage]

    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        prompt = data.draw(quoting([passage for _, passage in self.known]))
        want = brute_force(prompt, self.known, 3)
        assert self.index.find(prompt) == want
        for match in want:
            self.touch(np.frombuffer(match.passage, "<u4").tolist())

    @invariant()
    def what_is_kept_is_bounded(self) -> None:
        assert self.index.num_tokens == sum(len(p) for _, p in self.known) <= self.capacity
        assert len(self.index) == len(self.known)
        assert all(p in self.index for _, p in self.known)
        held = sum(map(len, self.index._windows.values()))
        assert held <= self.capacity
        assert (not self.index._windows) == (not self.known)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestIndexMachine = IndexMachine.TestCase
