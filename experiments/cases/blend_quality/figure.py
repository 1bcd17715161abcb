"""The figure: what blending costs by ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.blending.quality import Found
from experiments.framework.plots import FADED, INK, SELECTORS, drawn


def draw(found: Sequence[Found], titles: Mapping[str, str], title: str, caption: str, path: Path) -> None:
    """KL with 95 % intervals, top-1 and perplexity against the ratio, a row a kind of data; written to ``path``."""
    kinds = [data for data in titles if any(f.data == data for f in found)]
    ratios = sorted({f.ratio for f in found})
    with drawn(title, caption, path, size=(14, 1 + 4 * len(kinds)), nrows=len(kinds), ncols=3) as grid:
        for data, axes in zip(kinds, grid, strict=True):
            names = [name for name in dict.fromkeys(f.selector for f in found) if name not in ("none", "all")]
            for name in names:
                # Plain reuse and a full prefill are the two ends of every line.
                line = [f for f in found if f.data == data and f.selector in (name, "none", "all")]
                line.sort(key=lambda f: f.ratio)
                x = [ratios.index(f.ratio) for f in line]
                style = {"marker": "o", "ms": 4, "color": SELECTORS.get(name), "label": name}
                kl = [f.kl.value for f in line]
                bars = [[f.kl.value - f.kl.low for f in line], [f.kl.high - f.kl.value for f in line]]
                axes[0].errorbar(x, kl, yerr=bars, capsize=2, elinewidth=0.8, **style)
                axes[1].plot(x, [f.top1 for f in line], **style)
                axes[2].plot(x, [f.perplexity for f in line], **style)
            axes[0].set_title(titles[data], loc="left", color=INK)
            for axis, label in zip(axes, ("KL to a full prefill, nats", "top-1 agreement", "perplexity"), strict=True):
                axis.set_ylabel(label, color=FADED)
                axis.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
                axis.set_xlabel("reused tokens computed again", color=FADED)
                axis.grid(alpha=0.25)
            axes[0].legend(frameon=False)
