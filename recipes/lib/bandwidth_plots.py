"""Pictures of what was measured: bandwidth and time over size, pairs as a heat map. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recipes.lib.tables import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#d9730d", "#3a8f4f", "#8e44ad", "#c0392b", "#16877f", "#7a5c3e", "#5d6d7e", "#b7950b")
MARKERS = "osD^vPXhp"
GREY, LIGHT, INK = "#7f7f7f", "#e6e6e6", "#222222"


@dataclass(frozen=True)
class Curve:
    """One line of a picture; the band is from the fastest to the slowest trial."""

    label: str
    sizes: Sequence[float]
    """Bytes."""
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Level:
    """A horizontal line: what a link can carry."""

    label: str
    value: float


def bandwidth_and_time_png(
    path: Path,
    title: str,
    subtitle: str,
    bandwidth: Sequence[Curve],
    seconds: Sequence[Curve],
    *,
    bandwidth_label: str,
    levels: Sequence[Level] = (),
) -> None:
    """Two panels over one axis of sizes: GB/s on the left, the time of one call on the right."""
    figure = new_figure(11.0, 4.8, title, subtitle)
    left, right = figure.subplots(1, 2)
    for axes, curves, label in ((left, bandwidth, bandwidth_label), (right, seconds, "time of one call [s]")):
        _sizes_axis(axes, [size for curve in curves for size in curve.sizes])
        axes.set_ylabel(label)
        axes.set_yscale("log")
        for number, curve in enumerate(curves):
            colour = COLOURS[number % len(COLOURS)]
            marker = MARKERS[number % len(MARKERS)]
            axes.fill_between(curve.sizes, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                curve.sizes, curve.values, color=colour, marker=marker, markersize=4, linewidth=1.6,
                label=curve.label,
            )  # fmt: skip
        # A single slow trial would stretch the axis until the curves lie on each other: bands are cut off instead.
        values = [value for curve in curves for value in curve.values]
        axes.set_ylim(min(values) / 2, max([*values, *(level.value for level in levels if axes is left)]) * 2)
    for level in levels:
        left.axhline(level.value, color=GREY, linewidth=1.0, linestyle=(0, (5, 3)))
        left.annotate(
            f"{level.label}: {level.value:.4g} GB/s", (0.01, level.value), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", fontsize=8, color=GREY,
        )  # fmt: skip
    _plain_logarithm(left)
    _engineering_seconds(right)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    figure.savefig(path)


def heat_map_png(
    path: Path,
    title: str,
    subtitle: str,
    values: Sequence[Sequence[float | None]],
    names: Sequence[str],
    unit: str,
    borders: Sequence[int] = (),
) -> None:
    """A value for every pair: senders are rows, receivers columns. `borders` are ranks at which a node begins."""
    count = len(names)
    side = min(12.0, max(4.4, 2.6 + 0.62 * count))
    figure = new_figure(side + 1.4, side + 0.5, title, subtitle)
    axes = figure.subplots()
    cells = np.array([[np.nan if cell is None else cell for cell in row] for row in values], float)
    masked = np.ma.masked_invalid(cells)
    # From zero: a scale that begins at the smallest value makes a few percent look like a broken link.
    image = axes.imshow(masked, cmap="YlGnBu", vmin=0.0, vmax=float(masked.max()))
    axes.set_facecolor("#f2f2f2")
    axes.set_xticks(range(count), names, rotation=0 if count <= 8 else 90, fontsize=9)
    axes.set_yticks(range(count), names, fontsize=9)
    axes.set_xlabel("receiver")
    axes.set_ylabel("sender")
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for border in borders:
        axes.axhline(border - 0.5, color=INK, linewidth=1.4)
        axes.axvline(border - 0.5, color=INK, linewidth=1.4)
    if count <= 16:
        bright = float(masked.max()) * 0.55
        for row in range(count):
            for column in range(count):
                value = cells[row, column]
                text = "" if np.isnan(value) else f"{value:.3g}"
                colour = "white" if value > bright else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(unit)
    bar.outline.set_visible(False)
    figure.savefig(path)


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """An empty picture with its titles. Without pyplot: no display is looked for, nothing global is left behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    room = 0.62 / height  # inches for the two lines of titles
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - room)))
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=13, fontweight="bold", va="top", color=INK)
    figure.text(0.012, 1 - 0.38 / height, subtitle, fontsize=8.5, va="top", color=GREY)
    return figure


def _sizes_axis(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(sizes))
    step = max(1, -(-len(ticks) // 8))
    axes.set_xticks(
        ticks[::step], [size_text(size) for size in ticks[::step]], rotation=35, ha="right", fontsize=8
    )
    axes.minorticks_off()
    axes.set_xlabel("size S of the message")
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_logarithm(axes: Axes) -> None:
    """0.1, 1, 10 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _engineering_seconds(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
