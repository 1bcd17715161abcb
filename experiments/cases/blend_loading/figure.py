"""The figure: loading and computing, in turn and at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.cases.blend_loading.rows import Found
from experiments.framework.plots import FADED, INK, drawn


def draw(found: Sequence[Found], title: str, caption: str, path: Path) -> None:
    """Medians of loading, computing, both in turn and both at once against the ratio, a panel a rate of the tier.

    Written to ``path``.
    """
    loads = sorted({f.load for f in found})
    with drawn(title, caption, path, size=(1 + 3.6 * len(loads), 4.8), ncols=len(loads), sharey=True) as grid:
        for load, axes in zip(loads, grid[0], strict=True):
            line = [f for f in found if f.load == load and not f.chosen]
            x = [f.ratio for f in line]
            axes.plot(x, [f.load_s for f in line], color=FADED, ls=":", label="load alone")
            axes.plot(x, [f.compute_s for f in line], color=FADED, ls="--", label="compute alone")
            axes.plot(x, [f.sequential_s for f in line], color="#e0a458", marker="o", ms=4, label="load, then compute")
            axes.plot(x, [f.pipelined_s for f in line], color="#3d6fb4", marker="o", ms=4, label="layer by layer")
            for f in found:
                if f.load == load and f.chosen:
                    axes.plot(f.ratio, f.pipelined_s, "*", ms=15, color="#c8553d", label="controller's choice")
                    axes.set_title(f"{f.bytes_per_s / 1e6:.0f} MB/s", loc="left", color=INK)
            axes.set_xlim(0, 1.03)
            axes.xaxis.set_major_formatter("{x:.0%}")
            axes.set_xlabel("reused tokens computed again", color=FADED)
            axes.grid(alpha=0.25)
        grid[0][0].set_ylabel("seconds to the first token (median)", color=FADED)
        grid[0][0].set_ylim(0, 1.05 * max(f.sequential_s for f in found))  # shared by all
        grid[0][0].legend(frameon=False, fontsize=8.5, loc="upper left")
