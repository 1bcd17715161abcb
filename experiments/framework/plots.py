"""Figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from experiments.framework.engine import Row

if TYPE_CHECKING:
    from experiments.cases.blend_loading.experiment import Found as Loaded
    from experiments.cases.blend_quality.experiment import Found as Blended
    from experiments.cases.blend_ttft.experiment import Found as Timed
    from experiments.cases.codec_quality.experiment import Found

INK, FADED = "#22303c", "#6b7785"
SELECTORS = {"random": "#9aa5b1", "epic": "#e0a458", "cacheblend": "#3d6fb4", "question": "#c8553d"}


def ttft_figure(
    rows: Sequence[Row], labels: Mapping[str, str], colours: Mapping[str, str], title: str, caption: str, path: Path
) -> None:
    """Horizontal bars of median TTFT, one a phase, with every request as a dot; written to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    phases = [phase for phase in labels if any(row.phase == phase for row in rows)]
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.75 * len(phases)), dpi=160)
    longest = max(row.ttft_s for row in rows)
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
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FADED)
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.text(0.02, 0.015, caption, fontsize=9.5, color=FADED, ha="left")
    figure.tight_layout(rect=(0, 0.05, 1, 0.99))
    figure.savefig(path)
    plt.close(figure)


def codec_figure(found: Sequence[Found], title: str, caption: str, path: Path) -> None:
    """KL divergence against bits an element, both of every codec, with 95 % intervals; written to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), dpi=160)
    for codec in found:
        if codec.kl <= 0:
            continue  # raw: nothing changes
        coded = codec.codec.startswith(("klt", "cachegen"))
        colour = "#2a9d8f" if coded else "#3d6fb4"
        axes.errorbar(
            codec.bits, codec.kl, yerr=min(codec.half, codec.kl * 0.9), fmt="o", color=colour, capsize=3, ms=8
        )
        # A side of its own for each family, so that neighbours' names do not meet.
        left = codec.codec.startswith("klt")
        below = -14 if coded or codec.codec.startswith("int") else 5
        axes.annotate(
            codec.codec,
            (codec.bits, codec.kl),
            xytext=(-8 if left else 8, below),
            textcoords="offset points",
            ha="right" if left else "left",
            color=INK,
        )
    axes.margins(x=0.09)
    axes.set_yscale("log")
    axes.set_xlabel("bits an element (bfloat16: 16)", color=FADED)
    axes.set_ylabel("KL divergence of the next token, nats", color=FADED)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.text(0.02, 0.015, caption, fontsize=9.5, color=FADED, ha="left")
    figure.tight_layout(rect=(0, 0.04, 1, 0.99))
    figure.savefig(path)
    plt.close(figure)


def eviction_figure(
    found: Mapping[str, Mapping[int, float]], infinite: float, ours: str, title: str, caption: str, path: Path
) -> None:
    """Hit ratio against cache size, a line a policy, with the infinite cache above; written to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), dpi=160)
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
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.text(0.02, 0.015, caption, fontsize=9.5, color=FADED, ha="left")
    figure.tight_layout(rect=(0, 0.04, 1, 0.99))
    figure.savefig(path)
    plt.close(figure)


def blend_quality_figure(
    found: Sequence[Blended], titles: Mapping[str, str], title: str, caption: str, path: Path
) -> None:
    """KL with 95 % intervals, top-1 and perplexity against the ratio, a row a kind of data; written to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [data for data in titles if any(f.data == data for f in found)]
    ratios = sorted({f.ratio for f in found})
    figure, grid = plt.subplots(len(kinds), 3, figsize=(14, 1 + 4 * len(kinds)), dpi=140, squeeze=False)
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
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.text(0.02, 0.01, caption, fontsize=9.5, color=FADED, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 0.99))
    figure.savefig(path)
    plt.close(figure)


def blend_ttft_figure(found: Sequence[Timed], title: str, caption: str, path: Path) -> None:
    """Median TTFT with the range of all repeats against the prompt's length, a line a method; written to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), dpi=140)
    styles = {
        ratio: style for ratio, style in zip(sorted({f.ratio for f in found}), (":", "-", "--", "-."), strict=False)
    }
    for selector, ratio in dict.fromkeys((f.selector, f.ratio) for f in found):
        line = sorted((f for f in found if (f.selector, f.ratio) == (selector, ratio)), key=lambda f: f.length)
        bars = [[f.median_s - f.min_s for f in line], [f.max_s - f.median_s for f in line]]
        full = selector == "full"
        axes.errorbar(
            [f.length for f in line],
            [f.median_s for f in line],
            yerr=bars,
            marker="o",
            capsize=3,
            color=INK if full else SELECTORS.get(selector),
            ls="-" if full else styles[ratio],
            label="full prefill" if full else f"{selector}, {ratio:.0%}",
        )
    lengths = sorted({f.length for f in found})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("tokens of the prompt", color=FADED)
    axes.set_ylabel("time to first token, seconds (median; bars: range)", color=FADED)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.text(0.02, 0.015, caption, fontsize=9.5, color=FADED, ha="left")
    figure.tight_layout(rect=(0, 0.04, 1, 0.99))
    figure.savefig(path)
    plt.close(figure)


def blend_loading_figure(found: Sequence[Loaded], title: str, caption: str, path: Path) -> None:
    """Medians of loading, computing, both in turn and both at once against the ratio, a panel a rate of the tier.

    Written to ``path``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    loads = sorted({f.load for f in found})
    figure, grid = plt.subplots(1, len(loads), figsize=(1 + 3.6 * len(loads), 4.8), dpi=140, squeeze=False, sharey=True)
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
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("seconds to the first token (median)", color=FADED)
    grid[0][0].set_ylim(0, 1.05 * max(f.sequential_s for f in found))  # shared by all
    grid[0][0].legend(frameon=False, fontsize=8.5, loc="upper left")
    figure.suptitle(title, fontsize=16, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.text(0.02, 0.015, caption, fontsize=9.5, color=FADED, ha="left")
    figure.tight_layout(rect=(0, 0.04, 1, 0.99))
    figure.savefig(path)
    plt.close(figure)
