"""Collectives by hand, with nothing but send and receive: drawn round by round, checked, and timed against torch's.

    torchrun --nproc-per-node 3 -m recipes.ch2.patterns largest=1M
    torchrun --nproc-per-node 2 -m recipes.ch2.patterns patterns=ring_all_reduce,tree_all_reduce

Each pattern is a schedule (`recipes.lib.schedules`): plain data that says who sends which part to whom in which round.
The pictures are drawn from the same schedules that the ranks carry out. Watch the two all-reduces cross: the tree has
fewer rounds and wins for small arrays, the ring sends fewer bytes and wins for large ones.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from recipes.ch2.patterns_args import PatternsArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.bandwidth_plots import Curve, bandwidth_and_time_png
from recipes.lib.by_hand import carry_out, like_torch
from recipes.lib.collectives import (
    COLLECTIVES,
    ELEMENT_BYTES,
    Place,
    WrongResult,
    bandwidths,
    blamed,
    rounded_elements,
    verify,
)
from recipes.lib.distributed import World, joined
from recipes.lib.measurements import Measurements, several
from recipes.lib.pattern_pictures import draw_schedule
from recipes.lib.schedules import SCHEDULES, Schedule
from recipes.lib.tables import size_text, table, time_text
from recipes.lib.timing import measure, most, together
from recipes.lib.training import recipe_main
from recipes.lib.transports import nccl_log, ways_of_all


@recipe_main
def main() -> None:
    """Carry out every pattern over all sizes; rank 0 prints and draws."""
    args = parse_or_exit(PatternsArgs)
    with nccl_log() as log, joined(args.device) as world:
        several(world)
        place = Place.of(world)
        schedules = {name: SCHEDULES[name](world.size) for name in args.patterns}
        with Measurements("ch2_patterns", world, len(schedules) * len(args.sizes)) as results:
            lines: dict[str, list[dict[str, Any]]] = {}
            for name, schedule in schedules.items():
                lines[name] = [one_size(schedule, size, place, world, args, results) for size in args.sizes]
            rounds = {name: seconds_by_round(each, args, place, world) for name, each in schedules.items()}
            ways = ways_of_all(world, log)
            results.note(kind="transport", **ways)
            results.note(kind="rounds", seconds=rounds)
            if world.is_first:
                for name, schedule in schedules.items():
                    show(schedule, lines[name], results)
                    draw(name, rounds[name], args, world, results)
                draw_times(lines, schedules, ways["library"], results)


def one_size(
    schedule: Schedule, size: int, place: Place, world: World, args: PatternsArgs, results: Measurements
) -> dict[str, Any]:
    """Check the schedule's result, then time it and torch's own. Raises WrongResult."""
    collective, run = COLLECTIVES[schedule.collective], like_torch(schedule)
    elements = rounded_elements(size, place.size)
    wrong = verify(collective, place, elements, run=run)
    if wrong:
        raise WrongResult(f"{schedule.name} of {size_text(size)}: {blamed(wrong)}")
    given = collective.given(place, elements)
    out = collective.empty(place, elements, given)
    by_hand = measure(lambda: run(place, given, out), world, trials=args.trials, budget=args.budget)
    library = measure(
        lambda: collective.run(place, given, out), world, trials=args.trials, budget=args.budget
    )
    size = elements * ELEMENT_BYTES
    _, bus = bandwidths(schedule.collective, size, by_hand.seconds, place.size)
    _, library_bus = bandwidths(schedule.collective, size, library.seconds, place.size)
    line = {
        "pattern": schedule.name, "collective": schedule.collective, "ranks": place.size, "size": size,
        "rounds": len(schedule.rounds), "bytes_sent": schedule.bytes_sent(size), "correct": True,
        "busbw_gb_s": bus, **by_hand.figures(), "library": {"busbw_gb_s": library_bus, **library.figures()},
    }  # fmt: skip
    results.add(f"{schedule.name} {size_text(size)}: {time_text(by_hand.seconds)}", **line)
    return line


def seconds_by_round(schedule: Schedule, args: PatternsArgs, place: Place, world: World) -> list[float]:
    """How long each round of the largest size takes until all ranks have done it, in the median of the trials."""
    elements = rounded_elements(args.sizes[-1], place.size)
    array = torch.ones(elements, device=world.device)
    trials: list[list[float]] = []
    for _ in range(args.trials + 1):
        ends: list[float] = []

        def note(number: int, ends: list[float] = ends) -> None:
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            ends.append(time.perf_counter())

        together(world)
        began = time.perf_counter()
        carry_out(schedule, place, array, note)
        ends = [most(end - began) for end in ends]
        trials.append([after - before for before, after in zip([0.0, *ends], ends, strict=False)])
    kept = sorted(trials[1:], key=sum)  # the first one warms up
    return kept[len(kept) // 2]


def show(schedule: Schedule, lines: list[dict[str, Any]], results: Measurements) -> None:
    """The table of one pattern."""
    rounds = f"{len(schedule.rounds)} round{'s' if len(schedule.rounds) > 1 else ''}"
    part = "all of S" if schedule.parts == 1 else f"S/{schedule.parts}"
    results.show(
        f"\n{schedule.name}: {rounds}, {part} in a message; the same as torch's {schedule.collective}"
    )
    rows = [
        [
            *(size_text(line["size"]), size_text(line["bytes_sent"])),
            *(time_text(line["seconds"]), time_text(line["library"]["seconds"])),
            *(f"{line['busbw_gb_s']:.3f}", f"{line['library']['busbw_gb_s']:.3f}"),
        ]
        for line in lines
    ]
    head = ["size S", "a rank sends up to", "by hand", "torch", "by hand GB/s bus", "torch GB/s bus"]
    results.show(table(head, rows))


def draw(name: str, seconds: list[float], args: PatternsArgs, world: World, results: Measurements) -> None:
    """The picture of one pattern, with the times of its rounds where it has the run's number of ranks."""
    ranks = args.draw_ranks or (world.size if 3 <= world.size <= 8 else 4)
    times = [time_text(each) for each in seconds] if ranks == world.size else []
    size = size_text(rounded_elements(args.sizes[-1], world.size) * ELEMENT_BYTES)
    note = f"{results.hardware}; times of the rounds for S = {size}" if times else f"drawn for {ranks} ranks"
    draw_schedule(results.picture(f"pattern_{name}.png"), SCHEDULES[name](ranks), note, times)


def draw_times(
    lines: dict[str, list[dict[str, Any]]],
    schedules: dict[str, Schedule],
    library: str,
    results: Measurements,
) -> None:
    """All patterns over the sizes."""
    curves: tuple[list[Curve], list[Curve]] = ([], [])
    for name, each in lines.items():
        sizes = [line["size"] for line in each]
        times = [[line[key] for line in each] for key in ("seconds", "seconds_min", "seconds_max")]
        rates = [
            [line["busbw_gb_s"] * line["seconds"] / line[key] for line in each]
            for key in ("seconds", "seconds_max", "seconds_min")
        ]
        curves[0].append(Curve(schedules[name].name, sizes, *rates))
        curves[1].append(Curve(schedules[name].name, sizes, *times))
    ranks = next(iter(schedules.values())).ranks
    bandwidth_and_time_png(
        results.picture("patterns.png"),
        f"Collectives by hand on {ranks} ranks",
        f"send and receive of {library}; {results.hardware}; median of the trials, the band is fastest to slowest",
        *curves,
        bandwidth_label="bus bandwidth [GB/s]",
    )


if __name__ == "__main__":
    main()
