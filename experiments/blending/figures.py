"""The pictures of docs/blend.md that are no results: python -m experiments.blending.figures

blend_life.png      a prompt on its way: learned passages, storage, moved keys, the fusion
blend_tokens.png    which tokens of a real prompt are computed on each layer, by selector
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.blending.prompts import Prompt, bind
from experiments.blending.session import BlendSession, open_session
from experiments.framework.config import ROOT, EngineConfig, ExperimentConfig
from experiments.framework.plots import FADED, INK, SELECTORS
from lmcache.blend.selectors import Prompt as Blending
from lmcache.blend.selectors import TokenSelector, build_selector
from lmcache.blend.standalone import BlendEngine

IMAGES = ROOT / "docs" / "images"
EXACT, REUSED, MISSING, ASKING = "#2a9d8f", "#b9cbe4", "#d5dae0", "#e0a458"
COMPUTED = SELECTORS["question"]


class Recorded(TokenSelector[Any]):
    """Another selector, of which it keeps which tokens it had computed from which layer on."""

    def __init__(self, inner: TokenSelector[Any]) -> None:
        super().__init__(inner.config)
        self.inner, self.check_layers = inner, inner.check_layers
        self.rows: dict[int, torch.Tensor] = {}

    def start(self, prompt: Blending) -> torch.Tensor:
        self.rows[0] = self.inner.start(prompt)
        return self.rows[0]

    def narrow(
        self, prompt: Blending, layer: int, rows: torch.Tensor, k_dev: torch.Tensor, v_dev: torch.Tensor
    ) -> torch.Tensor:
        kept = self.inner.narrow(prompt, layer, rows, k_dev, v_dev)
        self.rows[layer] = rows[kept]
        return kept


def life(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    figure, axes = plt.subplots(figsize=(12, 7.2), dpi=140)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 62)
    axes.axis("off")

    def bar(y: float, parts: Sequence[tuple[float, float, str, str]], height: float = 4) -> None:
        for start, stop, colour, text in parts:
            axes.add_patch(Rectangle((start, y), stop - start, height, fc=colour, ec="white", lw=1.5))
            axes.text((start + stop) / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=INK)

    def arrow(x: float, y: float, to_x: float, to_y: float) -> None:
        style = {"arrowstyle": "-|>", "color": FADED, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=(to_x, to_y), xytext=(x, y), arrowprops=style)

    def say(y: float, head: str, text: str) -> None:
        axes.text(0, y, head, fontsize=12, fontweight="bold", color=INK, va="center")
        axes.text(14, y, text, fontsize=10, color=FADED, va="center")

    aside: dict[str, Any] = {"fontsize": 9.5, "color": FADED, "va": "center"}
    say(
        60,
        "1  learn",
        "each passage is prefilled once, behind the prefix; its rows go to storage under a key of its tokens",
    )
    bar(53.5, [(14, 22, EXACT, "prefix"), (22, 38, REUSED, "A")])
    bar(53.5, [(54, 62, EXACT, "prefix"), (62, 80, REUSED, "B")])
    say(44, "2  find", "")
    axes.text(80, 44, "passages are found by content, anywhere;\nC was never learned: a miss", **aside)
    prompt = [(14, 22, EXACT, "prefix"), (22, 40, REUSED, "B"), (40, 56, REUSED, "A"), (56, 68, MISSING, "C")]
    prompt.append((68, 78, ASKING, "question"))
    bar(42, prompt)
    arrow(30, 53.2, 47, 46.3)
    arrow(71, 53.2, 32, 46.3)
    say(
        36.5,
        "3  move",
        "keys are turned by R(p - s): from where they were stored (s) to where they are (p); values stay",
    )
    bar(31, [(14, 22, EXACT, "exact"), (22, 40, REUSED, "R(0)"), (40, 56, REUSED, "R(+|B|)"), (56, 68, MISSING, "?")])
    axes.text(80, 33, "what A would have read in B is missing", **aside)
    say(26, "4  fuse", "layer by layer: chosen tokens are computed, see all KV at or before them, and overwrite theirs")
    chosen = [26, 31, 36.5, 41, 45, 46.5, 52]
    for row, (y, label) in enumerate([(19.5, "layer 0"), (15.5, "layer 1"), (11.5, "layer 2"), (7.5, "... last")]):
        bar(
            y,
            [(a, b, colour if row else (colour if colour == EXACT else COMPUTED), "") for a, b, colour, _ in prompt],
            3,
        )
        if row:
            bar(y, [(56, 68, COMPUTED, ""), (68, 78, COMPUTED, ""), *((x, x + 0.9, COMPUTED, "") for x in chosen)], 3)
        axes.text(12.5, y + 1.5, label, ha="right", va="center", fontsize=10, color=INK)
    notes = {
        21: "all: one layer shows what has changed",
        17: "KV against the reused; the selector chooses",
        11: "only what was chosen, what was missed,\nand the question",
    }
    for y, text in notes.items():
        axes.text(80, y, text, **aside)
    say(3, "5  go on", "the engine has KV of all tokens and the last one's logits, and decodes as after a prefill")
    figure.suptitle("Life of a blended prompt", fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    for place, (name, colour) in enumerate(
        {"exact": EXACT, "reused": REUSED, "not known": MISSING, "computed": COMPUTED}.items()
    ):
        figure.text(0.5 + 0.12 * place, 0.955, "■", color=colour, fontsize=13, va="center")
        figure.text(0.517 + 0.12 * place, 0.955, name, color=FADED, fontsize=10, va="center")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path)
    plt.close(figure)


def computed(session: BlendSession, prompt: Prompt, selector: str, ratio: float) -> np.ndarray[Any, Any]:
    """bool `[layers, T]`: whose KV a blend writes on each layer."""
    recorded = Recorded(build_selector({"type": selector, "ratio": ratio}))
    engine = BlendEngine(
        session.adapted, session.manager, model_id=session.name, prefix=prompt.prefix, selector=recorded
    )
    report = engine.blend(prompt.asked, prompt.segments).report
    mask = np.zeros((session.adapted.num_layers, len(prompt.asked)), dtype=bool)
    for layer, row in enumerate(mask):
        rows = recorded.rows[max(known for known in recorded.rows if known <= layer)]
        row[rows.numpy()] = True
        assert row.sum() == report.computed[layer]
    return mask


def tokens(session: BlendSession, prompt: Prompt, selectors: Sequence[str], ratio: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    figure, grid = plt.subplots(len(selectors), 1, figsize=(12, 1.2 + 2.1 * len(selectors)), dpi=140, sharex=True)
    session.learn(session.engine(prompt, {"type": "none"}), prompt)
    for axes, selector in zip(grid, selectors, strict=True):
        mask = computed(session, prompt, selector, ratio)
        picture = 1 + mask.astype(int)
        picture[:, : len(prompt.prefix)] = 0
        shades = ListedColormap([EXACT, "#e8eef6", COMPUTED])
        axes.imshow(picture, aspect="auto", interpolation="none", cmap=shades, vmin=0, vmax=2)
        for number, segment in enumerate(prompt.segments):
            axes.axvline(segment.start - 0.5, color=INK, lw=0.8)
            name = f"article {number // 2 + 1}" if number % 2 == 0 else "note"
            if axes is grid[0]:
                axes.text((segment.start + segment.stop) / 2, -1.2, name, ha="center", fontsize=9, color=INK)
        axes.axvline(prompt.segments[-1].stop - 0.5, color=INK, lw=0.8)
        axes.set_ylabel(f"{selector}\nlayer", color=INK)
        axes.tick_params(colors=FADED)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    grid[0].text(prompt.segments[-1].stop + 8, -1.2, "question", fontsize=9, color=INK)
    grid[-1].set_xlabel("token of the prompt", color=FADED)
    title = f"Which tokens are computed on each layer, {ratio:.0%}"
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    caption = (
        f"{prompt.key}: {prompt_question(session, prompt)}  {session.name}. Red: computed; pale: reused; green: prefix"
    )
    figure.text(0.02, 0.012, caption, fontsize=9.5, color=FADED, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 0.98))
    figure.savefig(path)
    plt.close(figure)


def prompt_question(session: BlendSession, prompt: Prompt) -> str:
    title = session.texts[prompt.article].partition("\n")[0]
    return f"who is the survey officer for {title}?"


def main() -> None:
    life(IMAGES / "blend_life.png")
    config = ExperimentConfig(experiment="figures", name="figures", engine=EngineConfig(threads=1))
    with open_session(config) as session:
        texts = dict(list(session.texts.items())[:8])
        prompt = bind(texts, session.encode, prompts=1, context=960, seed=0, prefix=session.prefix)[0]
        tokens(session, prompt, ("epic", "cacheblend", "question"), 0.15, IMAGES / "blend_tokens.png")


if __name__ == "__main__":
    main()
