"""A schedule as a picture: time goes to the right, a row for each rank, an arrow for each message. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.lib.bandwidth_plots import COLOURS, GREY, INK, LIGHT
from recipes.lib.schedules import Content, Schedule, contents

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL, _HEIGHT, _ROW, _GAP, _MARGIN = 0.24, 0.42, 0.86, 0.72, 0.75
"""Inches: width and height of a part, distance of rows, room for the arrows, for the ranks' names."""


def draw_schedule(path: Path, schedule: Schedule, note: str, seconds_of_round: Sequence[str] = ()) -> None:
    """Draw every rank's array at first and after each round. A part is in the colours of the ranks it comes from."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    states = contents(schedule)
    cell = _CELL if schedule.parts > 1 else 2 * _CELL
    strip = cell * schedule.parts
    step = strip + _GAP
    width = max(6.4, _MARGIN + step * len(states) + 0.2)
    top = 1.25
    height = top + _ROW * schedule.ranks + 0.62
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(0.18, 0.3, _title(schedule), fontsize=13, fontweight="bold", color=INK, va="center")
    axes.text(0.18, 0.58, note, fontsize=8.5, color=GREY, va="center")

    def row(rank: int) -> float:
        return top + _ROW * rank + _ROW / 2

    for rank in range(schedule.ranks):
        axes.plot([_MARGIN - 0.1, width - 0.2], [row(rank)] * 2, color=LIGHT, linewidth=1, zorder=0)
        axes.text(0.18, row(rank), f"rank {rank}", fontsize=9, color=INK, va="center")
    for number, state in enumerate(states):
        left = _MARGIN + step * number
        adds = number > 0 and any(each.adds for each in schedule.rounds[number - 1])
        heading = f"round {number}" if number else "at first"
        doing = ("adds" if adds else "copies") if number else ""
        axes.text(left + strip / 2, 0.95, heading, fontsize=9, ha="center", color=INK)
        axes.text(left + strip / 2, 1.13, doing, fontsize=7.5, ha="center", color=GREY)
        changed = (
            {(each.receiver, each.put_into) for each in schedule.rounds[number - 1]} if number else set()
        )
        for rank in range(schedule.ranks):
            for part in range(schedule.parts):
                corner = (left + cell * part, row(rank) - _HEIGHT / 2)
                _draw_part(axes, corner, cell, state[rank][part], schedule, bold=(rank, part) in changed)
        if number:
            for transfer in schedule.rounds[number - 1]:
                _draw_arrow(
                    axes,
                    (left - _GAP + 0.03, row(transfer.sender)),
                    (left - 0.03, row(transfer.receiver)),
                    COLOURS[transfer.sender % len(COLOURS)],
                )
            if seconds_of_round:
                below = top + _ROW * schedule.ranks + 0.12
                axes.text(
                    left + strip / 2, below, seconds_of_round[number - 1], fontsize=8, ha="center", color=GREY
                )
    _draw_legend(axes, schedule, height - 0.24)
    figure.savefig(path)


def _title(schedule: Schedule) -> str:
    rounds = len(schedule.rounds)
    part = "S" if schedule.parts == 1 else f"S/{schedule.parts}"
    return (
        f"{schedule.name[0].upper()}{schedule.name[1:]}: {rounds} round{'s' if rounds != 1 else ''} of {part}"
    )


def _draw_part(
    axes: Axes, corner: tuple[float, float], width: float, content: Content, schedule: Schedule, *, bold: bool
) -> None:
    """One part: a band for each rank whose numbers are in it, each at its own height."""
    from matplotlib.patches import Rectangle

    x, y = corner
    summed = schedule.collective == "all_reduce"
    for rank, part in content:
        colour = _colour(schedule, rank, part)
        band = _HEIGHT / schedule.ranks if summed else _HEIGHT
        offset = band * rank if summed else 0.0
        axes.add_patch(Rectangle((x, y + offset), width, band, facecolor=colour, linewidth=0, zorder=2))
        if not summed and schedule.parts > 1:
            axes.text(
                x + width / 2, y + _HEIGHT / 2, str(part), fontsize=8, color="white", ha="center", va="center",
                zorder=4,
            )  # fmt: skip
    axes.add_patch(
        Rectangle(
            (x, y), width, _HEIGHT, fill=not content, facecolor="white", zorder=3 if content else 1,
            edgecolor=INK if bold else "#b5b5b5", linewidth=1.5 if bold else 0.7,
        )
    )  # fmt: skip


def _colour(schedule: Schedule, rank: int, part: int) -> str:
    """By the rank that it comes from; where all comes from one, by the rank that it is for."""
    return COLOURS[(part if schedule.collective == "scatter" else rank) % len(COLOURS)]


def _draw_arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    from matplotlib.patches import FancyArrowPatch

    axes.add_patch(
        FancyArrowPatch(
            begin, end, arrowstyle="-|>", mutation_scale=10, color=colour, linewidth=1.5, shrinkA=0, shrinkB=0,
            zorder=5,
        )
    )  # fmt: skip


def _draw_legend(axes: Axes, schedule: Schedule, y: float) -> None:
    from matplotlib.patches import Rectangle

    scatter = schedule.collective == "scatter"
    axes.text(0.18, y, "for" if scatter else "from", fontsize=8, color=GREY, va="center")
    for rank in range(schedule.ranks):
        x = 0.62 + 0.72 * rank
        axes.add_patch(
            Rectangle((x, y - 0.07), 0.14, 0.14, facecolor=COLOURS[rank % len(COLOURS)], linewidth=0)
        )
        axes.text(x + 0.19, y, f"rank {rank}", fontsize=8, color=GREY, va="center")
    hint = "a part is whole when all colours are in it" if schedule.collective == "all_reduce" else ""
    if schedule.collective != "all_reduce" and schedule.parts > 1:
        hint = "the number is the part's place in the sender's array"
    axes.text(0.62 + 0.72 * schedule.ranks + 0.1, y, hint, fontsize=8, color=GREY, va="center")
