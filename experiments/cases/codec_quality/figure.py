"""The figure: what a codec costs against what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.cases.codec_quality.measure import Found
from experiments.framework.plots import FADED, INK, drawn


def draw(found: Sequence[Found], title: str, caption: str, path: Path) -> None:
    """KL divergence against bits an element, both of every codec, with 95 % intervals; written to ``path``."""
    with drawn(title, caption, path) as grid:
        axes = grid[0, 0]
        for codec in found:
            if codec.kl <= 0:
                continue  # raw: nothing changes
            coded = codec.codec.startswith(("klt", "cachegen"))
            colour = "#2a9d8f" if coded else "#3d6fb4"
            bar = min(codec.half, codec.kl * 0.9)
            axes.errorbar(codec.bits, codec.kl, yerr=bar, fmt="o", color=colour, capsize=3, ms=8)
            # A side of its own for each family, so that neighbours' names do not meet.
            left = codec.codec.startswith("klt")
            offset = (-8 if left else 8, -14 if coded or codec.codec.startswith("int") else 5)
            aligned = {"textcoords": "offset points", "ha": "right" if left else "left", "color": INK}
            axes.annotate(codec.codec, (codec.bits, codec.kl), xytext=offset, **aligned)
        axes.margins(x=0.09)
        axes.set_yscale("log")
        axes.set_xlabel("bits an element (bfloat16: 16)", color=FADED)
        axes.set_ylabel("KL divergence of the next token, nats", color=FADED)
        axes.grid(alpha=0.25)
