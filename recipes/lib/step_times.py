"""How long a training step takes by several techniques on the same work: timed, as a table and as a picture.

A step is here forward pass, backward pass and what the ranks exchange for them. The optimizer is left out: it is
the same for all.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from recipes.lib.bandwidth_plots import COLOURS, INK, LIGHT, new_figure
from recipes.lib.distributed import sum_over_ranks
from recipes.lib.measurements import Measurements
from recipes.lib.model import IGNORE
from recipes.lib.parallelism import attention_backends
from recipes.lib.tables import size_text, table, time_text
from recipes.lib.timing import Timing, measure, most
from recipes.lib.training import Plan, Technique, microbatches


@dataclass(frozen=True)
class Contestant:
    """One technique in a comparison."""

    name: str
    plan: Plan
    """The same work in all of them, though not the same layout."""
    build: Callable[[Plan], Technique]


@dataclass(frozen=True)
class StepTime:
    """What one contestant was measured at."""

    name: str
    timing: Timing
    parameter_bytes: int
    """Held by the rank that holds most."""
    peak_bytes: int
    """Of a GPU's memory, on the rank that needs most; 0 on a CPU."""


def compare(contestants: Sequence[Contestant], *, trials: int, budget: float) -> list[StepTime]:
    """Time a step of every contestant, one after the other; rank 0 prints the table and draws `steps.png`.

    What the others take is shown beside the first one's time. All ranks call this together.
    """
    plan = contestants[0].plan
    args, world = plan.args, plan.world
    found = []
    with Measurements(plan.recipe, world, len(contestants), plan.run_directory) as results:
        for contestant in contestants:
            found.append(_timed(contestant, trials, budget))
            line, timing = found[-1], found[-1].timing
            results.add(
                f"{line.name}: {time_text(timing.seconds)}", name=line.name, spread=timing.spread,
                parameter_bytes=line.parameter_bytes, peak_bytes=line.peak_bytes, **timing.figures(),
            )  # fmt: skip
        if world.is_first:
            work = (
                f"{args.model}, {args.batch_size} sequences of {args.sequence_length} tokens in a step, "
                f"{str(plan.precision.compute).removeprefix('torch.')}, on {world.size} ranks"
            )
            results.show(f"\nforward and backward pass of {work}")
            results.show(_rows(found))
            draw(
                results.picture("steps.png"), f"{plan.recipe}: time of a step",
                f"{work}; {results.hardware}\nmedian of {trials} trials, the line is fastest to slowest", found,
            )  # fmt: skip
    return found


def _timed(contestant: Contestant, trials: int, budget: float) -> StepTime:
    plan = contestant.plan
    device = plan.world.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    technique = contestant.build(plan)
    timing = _time_of_steps(technique, plan, trials, budget)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    held = parameter_bytes(technique.model)
    # A model and its hooks refer to each other, and a GPU has no room for the next one until they are gone.
    del technique
    gc.collect()
    return StepTime(contestant.name, timing, int(most(held)), int(most(peak)))


def _time_of_steps(technique: Technique, plan: Plan, trials: int, budget: float) -> Timing:
    batches = microbatches(plan, 1)
    counted = torch.stack([(targets != IGNORE).sum() for _, targets in batches]).sum()
    token_count = sum_over_ranks(counted, plan.layout.data_group)

    def step() -> None:
        technique.accumulate_gradients(batches, token_count)
        technique.optimizer.zero_grad()

    with attention_backends(plan.world.device):
        return measure(step, plan.world, trials=trials, budget=budget)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this rank holds; of a sharded one, its shard."""
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in model.parameters())


def _rows(found: Sequence[StepTime]) -> str:
    first = found[0].timing.seconds
    on_gpu = any(each.peak_bytes for each in found)
    head = [
        "",
        "step",
        "spread",
        "beside the first",
        "parameters of a rank",
        *(["peak memory"] if on_gpu else []),
    ]
    rows = [
        [
            each.name, time_text(each.timing.seconds), f"{each.timing.spread:.0%}",
            f"{each.timing.seconds / first - 1:+.0%}" if number else "",
            size_text(each.parameter_bytes), *([size_text(each.peak_bytes)] if on_gpu else []),
        ]
        for number, each in enumerate(found)
    ]  # fmt: skip
    return table(head, rows)


def draw(path: Path, title: str, subtitle: str, found: Sequence[StepTime]) -> None:
    """One bar per contestant, the first on top; a dashed line carries the first one's time down to the others."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(9.0, 1.7 + 0.5 * len(found), title, subtitle)
    axes = figure.subplots()
    seconds = [each.timing.seconds for each in found]
    reaches = [
        [each.timing.seconds - min(each.timing.trials) for each in found],
        [max(each.timing.trials) - each.timing.seconds for each in found],
    ]
    places = range(len(found))
    colours = [LIGHT if number == 0 else COLOURS[0] for number in places]
    axes.barh(
        places, seconds, xerr=reaches, color=colours, height=0.62, error_kw={"ecolor": INK, "elinewidth": 1.2}
    )
    axes.axvline(seconds[0], color=INK, linewidth=1.0, linestyle=(0, (5, 3)))
    for place, each in zip(places, found, strict=True):
        axes.annotate(
            time_text(each.timing.seconds), (max(each.timing.trials), place), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_yticks(places, [each.name for each in found])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(max(each.timing.trials) for each in found))
    axes.set_xlabel("forward and backward pass of a step")
    axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
    axes.grid(axis="x", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)
