"""Pictures of what a step uses and what it waits for. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.lib.bandwidth_plots import COLOURS, GREY, LIGHT, new_figure


def rates_png(
    path: Path,
    subtitle: str,
    sweep: Sequence[Mapping[str, Any]],
    marks: Sequence[tuple[str, float]],
    peak: float | None,
) -> None:
    """TFLOP/s of square products over their side, and, as lines, what the step's parts reach by formula F."""
    figure = new_figure(8.5, 4.8, "Matrix products, and what training makes of them", subtitle)
    axes = figure.subplots()
    sides = [line["side"] for line in sweep]
    work = [2.0 * side**3 / 1e12 for side in sides]
    axes.fill_between(
        sides,
        [each / line["seconds_max"] for each, line in zip(work, sweep, strict=True)],
        [each / line["seconds_min"] for each, line in zip(work, sweep, strict=True)],
        color=COLOURS[0], alpha=0.15, linewidth=0,
    )  # fmt: skip
    rates = [line["flops"] / 1e12 for line in sweep]
    axes.plot(
        sides, rates, color=COLOURS[0], marker="o", markersize=4, linewidth=1.6, label="product of N x N"
    )
    for number, (name, rate) in enumerate(marks, start=1):
        axes.axhline(
            rate / 1e12, color=COLOURS[number], linewidth=1.3, label=f"{name} (F): {rate / 1e12:.3g}"
        )
    if peak is not None:
        axes.axhline(
            peak / 1e12,
            color=GREY,
            linewidth=1.0,
            linestyle=(0, (5, 3)),
            label=f"data sheet: {peak / 1e12:.0f}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("N")
    axes.set_ylabel("TFLOP/s of one device")
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def overhead_png(path: Path, subtitle: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Bars of a step by strategy and model: computation below, on top what communication adds, with its spread."""
    figure = new_figure(9.5, 4.8, "What communication adds to a step", subtitle)
    groups = list(dict.fromkeys(line["model"] for line in lines))
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        mine = [line for line in lines if line["model"] == group]
        names = [line["strategy"] for line in mine]
        alone = [1e3 * line["compute_seconds"] for line in mine]
        added = [1e3 * line["added_seconds"] for line in mine]
        whole = [1e3 * line["seconds"] for line in mine]
        below = [1e3 * (line["seconds"] - line["seconds_min"]) for line in mine]
        above = [1e3 * (line["seconds_max"] - line["seconds"]) for line in mine]
        places = range(len(mine))
        axes.bar(places, alone, color=COLOURS[0], width=0.6, label="the same without communication")
        # Where both are the same within their spread the difference may be negative: nothing is drawn then.
        tops = [max(each, 0.0) for each in added]
        axes.bar(places, tops, bottom=alone, color=COLOURS[1], width=0.6, label="added by communication")
        axes.errorbar(
            places, whole, yerr=[below, above], fmt="none", ecolor="#222222", capsize=4, linewidth=1.2
        )
        for place, line in zip(places, mine, strict=True):
            text = f"{line['added_seconds'] / line['seconds']:.0%}"
            axes.annotate(
                text,
                (place, 1e3 * line["seconds_max"]),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
            )
        axes.set_xticks(places, names, fontsize=8)
        axes.set_title(group, fontsize=10, loc="left")
        axes.set_ylim(0, 1.18 * 1e3 * max(line["seconds_max"] for line in mine))
        axes.grid(axis="y", color=LIGHT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("step [ms], by the slowest rank")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
