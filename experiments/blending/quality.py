"""How far blends move what a model predicts: the prompts, the measurement of one, and means over many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from experiments.blending.prompts import Prompt, bind, wiki
from experiments.blending.session import BlendSession
from experiments.framework import paired
from experiments.framework.paired import Interval
from lmcache.blend.blender import Blended, Blender
from lmcache.blend.standalone import BlendEngine
from lmcache.config import Config as Model
from lmcache.errors import ConfigError

REUSE, FULL = "none", "all"
TITLES = {"wiki": "passages of an article, shuffled", "bind": "questions across two passages"}


class ScaleConfig(Model):
    """How much is measured."""

    prompts: int = Field(ge=1, description="prompts about each article, on each kind of data")
    articles: int = Field(8, ge=3, description="articles, the first ones by name")
    context: int = Field(ge=60, description="tokens of passages in a prompt")
    question: int = Field(32, ge=1, description="tokens that ask, on wiki")
    answer: int = Field(64, ge=2, description="tokens scored behind them, on wiki")
    ratios: tuple[float, ...] = Field(
        description="shares of the reused tokens that are computed again; 0 and 1 always are"
    )
    min_prompts: int = Field(ge=1, description="judge: prompts on each kind of data")
    min_tokens: int = Field(ge=1, description="judge: tokens of the shortest prompt")


@dataclasses.dataclass(frozen=True)
class Scored:
    """One prompt, blended one way. Means over the tokens of question and answer, in nats.

    kl_answer: over the answer alone. nll: negative log-likelihood of the true next tokens. right: whether the model,
    decoding greedily, gives the true answer. tokens: of the prompt, answer included.
    """

    data: str
    article: str
    key: str
    tokens: int
    selector: str
    ratio: float
    kl: float
    kl_answer: float
    top1: float
    nll: float
    right: bool


@dataclasses.dataclass(frozen=True)
class Found:
    """One selector at one ratio over all prompts of one kind. perplexity: of question and answer. right: how many."""

    data: str
    selector: str
    ratio: float
    prompts: int
    kl: Interval
    kl_answer: Interval
    top1: float
    perplexity: float
    right: int


def prompts(session: BlendSession, scale: ScaleConfig, seed: int) -> list[Prompt]:
    """Of both kinds, the kinds taking turns, so that a run that is cut off has both."""
    if scale.articles > len(session.texts):
        raise ConfigError(f"articles={scale.articles}: the corpus has {len(session.texts)}")
    texts = dict(list(session.texts.items())[: scale.articles])
    common = {"prompts": scale.prompts, "context": scale.context, "seed": seed}
    first = wiki(texts, session.encode, question=scale.question, answer=scale.answer, prefix=session.prefix, **common)
    second = bind(texts, session.encode, prefix=session.prefix, **common)
    return [prompt for pair in zip(first, second, strict=True) for prompt in pair]


@torch.no_grad()
def full_prefill(session: BlendSession, prompt: Prompt) -> torch.Tensor:
    """Log-probabilities `[question + answer - 1, vocabulary]` of what follows each token but the last."""
    ids = torch.tensor([[*prompt.asked, *prompt.answer]])
    scored = len(prompt.question) + len(prompt.answer)
    logits: torch.Tensor = session.model(ids, logits_to_keep=scored).logits[0, :-1]
    return logits.double().log_softmax(-1)


@torch.no_grad()
def blend(
    session: BlendSession,
    engine: BlendEngine,
    prompt: Prompt,
    expected: torch.Tensor,
    name: str,
    ratio: float,
    options: Mapping[str, Any],
) -> Scored:
    """A prompt whose passages are stored, blended one way and compared with its full prefill.

    The model itself goes on behind the passages' KV: it reads question and answer, as an engine would.
    """
    engine.blender = Blender(session.adapted, options)
    blended = engine.blend(prompt.asked, prompt.segments)
    check_reused(prompt, blended)
    cache = engine.blender.cache(blended, len(prompt.asked) - len(prompt.question))
    behind = torch.tensor([[*prompt.question, *prompt.answer[:-1]]])
    found = session.model(behind, past_key_values=cache).logits[0]
    return score(prompt, name, ratio, expected, found.double().log_softmax(-1))


def check_reused(prompt: Prompt, blended: Blended) -> None:
    """Every token of the passages must have been reused, or the figures say nothing."""
    passages = sum(map(len, prompt.passages))
    if blended.report.candidates != passages:
        raise ConfigError(f"{prompt.key}: {blended.report.candidates} of {passages} tokens of passages were reused")


def score(prompt: Prompt, selector: str, ratio: float, expected: torch.Tensor, found: torch.Tensor) -> Scored:
    """Compare log-probabilities, `[question + answer - 1, vocabulary]` as ``full_prefill`` gives them."""
    divergence = (expected.exp() * (expected - found)).sum(-1)
    answered = len(prompt.answer)
    truth = torch.tensor([*prompt.question, *prompt.answer][1:])
    likeliest = found.argmax(-1)
    return Scored(
        prompt.data,
        prompt.article,
        prompt.key,
        len(prompt.asked) + answered,
        selector,
        ratio,
        float(divergence.mean()),
        float(divergence[-answered:].mean()),
        float((likeliest == expected.argmax(-1)).double().mean()),
        -float(found.gather(1, truth[:, None]).mean()),
        bool((likeliest == truth)[-answered:].all()),
    )


def summary(rows: Sequence[Scored]) -> list[Found]:
    """In the order in which the methods were run, kind by kind."""
    found = []
    for data, selector, ratio in dict.fromkeys((row.data, row.selector, row.ratio) for row in rows):
        of = [row for row in rows if (row.data, row.selector, row.ratio) == (data, selector, ratio)]
        articles = [row.article for row in of]
        found.append(
            Found(
                data,
                selector,
                ratio,
                len(of),
                paired.mean([row.kl for row in of], articles),
                paired.mean([row.kl_answer for row in of], articles),
                sum(row.top1 for row in of) / len(of),
                math.exp(sum(row.nll for row in of) / len(of)),
                sum(row.right for row in of),
            )
        )
    return sorted(found, key=lambda f: list(TITLES).index(f.data))
