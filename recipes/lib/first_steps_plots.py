"""The picture of the first steps: one rank against several, and the workloads under the device's roof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.lib.roofline import Roof
from recipes.lib.tables import time_text
from recipes.lib.workloads import Gain, Workload

_BLUE, _RED, _GREY = "#1f5fa8", "#c0392b", "#9a9a9a"
_MARKERS = ("o", "s", "^", "D")


def first_steps_png(path: Path, gain: Gain, workloads: Sequence[Workload], roof: Roof, hardware: str) -> None:
    """Left the step's time by ranks, right what each workload computes per second over its arithmetic intensity."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    figure.suptitle(hardware, fontsize=10, x=0.01, ha="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)

    bars = [("1 rank", gain.one, 0.0)]
    if gain.ranks > 1:
        bars += [(f"{gain.ranks} ranks", gain.several - gain.exposed, gain.exposed)]
        bars += [("without\nany cost", gain.one / gain.ranks, 0.0)]
    for place, (_, work, exposed) in enumerate(bars):
        ideal = place == 2
        left.bar(place, work * 1e3, color="none" if ideal else _BLUE, edgecolor=_GREY if ideal else _BLUE,
                 linestyle="--" if ideal else "-", width=0.6)  # fmt: skip
        left.bar(place, exposed * 1e3, bottom=work * 1e3, color=_RED, width=0.6)
        left.text(
            place, (work + exposed) * 1e3, time_text(work + exposed), ha="center", va="bottom", fontsize=9
        )
    left.set_xticks(range(len(bars)), [name for name, _, _ in bars])
    left.set_ylabel("ms of a training step")
    left.set_title(
        "the same batch" + (", red: the exchange" if gain.ranks > 1 else ""), loc="left", fontsize=10
    )
    left.set_ylim(0, 1.12e3 * max(work + exposed for _, work, exposed in bars))

    lowest = min(0.5, *(each.intensity for each in workloads)) / 2
    highest = max(4 * roof.ridge, *(2 * each.intensity for each in workloads))
    x = np.geomspace(lowest, highest, 200)
    right.plot(
        x, np.minimum(roof.flops_per_second, x * roof.bytes_per_second), color="#444444", linewidth=1.3
    )
    right.axvline(roof.ridge, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    right.text(roof.ridge, 0.02, " ridge", transform=right.get_xaxis_transform(), fontsize=8, color=_GREY)
    for each, marker in zip(workloads, _MARKERS, strict=False):
        right.plot(each.intensity, each.flops / each.seconds, marker, markersize=8,
                   label=f"{each.name}: {time_text(each.seconds)}, {each.limit(roof)}")  # fmt: skip
    right.set(xscale="log", yscale="log")
    right.set_xlabel("FLOP per byte (counted)")
    right.set_ylabel("FLOP/s (measured)")
    right.set_title("one device: left of the ridge memory is the limit", loc="left", fontsize=10)
    right.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path)
