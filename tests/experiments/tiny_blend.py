"""A prompt for the tiny model, and rows of a quality run that went well."""

from __future__ import annotations

import torch

from experiments.blending.prompts import Prompt
from experiments.blending.quality import Scored

KL = {"none": 0.040, "random": 0.038, "epic": 0.028, "cacheblend": 0.020, "question": 0.012, "all": 1e-8}


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(2, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT = Prompt("wiki", "a", 0, tokens(5, 0), [tokens(40, 1), tokens(48, 2)], tokens(9, 3), tokens(6, 4))


def scored(data: str, number: int, selector: str, ratio: float, kl: float, count: int = 1056) -> Scored:
    article = f"article{number}"
    return Scored(data, article, f"{data}/{article}#0", count, selector, ratio, kl, kl, 0.9, 2.0, False)


def good_rows(**changed: float) -> list[Scored]:
    """Eight prompts of each kind, one article each, with a spread that is common to all methods."""
    rows = []
    for data in ("wiki", "bind"):
        for selector, kl in {**KL, **changed}.items():
            ratio = {"none": 0.0, "all": 1.0}.get(selector, 0.15)
            rows += [scored(data, n, selector, ratio, kl * (1 + 0.1 * n)) for n in range(8)]
    return rows
