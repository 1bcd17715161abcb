"""Prompts made of passages, for blending: text and its continuation, and questions that two passages answer together.

    wiki   prefix | passages of one article, shuffled            | the article goes on: 32 tokens ask | 64 answer
    bind   prefix | article A | note | article B | note | ...    | Who is the officer for B?          | a name

A note says "the subject of the article above", and never which that is: its KV, computed apart from the article, knows
nothing of it, and the answer hangs on tokens that take notice of another passage.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lmcache.blend.reuse import Segment
from lmcache.errors import ConfigError

TASK = "You answer questions about the passages that follow."
PREFIX = f"<|im_start|>system\n{TASK}<|im_end|>\n<|im_start|>user\n"
NOTE = (
    "Registry note. The registry keeps a file on the subject of the article above. The survey officer for the subject "
    "of the article above is {officer}. The file has number {number} and was last read in {month}. Whoever wants to "
    "read it writes to the office one week before, names the number of the file, and brings the letter along.\n\n"
)
QUESTION = "Question: Who is the survey officer for the subject {title}?\nAnswer: The survey officer for {title} is"
FIRST = ("Marta", "Oskar", "Ingrid", "Tobias", "Helena", "Viktor", "Paula", "Anton", "Greta", "Felix", "Nora", "Hugo")
LAST = ("Ilves", "Brandt", "Kowal", "Sorel", "Varga", "Lindt", "Moreau", "Tamm", "Okafor", "Reyes", "Duarte", "Falk")
MONTHS = ("March", "April", "May", "June", "July", "August")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    """Token ids: prefix, passages, question, and the answer that is scored behind it. article: what it asks about."""

    data: str
    article: str
    number: int
    prefix: list[int]
    passages: list[list[int]]
    question: list[int]
    answer: list[int]

    @property
    def key(self) -> str:
        return f"{self.data}/{self.article}#{self.number}"

    @property
    def asked(self) -> list[int]:
        """All but the answer."""
        return [*self.prefix, *(token for passage in self.passages for token in passage), *self.question]

    @property
    def segments(self) -> list[Segment]:
        """Where the passages are."""
        segments, start = [], len(self.prefix)
        for passage in self.passages:
            segments.append(Segment(start, start + len(passage)))
            start += len(passage)
        return segments


def wiki(
    texts: Mapping[str, str],
    encode: Encode,
    *,
    prompts: int,
    context: int,
    seed: int,
    question: int,
    answer: int,
    prefix: str = PREFIX,
) -> list[Prompt]:
    """`prompts` of each article, of `context` tokens in 6, 5 or 4 passages of one length, and what comes behind them.

    The windows of an article start at equal distances; with more than one they overlap.
    """
    made = []
    for article, text in texts.items():
        tokens = encode(text)
        last = len(tokens) - context - question - answer
        if last < 0:
            raise ConfigError(f"{article} has {len(tokens)} tokens; context={context} is too long for it")
        for number in range(prompts):
            start = last * number // max(prompts - 1, 1)
            asks = start + context
            count = (6, 5, 4)[number % 3]
            bounds = [start + context * part // count for part in range(count + 1)]
            passages = [tokens[a:b] for a, b in itertools.pairwise(bounds)]
            random.Random(f"{seed} {article} {number}").shuffle(passages)
            asking, answered = tokens[asks : asks + question], tokens[asks + question : asks + question + answer]
            made.append(Prompt("wiki", article, number, encode(prefix), passages, asking, answered))
    return made


def bind(
    texts: Mapping[str, str], encode: Encode, *, prompts: int, context: int, seed: int, prefix: str = PREFIX
) -> list[Prompt]:
    """`prompts` about each article: the beginnings of three, each followed by its note, `context` tokens in all."""
    made = []
    for article in texts:
        for number in range(prompts):
            draw = random.Random(f"{seed} {article} {number}")
            subjects = draw.sample([other for other in texts if other != article], 2)
            subjects.insert(number % 3, article)
            firsts, lasts = draw.sample(FIRST, 3), draw.sample(LAST, 3)
            officers = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
            passages = []
            for subject, officer in zip(subjects, officers, strict=True):
                note = encode(note_about(officer, draw))
                passages += [_beginning(texts[subject], encode, context // 3 - len(note)), note]
            title = texts[article].partition("\n")[0]
            question = encode(QUESTION.format(title=title))
            answer = encode(f" {officers[subjects.index(article)]}.")
            made.append(Prompt("bind", article, number, encode(prefix), passages, question, answer))
    return made


def note_about(officer: str, draw: random.Random) -> str:
    return NOTE.format(officer=officer, number=draw.randrange(1000, 10000), month=draw.choice(MONTHS))


def filled(texts: Sequence[str], encode: Encode, *, length: int, passage: int, question: int) -> Prompt:
    """A prompt of `length` tokens without an answer: passages of about `passage` tokens, a question as in `wiki`."""
    prefix, tokens = encode(PREFIX), [token for text in texts for token in encode(text)]
    context = length - len(prefix) - question
    if context < passage or len(tokens) < context + question:
        raise ConfigError(f"length={length}: at least one passage, and at most {len(tokens)} tokens of text are asked")
    count = context // passage
    bounds = [context * part // count for part in range(count + 1)]
    passages = [tokens[a:b] for a, b in itertools.pairwise(bounds)]
    return Prompt("filled", "all", 0, prefix, passages, tokens[context : context + question], [])


def _beginning(text: str, encode: Encode, tokens: int) -> list[int]:
    """`tokens` tokens, of which the last ends the passage."""
    end = encode("...\n\n")
    return [*encode(text)[: tokens - len(end)], *end]
