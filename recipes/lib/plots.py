"""The loss curve of a run, as a picture and as text, from RUN_DIR/metrics.jsonl."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_BLUE, _PALE, _GREY, _RED = "#1f5fa8", "#a9c6e8", "#9a9a9a", "#c0392b"
_FEW = 20
"""Below this number of steps a smoothed curve says less than the points themselves."""


@dataclass(frozen=True)
class Curve:
    """What happened at each logged step, in order; of a step that two attempts ran, the later line."""

    steps: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    """May hold nan and infinity."""
    tokens_per_second: npt.NDArray[np.float64]
    """Of the whole job; nan where it was not logged."""
    attempts: list[tuple[int, int]]
    """(number of the attempt, its first logged step), without the first attempt."""


def read_curve(metrics_path: Path) -> Curve:
    """The curve in a metrics file. A line that was cut off when its writer was killed is left out."""
    by_step: dict[int, dict[str, Any]] = {}
    first_steps: dict[int, int] = {}
    for text in metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            step, attempt = int(line["step"]), int(line["attempt"])
        except (ValueError, KeyError, TypeError):
            continue
        by_step[step] = line
        first_steps.setdefault(attempt, step)
    steps = sorted(by_step)
    return Curve(
        steps=np.array(steps, np.int64),
        loss=np.array([_number(by_step[step].get("loss")) for step in steps]),
        tokens_per_second=np.array([_number(by_step[step].get("tokens_per_second")) for step in steps]),
        attempts=sorted(first_steps.items())[1:],
    )


def loss_curve_png(metrics_path: Path, out_path: Path) -> None:
    """Draw the loss, raw and smoothed, and the tokens per second of a run into `out_path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    curve = read_curve(metrics_path)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # Without pyplot: no display is looked for, and nothing global is left behind.
    axes = figure.add_subplot()
    axes.set_title(metrics_path.absolute().parent.name, loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss", color=_BLUE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    finite = np.isfinite(curve.loss)
    steps, loss = curve.steps[finite], curve.loss[finite]
    if not len(steps):
        axes.text(0.5, 0.5, "no finite loss was logged", transform=axes.transAxes, ha="center", color=_GREY)
        axes.set(xticks=[], yticks=[], ylabel="")
        figure.savefig(out_path)
        return

    if np.isfinite(curve.tokens_per_second).any():
        speed = axes.twinx()
        speed.plot(curve.steps, curve.tokens_per_second, color=_GREY, linewidth=0.8, alpha=0.7)
        speed.set_ylim(0, 1.6 * float(np.nanmax(curve.tokens_per_second)))
        speed.set_ylabel("tokens/s, whole job", color=_GREY)
        speed.tick_params(axis="y", colors=_GREY)
        speed.yaxis.set_major_formatter(EngFormatter(sep=""))
        speed.spines[["top", "left", "right"]].set_visible(False)
        axes.set_zorder(speed.get_zorder() + 1)
        axes.patch.set_visible(False)

    if len(steps) < _FEW:
        axes.plot(steps, loss, color=_BLUE, marker="o", markersize=4, linewidth=1.4)
    else:
        axes.plot(steps, loss, color=_PALE, linewidth=0.9)
        axes.plot(steps, smoothed(loss), color=_BLUE, linewidth=1.8)
    axes.tick_params(axis="y", colors=_BLUE)
    axes.annotate(f" {loss[-1]:.3f}", (steps[-1], loss[-1]), va="center", fontsize=9, color=_BLUE)
    first, last = int(curve.steps[0]), int(curve.steps[-1])
    span = max(1, last - first)
    axes.set_xlim(first - 0.03 * span, last + 0.08 * span)  # Room for the number of the last loss.
    for attempt, first_step in curve.attempts:
        axes.axvline(first_step, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        label = f" attempt {attempt}"
        axes.text(
            first_step, 0.99, label, transform=axes.get_xaxis_transform(), va="top", fontsize=8, color=_GREY
        )
    for step in curve.steps[~finite]:
        axes.axvline(step, color=_RED, linewidth=0.8, alpha=0.5)
    axes.set_title(_missing(finite), loc="right", fontsize=9, color=_RED)
    figure.savefig(out_path)


def loss_curve_terminal(metrics_path: Path, width: int, height: int) -> str:
    """The smoothed loss as `height` lines of at most `width` characters, drawn with Braille dots."""
    curve = read_curve(metrics_path)
    finite = np.isfinite(curve.loss)
    steps, loss = curve.steps[finite], curve.loss[finite]
    if not len(steps):
        return "no finite loss was logged"[:width]
    if len(steps) >= _FEW:
        loss = smoothed(loss)
    low, high = float(loss.min()), float(loss.max())
    rows = max(1, height - 2)
    labels = [f"{high - (high - low) * row / max(1, rows - 1):.3f}" for row in range(rows)]
    margin = max(len(label) for label in labels) + 1
    columns = max(1, width - margin - 1)
    if low == high:
        labels = [labels[0] if row == rows // 2 else "" for row in range(rows)]
    canvas = np.zeros((rows * 4, columns * 2), bool)
    x = _scaled(steps.astype(np.float64), float(steps[0]), float(steps[-1]), canvas.shape[1])
    y = canvas.shape[0] - 1 - _scaled(loss, low, high, canvas.shape[0])
    _draw(canvas, x, y)
    lines = [f"loss {loss[0]:.3f} → {loss[-1]:.3f}{_missing(finite, '  (', ')')}"]
    for row in range(rows):
        label = labels[row] if row in (0, rows // 2, rows - 1) else ""
        lines.append(f"{label:>{margin}}│{_braille(canvas[row * 4 : row * 4 + 4])}".rstrip())
    lines.append(" " * margin + "└" + _below(steps, columns))
    return "\n".join(line[:width] for line in lines)


def smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Moving average over a twentieth of the values; centred, because an exponential one lags behind.

    The window shrinks towards both ends and stays centred: the first and the last value are themselves.
    """
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach_here = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    first, last = index - reach_here, index + reach_here + 1
    averages: npt.NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return averages


def _missing(finite: npt.NDArray[np.bool_], before: str = "", after: str = "") -> str:
    count = int((~finite).sum())
    return f"{before}{count} step{'s' if count > 1 else ''} without a finite loss{after}" if count else ""


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _scaled(values: npt.NDArray[np.float64], low: float, high: float, cells: int) -> npt.NDArray[np.int64]:
    """Where each value falls among `cells` equal cells between `low` and `high`."""
    if high == low:
        return np.full(len(values), cells // 2)
    return np.rint((values - low) / (high - low) * (cells - 1)).astype(np.int64)


def _draw(canvas: npt.NDArray[np.bool_], x: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> None:
    """Set the dots on the lines between consecutive points."""
    canvas[y[0], x[0]] = True
    for here in range(len(x) - 1):
        dots = int(max(abs(x[here + 1] - x[here]), abs(y[here + 1] - y[here]))) + 1
        across = np.rint(np.linspace(x[here], x[here + 1], dots)).astype(np.int64)
        down = np.rint(np.linspace(y[here], y[here + 1], dots)).astype(np.int64)
        canvas[down, across] = True


def _braille(dots: npt.NDArray[np.bool_]) -> str:
    """Four rows of dots as one row of characters: two columns of four dots in each."""
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    cells = dots.reshape(4, -1, 2).transpose(1, 0, 2)
    # A space for an empty cell: some fonts draw U+2800 as eight hollow dots.
    return "".join(chr(0x2800 + int(bits[cell].sum())) if cell.any() else " " for cell in cells)


def _below(steps: npt.NDArray[np.int64], columns: int) -> str:
    first, last = f"step {steps[0]}", f"{steps[-1]}"
    return first + "─" * max(1, columns - len(first) - len(last)) + last
