"""What the experts of a mixture got to do: a line per step in experts.jsonl, and at the end a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recipes.lib.bandwidth_plots import COLOURS, GREY, INK, LIGHT, new_figure
from recipes.lib.distributed import World, attempt, sum_over_ranks
from recipes.lib.lines import Lines
from recipes.lib.metrics import say
from recipes.lib.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOAD_FILE, PICTURE = "experts.jsonl", "experts.png"
_COLUMNS = 8
"""Experts that a table has room for, each in a column."""
_Numbers = npt.NDArray[np.float64]


class Routed(Protocol):
    """A layer's router, after a microbatch."""

    wanted: Tensor
    """Of each expert: tokens that chose it."""
    taken: Tensor
    """Those of them that it had room for."""


class Load:
    """Counts over the microbatches of a step, of all ranks. Rank 0 writes."""

    def __init__(self, run_directory: Path, world: World, layers: int, experts: int) -> None:
        self.step = 0
        """Steps that the run has done."""
        self._folder, self._world = run_directory, world
        self._file: Lines | None = None
        self._sums_LN = torch.zeros(layers, 1 + 2 * experts, dtype=torch.float64, device=world.device)

    def add(self, balance_L: Tensor, layers: Sequence[Routed]) -> None:
        """A microbatch: its part of each layer's mean balance, and its tokens."""
        counts = [torch.cat([layer.wanted, layer.taken]) for layer in layers]
        self._sums_LN += torch.cat([balance_L.double()[:, None], torch.stack(counts).double()], dim=1)

    def end_step(self) -> None:
        """Write the line of this step; all ranks call this together."""
        self.step += 1
        sums_LN = sum_over_ranks(self._sums_LN)
        if self._world.is_first:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = Lines(self._folder / LOAD_FILE)
            wanted, taken = sums_LN[:, 1:].long().chunk(2, dim=1)
            # Read from the device here, at no cost: DeepSpeed's layers wait for their counts anyway.
            counts = {"wanted": wanted.tolist(), "taken": taken.tolist()}
            balance = sums_LN[:, 0].tolist()
            self._file.append({"step": self.step, "attempt": attempt(), "balance": balance, **counts})
        self._sums_LN = torch.zeros_like(self._sums_LN)


@dataclass(frozen=True)
class History:
    """What experts.jsonl says. T steps, L layers, E experts."""

    steps_T: npt.NDArray[np.int64]
    balance_TL: _Numbers
    wanted_TLE: _Numbers
    taken_TLE: _Numbers

    @property
    def last(self) -> int:
        """The steps at the end that are summed up: a quarter of all, at least one."""
        return max(1, len(self.steps_T) // 4)

    @property
    def when(self) -> str:
        """These steps, in words."""
        return f"step {self.steps_T[-1]}" if self.last == 1 else f"the last {self.last} steps"

    @property
    def fullness_LE(self) -> _Numbers:
        """What chose each expert at the end, as a multiple of its even share."""
        wanted_LE = self.wanted_TLE[-self.last :].sum(axis=0)
        fullness_LE: _Numbers = wanted_LE / wanted_LE.mean(axis=1, keepdims=True)
        return fullness_LE

    @property
    def dropped_TL(self) -> _Numbers:
        """The part of what chose an expert that found no room."""
        dropped_TL: _Numbers = 1 - self.taken_TLE.sum(axis=2) / self.wanted_TLE.sum(axis=2)
        return dropped_TL


def read_history(file: Path) -> History:
    """Of a step that two attempts ran, the later line."""
    lines: dict[int, dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines[line["step"]] = line
    steps = sorted(lines)
    found = {
        key: np.array([lines[step][key] for step in steps], float) for key in ("balance", "wanted", "taken")
    }
    return History(np.array(steps), found["balance"], found["wanted"], found["taken"])


def load_table(history: History) -> str:
    """A row per layer: its fullest and emptiest expert, what was dropped, and how even it was."""
    fullness_LE, last = history.fullness_LE, history.last
    experts = fullness_LE.shape[1]
    names = [f"expert {number}" for number in range(experts)] if experts <= _COLUMNS else []
    rows = []
    for layer, fullness_E in enumerate(fullness_LE):
        shares = [f"{share / experts:.1%}" for share in fullness_E] if names else []
        ends = [f"{max(fullness_E):.2f} x", f"{min(fullness_E):.2f} x"]
        dropped = f"{history.dropped_TL[-last:, layer].mean():.1%}"
        rows.append([layer, *shares, *ends, dropped, f"{history.balance_TL[-last:, layer].mean():.3f}"])
    head = ["layer", *names, "fullest", "emptiest", "dropped", "balance"]
    note = f"of {history.when}; even would be {1 / experts:.1%} for each expert (1 x), and a balance of 1"
    return f"{table(head, rows)}\n{note}"


def load_png(path: Path, title: str, subtitle: str, history: History) -> None:
    """On the left who got how much at the end, on the right how evenness and drops went step by step."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    layers = len(history.fullness_LE)
    figure = new_figure(11.0, 2.6 + 0.32 * max(6, min(layers, 16)), title, subtitle)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    _draw_shares(left.subplots(), history)
    above, below = right.subplots(2, 1, sharex=True)
    fullest_T = (history.wanted_TLE.max(axis=2) / history.wanted_TLE.mean(axis=2)).mean(axis=1)
    for axes, values_T, label, colour in (
        (above, fullest_T, "fullest expert, in even shares", COLOURS[1]),
        (below, history.dropped_TL.mean(axis=1), "dropped", COLOURS[0]),
    ):
        marker = "o" if len(values_T) <= 20 else ""
        axes.plot(history.steps_T, values_T, color=colour, linewidth=1.6, marker=marker, markersize=3)
        axes.set_title(f"{label}, mean of the layers", loc="left", fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    above.axhline(1, color=GREY, linewidth=1, linestyle="--")
    above.set_ylim(0.9, max(2.0, 1.1 * float(fullest_T.max())))
    below.set_ylim(0, max(0.05, 1.2 * float(history.dropped_TL.mean(axis=1).max())))
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.set_xlim(history.steps_T[0] - 0.5, history.steps_T[-1] + 0.5)
    below.set_xlabel("optimizer step")
    figure.savefig(path)


def _draw_shares(axes: Axes, history: History) -> None:
    """A cell per layer and expert: white where the share is even, red above, blue below."""
    fullness_LE = history.fullness_LE
    layers, experts = fullness_LE.shape
    # One scale in every picture, so that two runs beside each other can be compared.
    image = axes.imshow(fullness_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    title = f"tokens per expert, in even shares ({history.when})"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    if experts <= 16:
        axes.set_xticks(range(experts))
    if layers <= 16:
        axes.set_yticks(range(layers))
    if layers * experts <= 256:
        for layer in range(layers):
            for expert in range(experts):
                value = fullness_LE[layer, expert]
                colour = "white" if abs(value - 1) > 0.7 else INK
                axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    else:
        axes.figure.colorbar(image, ax=axes, shrink=0.85)


def show_load(folder: Path, world: World, subtitle: str) -> None:
    """Rank 0 prints the table and draws the picture, of all attempts of the run."""
    if not world.is_first:
        return
    history = read_history(folder / LOAD_FILE)
    say(load_table(history))
    load_png(folder / PICTURE, "What each expert got", subtitle, history)
    say(f"picture {folder / PICTURE}")
