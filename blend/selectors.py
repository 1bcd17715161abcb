"""Token selectors: which tokens of reused segments are computed again. Chosen by name in the configuration.

    none, all          controls
    random             a control: as many tokens, anywhere
    epic               the first tokens of each segment (Hu et al. 2024, arXiv:2410.15332)
    cacheblend         those whose KV on a check layer moved most (Yao et al. 2024, arXiv:2405.16444, section 4)
    question           ours: how far values moved, times how much the question attends to the token
    oracle             the same from a full prefill, for research: what the others try to guess

All choose among the candidates: tokens with reused KV that isn't exact. Tokens without reused KV, the prompt's last
token and what the caller or `sinks` and `last_tokens` name are computed in any case, and count towards no ratio.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field, model_validator

from lmcache.blend.reuse import ReusedKV, Segment
from lmcache.config import Config, build
from lmcache.errors import ConfigError
from lmcache.kernels.attention.select import select_tokens
from lmcache.registry import Registry, split_type


@dataclass(frozen=True)
class Prompt:
    """What a selector may look at; tensors are bool `[T]` on the model's device.

    `include`: computed in any case. `attention(n, start, stop)`: fp32 `[T]`, the attention that the last n tokens of
    the tail that is computed in any case pay to each token over the reused KV, summed over them, mean over heads and
    the layers from `start` to `stop` of the model, 0 .. 1. `truth(n)`: fp32 `[T]`, the same attention in a full prefill
    times the distance of the reused from the true values, mean over all layers.
    """

    covered: torch.Tensor
    exact: torch.Tensor
    include: torch.Tensor
    segments: Sequence[Segment]
    attention: Callable[[int, float, float], torch.Tensor]
    truth: Callable[[int], torch.Tensor]

    @cached_property
    def candidates(self) -> torch.Tensor:
        return self.covered & ~self.exact & ~self.include

    @cached_property
    def num_candidates(self) -> int:
        return int(self.candidates.sum())

    @cached_property
    def num_included(self) -> int:
        return int(self.include.sum())

    @cached_property
    def everything(self) -> torch.Tensor:
        """int64, ascending: all tokens that may be computed."""
        return torch.nonzero(self.candidates | self.include).flatten()


class SelectorConfig(Config):
    """Options of every selector."""

    sinks: int = Field(0, ge=0, description="first tokens of the prompt that are computed in any case, unless exact")
    last_tokens: int = Field(1, ge=1, description="last tokens of the prompt that are computed in any case")


class RatioConfig(SelectorConfig):
    """Options of a selector that takes the candidates with the highest scores."""

    ratio: float = Field(0.15, ge=0, le=1, description="share of the candidates that is computed again")
    min_tokens: int = Field(0, ge=0, description="candidates that are computed again at least")
    threshold: float = Field(
        0.0, ge=0, le=1, description="candidates below this share of the highest score are not computed again"
    )

    @property
    def ratio_counts(self) -> bool:
        """Whether no other option takes the place of the ratio."""
        return True


class RandomConfig(RatioConfig):
    """Options of `random`."""

    seed: int = Field(0, description="seed of the choice, which is the same for prompts of one length")


class EpicConfig(RatioConfig):
    """Options of `epic`."""

    segment_tokens: int | None = Field(
        None, ge=0, description="first tokens of each segment that are computed again; null: what the ratio gives"
    )

    @property
    def ratio_counts(self) -> bool:
        return self.segment_tokens is None


class CacheBlendConfig(RatioConfig):
    """Options of `cacheblend`."""

    check_layers: tuple[int, ...] = Field((1,), min_length=1, description="layers that choose, from 0, ascending")
    ratios: tuple[float, ...] | None = Field(
        None, description="gradual filtering: a ratio for each check layer, descending; null: ratio on all of them"
    )
    key_weight: float = Field(1.0, ge=0, description="weight of the keys' squared deviation in the score")
    value_weight: float = Field(1.0, ge=0, description="weight of the values' squared deviation in the score")

    @model_validator(mode="after")
    def _check_layers(self) -> CacheBlendConfig:
        ratios = self.layer_ratios
        if list(self.check_layers) != sorted(set(self.check_layers)) or self.check_layers[0] < 0:
            raise ValueError(f"check_layers is {self.check_layers}; it must ascend from 0 or more")
        if len(ratios) != len(self.check_layers) or list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"ratios is {ratios}; it must hold one for each of {self.check_layers}, descending")
        if not all(0 <= ratio <= 1 for ratio in ratios):
            raise ValueError(f"ratios is {ratios}; each must be 0 .. 1")
        return self

    @property
    def ratio_counts(self) -> bool:
        return self.ratios is None

    @property
    def layer_ratios(self) -> tuple[float, ...]:
        return self.ratios or (self.ratio,) * len(self.check_layers)


class QuestionConfig(RatioConfig):
    """Options of `question`."""

    check_layer: int = Field(1, ge=0, description="layer whose values are compared, from 0")
    question_tokens: int = Field(128, ge=1, description="last tokens, at most, that are asked what they attend to")
    depth: tuple[float, float] = Field(
        (1 / 3, 2 / 3),
        description="span of the model, 0 .. 1, whose attention counts; deeper layers are not run",
    )
    compared: float = Field(
        3.0,
        ge=1,
        description="of the candidates, how many times what is computed again go through the layers up to check_layer "
        "and are compared: those with the most attention",
    )

    @model_validator(mode="after")
    def _check_depth(self) -> QuestionConfig:
        if not 0 <= self.depth[0] < self.depth[1] <= 1:
            raise ValueError(f"depth is {self.depth}; it must ascend within 0 .. 1")
        return self


class OracleConfig(RatioConfig):
    """Options of `oracle`."""

    question_tokens: int = Field(128, ge=1, description="last tokens, at most, that are asked what they attend to")


ConfigT = TypeVar("ConfigT", bound=SelectorConfig)


class TokenSelector(ABC, Generic[ConfigT]):
    """Chooses which tokens are computed. Stateless: one serves any number of prompts at a time.

    check_layers: layers on which `narrow` is asked, ascending. needs_all_layers: it looks at reused KV of layers that
    are not computed yet, so loading them one by one hides nothing.
    """

    Config: ClassVar[type[SelectorConfig]] = SelectorConfig
    check_layers: Sequence[int] = ()
    needs_all_layers: ClassVar[bool] = False

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def start(self, prompt: Prompt) -> torch.Tensor:
        """The tokens computed from the first layer on: int64, ascending; all of `prompt.include`, no exact others."""

    def narrow(
        self, prompt: Prompt, layer: int, rows: torch.Tensor, k_dev: torch.Tensor, v_dev: torch.Tensor
    ) -> torch.Tensor:
        """Places (int64, ascending) in `rows` of the tokens computed from this layer on; `prompt.include` among them.

        `rows`: int64 `[N]`, the tokens computed up to here. Deviations: fp32 `[N]`, squared distances of the keys and
        values of this layer from the reused ones, which for tokens without reused KV mean nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} has check layers but no narrow()")


class NoTokens(TokenSelector[SelectorConfig]):
    """No candidate: plain reuse."""

    def start(self, prompt: Prompt) -> torch.Tensor:
        return torch.nonzero(prompt.include).flatten()


class AllTokens(TokenSelector[SelectorConfig]):
    """All candidates: a prefill behind the exact prefix."""

    def start(self, prompt: Prompt) -> torch.Tensor:
        return prompt.everything


class RandomTokens(TokenSelector[RandomConfig]):
    """Candidates drawn with equal chances."""

    Config = RandomConfig

    def start(self, prompt: Prompt) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        scores = torch.rand(len(prompt.covered), generator=generator).to(prompt.covered.device)
        return highest(prompt, scores, self.config)


class FirstTokens(TokenSelector[EpicConfig]):
    """The first candidates of each segment."""

    Config = EpicConfig

    def start(self, prompt: Prompt) -> torch.Tensor:
        length = len(prompt.covered)
        offsets = torch.full((length,), length, device=prompt.covered.device)  # within the segment
        for segment in prompt.segments:
            offsets[segment.start : segment.stop] = torch.arange(segment.stop - segment.start, device=offsets.device)
        if self.config.segment_tokens is None:
            return highest(prompt, -offsets.float(), self.config)
        return torch.nonzero(prompt.include | prompt.candidates & (offsets < self.config.segment_tokens)).flatten()


class Deviating(TokenSelector[CacheBlendConfig]):
    """The candidates whose keys and values on the check layer are furthest from the reused ones."""

    Config = CacheBlendConfig

    def __init__(self, config: CacheBlendConfig) -> None:
        super().__init__(config)
        self.check_layers = config.check_layers

    def start(self, prompt: Prompt) -> torch.Tensor:
        return prompt.everything

    def narrow(
        self, prompt: Prompt, layer: int, rows: torch.Tensor, k_dev: torch.Tensor, v_dev: torch.Tensor
    ) -> torch.Tensor:
        ratio = self.config.layer_ratios[self.check_layers.index(layer)]
        scores = self.config.key_weight * k_dev + self.config.value_weight * v_dev
        return highest(prompt, scores, self.config, ratio=ratio, rows=rows)


class QuestionAttention(TokenSelector[QuestionConfig]):
    """The candidates with the highest product of value deviation and attention from the question.

    An error in a token's value reaches the answer with the weight that the question's tokens attend to it with. That
    weight comes from a dry run of the question over the reused KV. Layers of the middle tell as much as all of them: on
    SmolLM2 (30 layers, 16 prompts of 6 passages, 15%) KL is 0.019 with the middle third and 0.020 with all. Tokens that
    get little attention are not compared: whatever their values, others come before them.
    """

    Config = QuestionConfig
    needs_all_layers = True

    def __init__(self, config: QuestionConfig) -> None:
        super().__init__(config)
        self.check_layers = (config.check_layer,)
        ratio, least = min(1.0, config.ratio * config.compared), math.ceil(config.min_tokens * config.compared)
        self.compared = RatioConfig(ratio=ratio, min_tokens=least)

    def start(self, prompt: Prompt) -> torch.Tensor:
        if not prompt.num_candidates or self.compared.ratio == 1:  # nothing to choose, so nothing to ask
            return prompt.everything
        return highest(prompt, self._attention(prompt), self.compared)

    def narrow(
        self, prompt: Prompt, layer: int, rows: torch.Tensor, k_dev: torch.Tensor, v_dev: torch.Tensor
    ) -> torch.Tensor:
        if not prompt.num_candidates:
            return highest(prompt, v_dev, self.config, rows=rows)
        return highest(prompt, self._attention(prompt)[rows] * v_dev.sqrt(), self.config, rows=rows)

    def _attention(self, prompt: Prompt) -> torch.Tensor:
        return prompt.attention(self.config.question_tokens, *self.config.depth)


class Oracle(TokenSelector[OracleConfig]):
    """As QuestionAttention, with the attention and the values of every layer of a full prefill."""

    Config = OracleConfig
    needs_all_layers = True

    def start(self, prompt: Prompt) -> torch.Tensor:
        return highest(prompt, prompt.truth(self.config.question_tokens), self.config)


TOKEN_SELECTORS: Registry[type[TokenSelector[Any]]] = Registry(
    "token selector",
    {
        "none": f"{__name__}:NoTokens",
        "all": f"{__name__}:AllTokens",
        "random": f"{__name__}:RandomTokens",
        "epic": f"{__name__}:FirstTokens",
        "cacheblend": f"{__name__}:Deviating",
        "question": f"{__name__}:QuestionAttention",
        "oracle": f"{__name__}:Oracle",
    },
    "lmcache.token_selectors",
)


def build_selector(options: str | Mapping[str, Any], where: str = "selector") -> TokenSelector[Any]:
    """``{type: cacheblend, ratio: 0.15}``, or only the type -> a selector. ConfigError names what is known."""
    name, rest = split_type({"type": options} if isinstance(options, str) else options, where)
    selector = TOKEN_SELECTORS.get(name)
    return selector(build(selector.Config, rest, f"{where} ({name})"))


def at_ratio(selector: TokenSelector[Any], ratio: float) -> TokenSelector[Any]:
    """The selector with another ratio and all else as it is. ConfigError where the ratio decides nothing."""
    config = selector.config
    if not isinstance(config, RatioConfig) or not config.ratio_counts:
        raise ConfigError(
            f"the ratio of {type(selector).__name__} ({config}) decides nothing; a controller needs a selector with a "
            "ratio, without ratios or segment_tokens beside it"
        )
    return type(selector)(build(type(config), {**config.model_dump(), "ratio": ratio}, "selector"))


def describe(
    reused: ReusedKV,
    always: Sequence[Segment],
    config: SelectorConfig,
    attention: Callable[[int, float, float], torch.Tensor],
    truth: Callable[[int], torch.Tensor],
) -> Prompt:
    """The prompt of `reused`, where `always` is computed in any case."""
    covered, exact = reused.covered, reused.exact
    include = ~covered
    spans = [*always, Segment(0, config.sinks), Segment(len(covered) - config.last_tokens, len(covered))]
    for span in spans:
        include[max(span.start, 0) : span.stop] = True
    include &= ~exact
    include[-1] = True  # it has logits, which nobody has stored
    return Prompt(covered, exact, include, reused.segments, attention, truth)


def highest(
    prompt: Prompt,
    scores: torch.Tensor,
    config: RatioConfig,
    *,
    ratio: float | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Places in `rows` (all tokens if None) of what is included and of the candidates with the highest scores.

    `scores`: fp32, one for each of `rows`; of equal ones the first wins. `ratio`: that of the config if None.
    """
    include = prompt.include if rows is None else prompt.include[rows]
    candidates = prompt.candidates if rows is None else prompt.candidates[rows]
    ratio = config.ratio if ratio is None else ratio
    count = min(max(round(ratio * prompt.num_candidates), config.min_tokens), prompt.num_candidates)
    # Exact tokens come last: NaN is below every score.
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).where(candidates, torch.nan)
    if config.threshold and count:
        top = scores.nan_to_num(-torch.inf).max()
        count = min(count, int((scores >= config.threshold * top).sum()))
    return select_tokens(scores, prompt.num_included + count, include=include)


def check_layers(selector: TokenSelector[Any], num_layers: int) -> None:
    """ConfigError unless the model has the layers that the selector looks at."""
    if selector.check_layers and max(selector.check_layers) >= num_layers:
        raise ConfigError(f"check layers {tuple(selector.check_layers)}: the model has layers 0 .. {num_layers - 1}")
