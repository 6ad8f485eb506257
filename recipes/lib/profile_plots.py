"""The picture of a profile: the step of every rank by what limits it, its parts, and memory through one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.lib.step_trace import CATEGORIES, Memory, StepTimes

COLOURS = {
    "compute": "#1f5fa8",
    "memory": "#7fb069",
    "network": "#c0392b",
    "input": "#e08e2b",
    "host": "#b8b8b8",
}


def profile_png(path: Path, ranks: Sequence[StepTimes], rank: int, memory: Memory, hardware: str) -> None:
    """Parts of the step of `rank` as bars, every rank's step by category, and rank 0's memory over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    parts = ranks[rank].parts()
    shown_ranks = ranks[:16]
    heights = (0.32 * len(parts) + 0.6, 0.32 * len(shown_ranks) + 0.6, 1.9)
    figure = Figure(figsize=(8.5, sum(heights) + 1.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    by_part, by_rank, over_time = figure.subplots(3, 1, height_ratios=heights)
    for axes in (by_part, by_rank, over_time):
        axes.spines[["top", "right"]].set_visible(False)

    whole = ranks[rank].seconds
    for row, (part, seconds) in enumerate(parts):
        left = 0.0
        for category in CATEGORIES:
            width = ranks[rank].by_part.get((part, category), 0.0) * 1e3
            by_part.barh(row, width, left=left, color=COLOURS[category], height=0.7)
            left += width
        by_part.text(left, row, f" {seconds / whole:.1%}", va="center", fontsize=8)
    by_part.set_yticks(range(len(parts)), [part for part, _ in parts], fontsize=9)
    by_part.invert_yaxis()
    by_part.set_xlim(0, 1.12e3 * max(seconds for _, seconds in parts))
    by_part.set_xlabel(f"ms of a step, rank {rank}")
    by_part.set_title(f"one training step: {hardware}", loc="left", fontsize=10)
    by_part.legend(
        handles=[Patch(color=COLOURS[name], label=name) for name in CATEGORIES],
        fontsize=8, frameon=False, loc="lower right",
    )  # fmt: skip

    for row, times in enumerate(shown_ranks):
        left = 0.0
        for category in CATEGORIES:
            width = times.category(category) * 1e3
            by_rank.barh(row, width, left=left, color=COLOURS[category], height=0.7)
            left += width
    names = [f"rank {number}" for number in range(len(shown_ranks))]
    by_rank.set_yticks(range(len(names)), names, fontsize=9)
    by_rank.invert_yaxis()
    by_rank.set_xlabel("ms of a step" + (f", the first 16 of {len(ranks)} ranks" if len(ranks) > 16 else ""))

    if memory.curve:
        times_ms, levels = zip(*((at * 1e3, size / 2**20) for at, size in memory.curve), strict=True)
        over_time.fill_between(times_ms, levels, step="post", color="#a9c6e8", linewidth=0)
        over_time.plot(times_ms, levels, drawstyle="steps-post", color=COLOURS["compute"], linewidth=0.9)
        over_time.set_ylim(bottom=min(0.0, *levels))
    over_time.set_xlabel("ms since the step began, rank 0")
    over_time.set_ylabel("MiB on top of\nwhat is kept", fontsize=9)
    figure.savefig(path)
