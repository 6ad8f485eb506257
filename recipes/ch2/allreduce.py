r"""Collectives by size, algorithm and topology, with nccl-tests' definitions of bandwidth.

    torchrun --nproc-per-node 2 -m recipes.ch2.allreduce largest=4M
    torchrun --nproc-per-node 8 -m recipes.ch2.allreduce smallest=8 largest=8G factor=2 algorithms=auto,ring,tree,nvls

Each measurement is checked before it is timed, by numbers that tell who sent them; a figure above what the links can
carry is refused. See `recipes.lib.collectives` for what S, algorithm and bus bandwidth are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from recipes.ch2.allreduce_args import AllReduceArgs
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.bandwidth_plots import Curve, Level, bandwidth_and_time_png
from recipes.lib.by_hand import like_torch
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
from recipes.lib.limits import Limit, limit_between, links_of_all, refuse_impossible
from recipes.lib.measurements import Measurements, several
from recipes.lib.schedules import ring_all_reduce, tree_all_reduce
from recipes.lib.tables import size_text, table, time_text
from recipes.lib.timing import Timing, measure
from recipes.lib.training import recipe_main
from recipes.lib.transports import logged_call, nccl_log, read_nccl_log, ways_of_all

BY_HAND = {"ring": ring_all_reduce, "tree": tree_all_reduce}
ADDED_UP_BY_RANKS = ("ring", "tree")
"""Algorithms in which every number crosses a rank's link nearly twice; with the others the switch may add up."""


@dataclass(frozen=True)
class Case:
    """One curve: a collective, by an algorithm, between the ranks of a group."""

    collective: str
    algorithm: str
    scope: str
    place: Place
    limit: Limit | None

    @property
    def label(self) -> str:
        """Without what is usual."""
        algorithm = f", {self.algorithm}" if self.algorithm != "auto" else ""
        scope = f", {self.scope}" if self.scope != "world" else ""
        return f"{self.collective}{algorithm}{scope}"


def cases(args: AllReduceArgs, world: World) -> Iterator[Case]:
    """Every case with a group of its own: NCCL chooses its algorithms when a group is made."""
    links = links_of_all(world)
    for scope in args.scopes:
        for algorithm in args.algorithms:
            wanted = [name for name in args.collectives if algorithm == "auto" or name == "all_reduce"]
            groups = _groups(scope, world)
            with _nccl_algorithm(algorithm if world.device.type == "cuda" else "auto"):
                made = [(ranks, dist.new_group(ranks)) for ranks in groups]
                ranks, group = next(each for each in made if world.rank in each[0])
                if len(ranks) < 2:
                    raise ArgumentError("scopes", scope, "wants groups of two or more ranks; start more")
                place = Place.of(world, group)
                # The first call makes the communicator, while the variable is set.
                verify(COLLECTIVES["all_reduce"], place, len(ranks))
            limit = limit_between([links[rank] for rank in ranks])
            for name in wanted:
                yield Case(name, algorithm, scope, place, limit)


def _groups(scope: str, world: World) -> list[list[int]]:
    nodes = [list(range(first, first + world.local_size)) for first in range(0, world.size, world.local_size)]
    if scope == "world":
        return [list(range(world.size))]
    return nodes if scope == "node" else [list(ranks) for ranks in zip(*nodes, strict=True)]


def measured(case: Case, size: int, world: World, args: AllReduceArgs) -> tuple[int, Timing]:
    """Bytes and time of one size. Raises WrongResult where the result is wrong, Impossible where the figure is."""
    collective, place = COLLECTIVES[case.collective], case.place
    by_hand = world.device.type == "cpu" and case.algorithm in BY_HAND
    run = like_torch(BY_HAND[case.algorithm](place.size)) if by_hand else collective.run
    elements = rounded_elements(size, place.size)
    wrong = verify(collective, place, elements, run=run)
    if wrong:
        raise WrongResult(f"{case.label} of {size_text(size)}: {blamed(wrong)}")
    given = collective.given(place, elements)
    out = collective.empty(place, elements, given)
    timing = measure(lambda: run(place, given, out), world, trials=args.trials, budget=args.budget)
    size = elements * ELEMENT_BYTES
    _, bus = bandwidths(case.collective, size, timing.seconds, place.size)
    in_network = world.device.type == "cuda" and case.algorithm not in ADDED_UP_BY_RANKS
    refuse_impossible(case.collective, size, bus, case.limit, in_network=in_network)
    return size, timing


@recipe_main
def main() -> None:
    """Measure every case over all sizes; rank 0 prints, writes and draws."""
    args = parse_or_exit(AllReduceArgs)
    with nccl_log(choices=args.log_choices) as log, joined(args.device) as world:
        several(world)
        if world.device.type == "cpu" and not {"auto", *BY_HAND}.issuperset(args.algorithms):
            raise ArgumentError("algorithms", args.algorithms, f"wants auto, {', '.join(BY_HAND)} on gloo")
        found = list(cases(args, world))
        curves: dict[str, list[dict[str, Any]]] = {case.label: [] for case in found}
        with Measurements("ch2_allreduce", world, len(found) * len(args.sizes)) as results:
            for case in found:
                for size in args.sizes:
                    size, timing = measured(case, size, world, args)
                    algorithm, bus = bandwidths(case.collective, size, timing.seconds, case.place.size)
                    choices = read_nccl_log(log).choices if args.log_choices else {}
                    line: dict[str, Any] = {
                        "collective": case.collective, "algorithm": case.algorithm, "scope": case.scope,
                        "ranks": case.place.size, "size": size, "algbw_gb_s": algorithm, "busbw_gb_s": bus,
                        "correct": True, **timing.figures(),
                        "chosen": choices.get(logged_call(case.collective, size, case.place.size), ""),
                    }  # fmt: skip
                    results.add(f"{case.label} {size_text(size)}: {bus:.3g} GB/s bus bandwidth", **line)
                    curves[case.label].append({**line, "spread": timing.spread})
            ways = ways_of_all(world, log)
            results.note(kind="transport", **ways)
            if world.is_first:
                for label, lines in curves.items():
                    results.show(f"\n{label}, {lines[0]['ranks']} ranks, {ways['library']}")
                    results.show(_table(lines))
                _draw(results, curves, found, ways["library"], world)


def _table(lines: list[dict[str, Any]]) -> str:
    chosen = any(each["chosen"] for each in lines)
    rows = [
        [
            *(size_text(each["size"]), time_text(each["seconds"]), f"{each['spread']:.0%}"),
            *(f"{each['algbw_gb_s']:.3f}", f"{each['busbw_gb_s']:.3f}"),
            *([each["chosen"]] if chosen else []),
        ]
        for each in lines
    ]
    return table(
        ["size", "time", "spread", "algbw GB/s", "busbw GB/s", *(["chosen"] if chosen else [])], rows
    )


def _draw(
    results: Measurements,
    curves: dict[str, list[dict[str, Any]]],
    found: list[Case],
    library: str,
    world: World,
) -> None:
    bandwidth, seconds = [], []
    for label, lines in curves.items():
        sizes = [line["size"] for line in lines]
        times = [[line[key] for line in lines] for key in ("seconds", "seconds_min", "seconds_max")]
        bus = [[line["busbw_gb_s"] * line["seconds"] / line[key] for line in lines]
               for key in ("seconds", "seconds_max", "seconds_min")]  # fmt: skip
        seconds.append(Curve(label, sizes, *times))
        bandwidth.append(Curve(label, sizes, *bus))
    limits = {case.limit for case in found if case.limit is not None}
    bandwidth_and_time_png(
        results.picture("allreduce.png"),
        f"Collectives by size on {world.size} ranks",
        f"{library}; {results.hardware}; median of the trials, the band is fastest to slowest",
        bandwidth,
        seconds,
        bandwidth_label="bus bandwidth [GB/s]",
        levels=[Level(limit.what, limit.gigabytes) for limit in limits],
    )


@contextlib.contextmanager
def _nccl_algorithm(algorithm: str) -> Iterator[None]:
    """NCCL_ALGO for groups whose first call is in here; "auto" leaves it to NCCL, or to the user's own variable."""
    before = os.environ.get("NCCL_ALGO")
    if algorithm != "auto":
        os.environ["NCCL_ALGO"] = f"allreduce:{algorithm}"
    yield
    if before is not None:
        os.environ["NCCL_ALGO"] = before
    elif algorithm != "auto":
        del os.environ["NCCL_ALGO"]


if __name__ == "__main__":
    main()
