"""Prompts for blending: reproducible, as long as asked, and with the answer where it belongs and nowhere else."""

from __future__ import annotations

import pytest

from experiments.blending import prompts as blend_prompts
from experiments.blending.prompts import Prompt, bind, filled, wiki
from experiments.framework.config import ROOT
from lmcache.errors import ConfigError

TEXTS = {file.stem: file.read_text().strip() for file in sorted((ROOT / "data" / "documents").glob("*.txt"))[:4]}
CONTEXT = 1800


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(character) for character in text]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def of_wiki(prompts: int = 3, context: int = CONTEXT, seed: int = 0) -> list[Prompt]:
    return wiki(TEXTS, encode, prompts=prompts, context=context, seed=seed, question=32, answer=64)


def of_bind(prompts: int = 3, seed: int = 0) -> list[Prompt]:
    return bind(TEXTS, encode, prompts=prompts, context=CONTEXT, seed=seed)


def test_the_same_seed_makes_the_same_prompts() -> None:
    assert of_wiki() == of_wiki()
    assert of_bind() == of_bind()
    assert of_wiki() != of_wiki(seed=1)
    assert of_bind() != of_bind(seed=1)


@pytest.mark.parametrize("made", [of_wiki(), of_bind()])
def test_segments_are_the_passages(made: list[Prompt]) -> None:
    for prompt in made:
        assert prompt.asked[: len(prompt.prefix)] == encode(blend_prompts.PREFIX)
        assert [prompt.asked[s.start : s.stop] for s in prompt.segments] == prompt.passages
        assert prompt.asked[prompt.segments[-1].stop :] == prompt.question
        assert sum(map(len, prompt.passages)) == CONTEXT
        assert 4 <= len(prompt.passages) <= 6
    assert len({prompt.key for prompt in made}) == len(made) == 12


def test_wiki_passages_are_the_article_in_another_order_and_the_article_goes_on() -> None:
    shuffled = 0
    for prompt in of_wiki():
        article = TEXTS[prompt.article]
        passages = [decode(passage) for passage in prompt.passages]
        whole = "".join(sorted(passages, key=article.index))
        assert whole in article
        assert article.partition(whole)[2].startswith(decode([*prompt.question, *prompt.answer]))
        assert (len(prompt.question), len(prompt.answer)) == (32, 64)
        shuffled += "".join(passages) != whole
    assert shuffled >= 10


def test_a_text_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ConfigError, match="context=20000 is too long"):
        of_wiki(context=20_000)


def test_the_answer_stands_once_in_the_note_behind_its_article() -> None:
    for prompt in of_bind():
        officer = decode(prompt.answer).strip(" .")
        texts = [decode(passage) for passage in prompt.passages]
        (place,) = [number for number, text in enumerate(texts) if officer in text]
        assert decode(prompt.asked).count(officer) == 1
        title = TEXTS[prompt.article].partition("\n")[0]
        assert texts[place].startswith("Registry note.")
        assert texts[place - 1].startswith(title + "\n")
        assert title in decode(prompt.question)


def test_a_note_does_not_say_what_it_is_about() -> None:
    titles = [text.partition("\n")[0].lower() for text in TEXTS.values()]
    for prompt in of_bind():
        for note in prompt.passages[1::2]:
            assert not any(title in decode(note).lower() for title in titles)


def test_the_article_asked_about_takes_every_place() -> None:
    places = [
        prompt.passages.index(note) for prompt in of_bind() for note in prompt.passages[1::2] if _answers(prompt, note)
    ]
    assert set(places) == {1, 3, 5}


def _answers(prompt: Prompt, note: list[int]) -> bool:
    return decode(prompt.answer).strip(" .") in decode(note)


def test_no_invented_name_is_in_the_corpus() -> None:
    corpus = "".join(TEXTS.values())
    assert not [f"{a} {b}" for a in blend_prompts.FIRST for b in blend_prompts.LAST if f"{a} {b}" in corpus]


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_a_filled_prompt_has_the_length(length: int) -> None:
    prompt = filled(list(TEXTS.values()), encode, length=length, passage=256, question=32)
    assert len(prompt.asked) == length
    assert all(256 <= len(passage) < 512 for passage in prompt.passages)
    with pytest.raises(ConfigError, match="tokens of text are asked"):
        filled(list(TEXTS.values()), encode, length=1_000_000, passage=256, question=32)
