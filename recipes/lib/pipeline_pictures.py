"""A pipeline as a picture: time goes to the right, a row for each rank, a box for each action. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.lib.bandwidth_plots import COLOURS, GREY, INK, LIGHT
from recipes.lib.pipeline_orders import BACKWARD, FORWARD, INPUT, WEIGHT, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LANE, _ROW_GAP = 1.0, 0.35
"""Heights: of the boxes of one stage, and between ranks."""
_LIGHTER = {FORWARD: 0.0, BACKWARD: -0.35, INPUT: 0.35, WEIGHT: 0.7}
"""How much white is mixed into a microbatch's colour; below 0, black."""
_BAND, _IDLE = "#f7f7f7", "#d4d4d4"
_MEANING = {FORWARD: "forward", BACKWARD: "backward", INPUT: "backward, input", WEIGHT: "backward, weights"}


@dataclass(frozen=True)
class Panel:
    """One pipeline over time."""

    title: str
    spans: Sequence[Span]
    time_label: str


def draw_pipeline(paths: Sequence[Path], title: str, panels: Sequence[Panel]) -> None:
    """Draw the panels below one another into each of `paths` (its suffix is the format): same ranks, own times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = sorted({span.rank for span in panels[0].spans})
    stages = {rank: sorted({s.action.stage for s in panels[0].spans if s.rank == rank}) for rank in ranks}
    height = sum(_LANE * len(lanes) + _ROW_GAP for lanes in stages.values())
    most = max(sum(span.rank == rank for span in panels[0].spans) for rank in ranks)
    size = (min(24, max(12, 0.15 * most)), 1.2 + len(panels) * (0.85 + 0.3 * height))
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _draw_panel(axes, panel, ranks, stages, height)
    _draw_legend(figure, panels)
    for path in paths:
        figure.savefig(path)


def _draw_panel(
    axes: Axes, panel: Panel, ranks: Sequence[int], stages: dict[int, list[int]], height: float
) -> None:
    from matplotlib.patches import Rectangle

    begin = min(span.begin for span in panel.spans)
    length = max(span.end for span in panel.spans) - begin
    axes.set(xlim=(0, length * 1.002), ylim=(height, -_ROW_GAP / 2))
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(panel.time_label, fontsize=8.5, color=GREY)
    axes.tick_params(labelsize=8, colors=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    top: dict[tuple[int, int], float] = {}
    y, ticks = 0.0, []
    for rank in ranks:
        for lane, stage in enumerate(stages[rank]):
            top[rank, stage] = y + lane * _LANE
            name = f"rank {rank}, stage {stage}" if len(stages[rank]) == 1 or lane == 0 else f"stage {stage}"
            ticks.append((y + (lane + 0.5) * _LANE, name))
        band = _LANE * len(stages[rank])
        axes.axhspan(y, y + band, color=_BAND, linewidth=0, zorder=0)
        for idle_from, idle_to in _idle([span for span in panel.spans if span.rank == rank], begin, length):
            box = Rectangle((idle_from, y), idle_to - idle_from, band, facecolor=_IDLE, linewidth=0, zorder=1)
            axes.add_patch(box)
        for lane in range(1, len(stages[rank])):
            axes.axhline(y + lane * _LANE, color=LIGHT, linewidth=0.8, zorder=2)
        y += band + _ROW_GAP
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    for span in panel.spans:
        _draw_box(axes, span, begin, top[span.rank, span.action.stage], length)


def _idle(spans: Sequence[Span], begin: float, length: float) -> list[tuple[float, float]]:
    """When a rank computes in none of its stages, from `begin` on."""
    found, free = [], 0.0
    for span in sorted(spans, key=lambda span: span.begin):
        if span.begin - begin > free:
            found.append((free, span.begin - begin))
        free = span.end - begin
    return [*found, (free, length)]


def _draw_box(axes: Axes, span: Span, begin: float, y: float, length: float) -> None:
    from matplotlib.patches import Rectangle

    width = span.end - span.begin
    kind, number = span.action.kind, span.action.microbatch
    axes.add_patch(
        Rectangle(
            (span.begin - begin, y + 0.05), width, _LANE - 0.1, facecolor=_colour(number, kind), zorder=3,
            edgecolor="white", linewidth=0.5,
        )
    )  # fmt: skip
    if width > 0.013 * length:
        dark = kind in (FORWARD, BACKWARD)
        axes.text(
            span.begin - begin + width / 2, y + _LANE / 2, str(number), fontsize=7, ha="center", va="center",
            color="white" if dark else INK, zorder=4, clip_on=True,
        )  # fmt: skip


def _colour(microbatch: int, kind: str) -> tuple[float, float, float]:
    """Of a microbatch, by its number; lighter or darker by what is done."""
    from matplotlib.colors import to_rgb

    base, lighter = to_rgb(COLOURS[microbatch % len(COLOURS)]), _LIGHTER[kind]
    towards, part = (1.0, lighter) if lighter >= 0 else (0.0, -lighter)
    red, green, blue = (value + (towards - value) * part for value in base)
    return red, green, blue


def _draw_legend(figure: Figure, panels: Sequence[Panel]) -> None:
    from matplotlib.patches import Patch

    kinds = [k for k in _MEANING if any(span.action.kind == k for panel in panels for span in panel.spans)]
    handles = [Patch(facecolor=_colour(0, kind), label=_MEANING[kind]) for kind in kinds]
    handles.append(Patch(facecolor=_IDLE, edgecolor=LIGHT, label="the rank waits: the bubble"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8.5,
        title="colour and number: the microbatch", title_fontsize=8.5, alignment="left",
    )  # fmt: skip
