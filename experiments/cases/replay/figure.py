"""The figure: hit ratios by size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.framework.plots import FADED, INK, drawn


def draw(
    found: Mapping[str, Mapping[int, float]], infinite: float, ours: str, title: str, caption: str, path: Path
) -> None:
    """Hit ratio against cache size, a line a policy, with the infinite cache above; written to ``path``."""
    with drawn(title, caption, path) as grid:
        axes = grid[0, 0]
        for name, ratios in found.items():
            style = {"color": "#c8553d", "lw": 3.0, "zorder": 3} if name == ours else {"lw": 1.4}
            if name == "belady":
                style = {"color": INK, "lw": 1.4, "ls": ":"}
            axes.plot(list(ratios), list(ratios.values()), marker="o", ms=4, label=name, **style)
        axes.axhline(infinite, color=FADED, lw=1, ls="--", label="infinite cache")
        axes.set_xscale("log")
        axes.set_xlabel("cache size, blocks", color=FADED)
        axes.set_ylabel("hit ratio (blocks of cached prefixes)", color=FADED)
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)
