"""What is said of a pipeline after its run: the bubble, predicted and measured, in words, numbers and a picture."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.lib.distributed import World
from recipes.lib.metrics import say
from recipes.lib.pipeline_clock import Clock, typical
from recipes.lib.pipeline_orders import SCHEDULES, Action, Order, Span, best_case, bubble
from recipes.lib.pipeline_pictures import Panel, draw_pipeline

REPORT_FILE, PICTURES = "pipeline.json", ("pipeline.png", "pipeline.svg")


@dataclass(frozen=True)
class Bubbles:
    """Parts of all ranks' time in which they do nothing."""

    formula: float
    ideal: float
    """Of the schedule itself, where all stages are equal and messages take no time."""
    own_durations: float
    """The same with what each action took in this run: how much of the bubble is unequal stages."""
    measured: float
    """What is more than the line before is messages, and waiting for them."""


def show_pipeline(clock: Clock, order: Order, schedule: str, directory: Path, world: World) -> None:
    """Print the bubbles, and leave pipeline.png, pipeline.svg and pipeline.json; all ranks call this together."""
    runs = clock.runs()
    if not world.is_first:
        return
    if not runs:
        say("no step was trained in this attempt: there is nothing to draw")
        return
    run = typical(runs)
    per_rank = len({action.stage for action in order[0]})
    microbatches = 1 + max(action.microbatch for action in order[0])
    style = SCHEDULES[schedule]
    found = bubbles(order, run, style.predicted.of(len(order), microbatches, per_rank))
    shape = (
        f"{len(order)} ranks, {per_rank} stage{'s' if per_rank > 1 else ''} each, {microbatches} microbatches"
    )
    say(f"{schedule}: {shape}")
    say(f"bubble by formula    {found.formula:6.1%}  {style.predicted.formula}; {style.predicted.source}")
    say(f"bubble of the order  {found.ideal:6.1%}  all stages equal, messages at once")
    say(f"the same, own times  {found.own_durations:6.1%}  with what each action took in this run")
    say(
        f"bubble measured      {found.measured:6.1%}  in the median of the last {len(runs)} runs of the schedule"
    )
    prediction = f"by formula {found.formula:.1%}, {style.predicted.formula} ({style.predicted.source})"
    ideal = Panel(
        f"ideal: bubble {found.ideal:.1%}; {prediction}",
        renumbered(best_case(order), run),
        "forward passes of one stage",
    )
    in_ms = [dataclasses.replace(span, begin=span.begin * 1e3, end=span.end * 1e3) for span in run]
    parts = f"{found.own_durations:.1%} with these times and messages that take none"
    measured = Panel(f"measured: bubble {found.measured:.1%}; {parts}", in_ms, "ms")
    paths = [directory / name for name in PICTURES]
    draw_pipeline(paths, f"{schedule}: {shape}", [ideal, measured])
    report = {
        "schedule": schedule,
        "microbatches": microbatches,
        "stages_per_rank": per_rank,
        "ranks": len(order),
    }
    spans = [[span.rank, str(span.action), span.begin, span.end] for span in run]
    report |= {"bubble": dataclasses.asdict(found), "spans": spans}
    (directory / REPORT_FILE).write_text(json.dumps(report) + "\n", encoding="utf-8")
    say(f"picture {paths[0]}")


def bubbles(order: Order, run: Sequence[Span], formula: float) -> Bubbles:
    """The bubble in four ways."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in run:
        times[span.action.kind, span.action.stage].append(span.end - span.begin)
    median = {what: statistics.median(each) for what, each in times.items()}

    def seconds_of(action: Action) -> float:
        return median[action.kind, action.stage]

    return Bubbles(
        formula=formula,
        ideal=bubble(best_case(order)),
        own_durations=bubble(best_case(order, seconds_of)),
        measured=bubble(run),
    )


def renumbered(spans: Sequence[Span], run: Sequence[Span]) -> list[Span]:
    """`spans` with the ranks of `run`: the ranks of one pipeline are not 0, 1, 2, ... where there are several."""
    ranks = sorted({span.rank for span in run})
    return [dataclasses.replace(span, rank=ranks[span.rank]) for span in spans]
