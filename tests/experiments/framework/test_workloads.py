"""The corpus is long enough, well-formed and reproducibly chosen."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import Tokenizer

from experiments.framework.config import ROOT, WorkloadConfig
from experiments.framework.model import smollm2
from experiments.framework.workloads import load_corpus, read_questions
from lmcache.errors import ConfigError

DATA = ROOT / "data"
NAMES = sorted(file.stem for file in (DATA / "documents").glob("*.txt"))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(smollm2() / "tokenizer.json"))


def test_there_are_at_least_five_documents() -> None:
    assert len(NAMES) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_document_has_between_2000_and_3000_tokens(name: str) -> None:
    text = (DATA / "documents" / f"{name}.txt").read_text()
    assert 2000 <= len(tokenizer().encode(text).ids) <= 3000


@pytest.mark.parametrize("name", NAMES)
def test_document_has_three_questions_and_no_markup(name: str) -> None:
    questions = read_questions(DATA, name)
    assert len(set(questions)) == 3
    assert all(question.endswith("?") for question in questions)
    text = (DATA / "documents" / f"{name}.txt").read_text()
    assert not any(mark in text for mark in ("{{", "[[", "''", "<ref", "|"))


def test_readme_names_every_document_and_the_licence() -> None:
    readme = (DATA / "README.md").read_text()
    assert all(f"`{name}.txt`" in readme for name in NAMES)
    assert "Attribution-ShareAlike" in readme


def test_corpus_is_small() -> None:
    sizes = {folder: sum(f.stat().st_size for f in (DATA / folder).rglob("*")) for folder in ("documents", "questions")}
    assert sum(sizes.values()) < 200_000
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 1_000_000, "the trace is compressed"


def test_seed_chooses_the_documents() -> None:
    config = WorkloadConfig(documents=5)
    assert list(load_corpus(config, 0).documents) == list(load_corpus(config, 0).documents)
    assert len({tuple(load_corpus(config, seed).documents) for seed in range(8)}) > 1


def test_questions_about_a_document_share_all_that_comes_before_them() -> None:
    corpus = load_corpus(WorkloadConfig(documents=1), 0)
    (name,) = corpus.documents
    first, second = (corpus.request(name, number).user for number in (0, 1))
    shared = first.index("Question: ") + len("Question: ")
    assert first[:shared] == second[:shared]
    assert first != second


def test_asking_for_more_than_there_is_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=rf"{len(NAMES)} text files"):
        load_corpus(WorkloadConfig(documents=len(NAMES) + 1), 0)
