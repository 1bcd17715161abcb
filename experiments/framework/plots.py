"""What all figures look like, and the one that several experiments draw: times to first token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from experiments.framework.engine import Row

INK, FADED = "#22303c", "#6b7785"
# The colour of each selector of blending.
SELECTORS = {"random": "#9aa5b1", "epic": "#e0a458", "cacheblend": "#3d6fb4", "question": "#c8553d"}


@contextmanager
def drawn(title: str, caption: str, path: Path, size: tuple[float, float] = (10, 6), **options: Any) -> Iterator[Any]:
    """The axes to draw on, as an array `[rows, columns]`; at the end the figure is written to ``path``.

    size: inches. options: of ``pyplot.subplots``, such as nrows and ncols.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(figsize=size, squeeze=False, dpi=150, **options)
    try:
        yield grid
        for axes in grid.flat:
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
        figure.text(0.02, 0.015, caption, fontsize=9.5, color=FADED, ha="left")
        figure.tight_layout(rect=(0, 0.04, 1, 0.99))
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def ttft_figure(
    rows: Sequence[Row], labels: Mapping[str, str], colours: Mapping[str, str], title: str, caption: str, path: Path
) -> None:
    """Horizontal bars of median TTFT, one a phase, with every request as a dot; written to ``path``."""
    phases = [phase for phase in labels if any(row.phase == phase for row in rows)]
    longest = max(row.ttft_s for row in rows)
    with drawn(title, caption, path, size=(10, 1.6 + 0.75 * len(phases))) as grid:
        axes = grid[0, 0]
        for place, phase in enumerate(phases):
            times = [row.ttft_s for row in rows if row.phase == phase]
            middle = median(times)
            axes.barh(place, middle, height=0.5, color=colours[phase], alpha=0.85)
            lift = [place + 0.13 * ((i % 3) - 1) for i in range(len(times))]
            axes.scatter(times, lift, s=20, color="white", edgecolor=INK, linewidth=0.8, zorder=3)
            right = max(middle, *times)
            text = f"{middle:.2f} s" if middle >= 0.1 else f"{middle * 1000:.0f} ms"
            axes.text(right + longest * 0.015, place, text, va="center", fontsize=13, fontweight="bold", color=INK)
        axes.set_yticks(range(len(phases)), [labels[phase] for phase in phases], fontsize=12, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, longest * 1.13)
        axes.set_xlabel("time to first token, seconds (bar: median; dots: requests)", fontsize=10, color=FADED)
        axes.tick_params(axis="x", colors=FADED)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_color(FADED)
