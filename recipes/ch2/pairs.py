"""Every pair of ranks, in both directions, as a heat map: what is near, what is far, and what is slower than it should.

    torchrun --nproc-per-node 3 -m recipes.ch2.pairs size=1M
    torchrun --nproc-per-node 8 -m recipes.ch2.pairs size=256M

A collective is as fast as its slowest link and does not say which that is. Messages between two ranks do.
"""

from __future__ import annotations

import itertools

from recipes.ch2.pairs_args import PairsArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.bandwidth_plots import heat_map_png
from recipes.lib.collectives import ELEMENT_BYTES, WrongResult, blamed, rounded_elements
from recipes.lib.distributed import joined
from recipes.lib.limits import limit_between, links_of_all, refuse_impossible
from recipes.lib.measurements import Measurements, several
from recipes.lib.pairs import Pair, measure_pairs, rounds_of_pairs, slow_ways
from recipes.lib.tables import size_text, table
from recipes.lib.timing import Timing
from recipes.lib.training import recipe_main
from recipes.lib.transports import nccl_log, ways_of_all


@recipe_main
def main() -> None:
    """Measure all pairs; rank 0 prints and draws the matrix."""
    args = parse_or_exit(PairsArgs)
    elements = rounded_elements(args.bytes, 1)
    size = elements * ELEMENT_BYTES
    with nccl_log() as log, joined(args.device) as world:
        several(world)
        links = links_of_all(world)
        turns = schedule(world.size, alone=args.schedule == "alone")
        timings: dict[Pair, Timing] = {}

        def measured(pairs: list[Pair]) -> dict[Pair, Timing]:
            found, wrong = measure_pairs(pairs, world, elements, trials=args.trials, budget=args.budget)
            if wrong:
                raise WrongResult(blamed(wrong))
            return found

        with Measurements("ch2_pairs", world, len(turns)) as results:
            for pairs in turns:
                found = measured(pairs)
                for (sender, receiver), timing in found.items():
                    limit = limit_between([links[sender], links[receiver]])
                    rate = size / timing.seconds / 1e9
                    refuse_impossible("send_recv", size, rate, limit, in_network=False)
                timings |= found
                figures = [
                    {"from": a, "to": b, "gb_s": size / timing.seconds / 1e9, **timing.figures()}
                    for (a, b), timing in found.items()
                ]
                first = figures[0]
                what = f"{first['from']} to {first['to']}: {first['gb_s']:.3g} GB/s"
                results.add(what, size=size, pairs=figures)
            ways = ways_of_all(world, log)
            nodes = results.node_of_rank
            slow = slow_ways(timings, nodes, measured)
            results.note(kind="transport", **ways)
            results.note(kind="verdict", slow=slow)
            if world.is_first:
                rates = [
                    [
                        size / timings[row, column].seconds / 1e9 if row != column else None
                        for column in range(world.size)
                    ]
                    for row in range(world.size)
                ]
                names = [f"{rank} ({node})" for rank, node in enumerate(nodes)]
                results.show(f"GB/s from each rank (row) to each other, {size_text(size)}, {ways['library']}")
                cells = [["-" if rate is None else f"{rate:.3f}" for rate in row] for row in rates]
                results.show(
                    table(
                        ["", *map(str, range(world.size))],
                        [[n, *row] for n, row in zip(names, cells, strict=True)],
                    )
                )
                for line in slow or ["no rank and no way is slower than twice the usual"]:
                    results.show(line)
                at_once = (
                    "one message at a time" if args.schedule == "alone" else "all ranks in pairs at once"
                )
                heat_map_png(
                    results.picture("pairs.png"),
                    f"Every pair of {world.size} ranks, messages of {size_text(size)}",
                    f"{ways['library']}; {results.hardware}; {at_once}, median of {args.trials} trials",
                    rates,
                    names,
                    "GB/s in one direction",
                    borders=[rank for rank in range(1, world.size) if nodes[rank] != nodes[rank - 1]],
                )


def schedule(ranks: int, *, alone: bool) -> list[list[Pair]]:
    """Which pairs are measured together, turn by turn; each pair once in each direction. Pure."""
    if alone:
        return [[pair] for pair in itertools.permutations(range(ranks), 2)]
    rounds = rounds_of_pairs(ranks)
    return [turn for pairs in rounds for turn in (pairs, [(b, a) for a, b in pairs])]


if __name__ == "__main__":
    main()
