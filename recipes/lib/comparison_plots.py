"""Strategies beside each other: bars of memory, speed and stall, each with its figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from recipes.lib.bandwidth_plots import COLOURS, GREY, INK, LIGHT, new_figure
from recipes.lib.memory import Kept
from recipes.lib.stall import Stall
from recipes.lib.tables import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Compared(Protocol):
    """What is drawn of each strategy."""

    strategy: str
    kept: Kept
    peak_bytes: int
    seconds: list[float]
    tokens_per_step: int
    stall: Stall


def comparison_png(path: Path, title: str, subtitle: str, found: Sequence[Compared]) -> None:
    """Three panels that share their rows; the first strategy is on top."""
    figure = new_figure(12.0, 2.0 + 0.55 * len(found), title, subtitle)
    memory, speed, stall = figure.subplots(1, 3, sharey=True)
    rows = range(len(found))
    for axes, label in ((memory, "memory of a rank"), (speed, "tokens/s"), (stall, "stall")):
        axes.set_title(label, loc="left", fontsize=10, color=INK)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
        axes.xaxis.set_visible(False)
    memory.set_yticks(rows, [each.strategy for each in found])
    memory.invert_yaxis()
    _draw_memory(memory, found)
    rates = [each.tokens_per_step / statistics.median(each.seconds) for each in found]
    lows = [each.tokens_per_step / max(each.seconds) for each in found]
    highs = [each.tokens_per_step / min(each.seconds) for each in found]
    speed.barh(rows, rates, height=0.55, color=COLOURS[0])
    errors = (
        [a - b for a, b in zip(rates, lows, strict=True)],
        [a - b for a, b in zip(highs, rates, strict=True)],
    )
    speed.errorbar(rates, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    _label(speed, highs, [f"{rate:,.0f}" for rate in rates])
    waiting = [each.stall.waiting for each in found]
    stall.barh(rows, [1.0] * len(found), height=0.55, color=LIGHT)
    stall.barh(rows, waiting, height=0.55, color=GREY, label="all waiting")
    if any(each.stall.communication is not None for each in found):
        inside = [each.stall.communication or 0.0 for each in found]
        stall.barh(rows, inside, height=0.55, color=COLOURS[1], label="of it in communication")
        stall.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, fontsize=8, frameon=False)
    _label(stall, [1.0] * len(found), [f"{part:.0%}" for part in waiting])
    figure.savefig(path)


def _draw_memory(axes: Axes, found: Sequence[Compared]) -> None:
    """What is kept, stacked, and behind it how much there was at the peak."""
    rows = range(len(found))
    axes.barh(rows, [each.peak_bytes for each in found], height=0.55, color=LIGHT, label="peak")
    left = [0.0] * len(found)
    for number, name in enumerate(("parameters", "gradients", "moments")):
        sizes = [getattr(each.kept, name) for each in found]
        axes.barh(rows, sizes, left=left, height=0.3, color=COLOURS[number], label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    ends = [max(each.peak_bytes, kept) for each, kept in zip(found, left, strict=True)]
    _label(axes, ends, [size_text(each.peak_bytes) for each in found])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=8, frameon=False)


def _label(axes: Axes, ends: Sequence[float], texts: Sequence[str]) -> None:
    """A figure behind the end of each bar."""
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(
            text, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
    axes.set_xlim(0, 1.25 * max(ends))
