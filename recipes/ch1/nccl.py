"""The communication test: do all ranks reach each other, by which way, rightly, how fast, and who holds them up?

    torchrun --nproc-per-node 2 -m recipes.ch1.nccl
    torchrun --nproc-per-node 2 -m recipes.ch1.nccl slow_rank=1
    torchrun --nproc-per-node 2 -m recipes.ch1.nccl spoilt_rank=1

The two last ones pretend, so that one sees what the test says of a slow and of a broken rank. Of a broken one it ends
with an error; a slow one is named and no more, because what counts as slow depends on what comes after.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from recipes.ch1.nccl_args import NcclArgs
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.collectives import (
    COLLECTIVES,
    ELEMENT_BYTES,
    Collective,
    Place,
    Wrong,
    WrongResult,
    bandwidths,
    blamed,
    merged,
    rounded_elements,
    verify,
)
from recipes.lib.distributed import World, joined
from recipes.lib.late_ranks import late_rank, waits
from recipes.lib.limits import limit_between, links_of_all, refuse_impossible
from recipes.lib.measurements import Measurements, several
from recipes.lib.pairs import Pair, measure_pairs, rounds_of_pairs, slow_ways
from recipes.lib.tables import size_text, table, time_text
from recipes.lib.timing import Timing, measure
from recipes.lib.training import recipe_main
from recipes.lib.transports import kind_of_way, nccl_log, ways_of_all


@recipe_main
def main() -> None:
    """Run the test; rank 0 prints what it found."""
    args = parse_or_exit(NcclArgs)
    with nccl_log(choices=True) as log, joined(args.device) as world:
        several(world)
        for key in ("spoilt_rank", "slow_rank"):
            if getattr(args, key) >= world.size:
                raise ArgumentError(key, getattr(args, key), f"there are ranks 0 to {world.size - 1}")
        rounds = rounds_of_pairs(world.size)[: args.partners]
        with Measurements("ch1_nccl", world, len(COLLECTIVES) + 1 + 2 * len(rounds)) as results:
            wrong = check_collectives(args, world, results)
            slow, wrong_pairs = check_pairs(rounds, args, world, results)
            late = check_lateness(args, world, results)
            ways = ways_of_all(world, log)
            results.note(kind="transport", **ways)
            show_ways(ways, results)
            broken = verdict({**wrong, "pairs": wrong_pairs}, results.node_of_rank)
            results.note(kind="verdict", broken=broken, late=late, slow=slow)
            for line in (*late, *slow):
                results.show(f"slow: {line}")
            if broken:
                results.show(f"broken: {broken}")
            if not (broken or late or slow):
                results.show(
                    f"all {world.size} ranks reach each other, every result is right, none holds the others up"
                )
    if broken:
        raise WrongResult(broken)


def check_collectives(args: NcclArgs, world: World, results: Measurements) -> dict[str, list[Wrong]]:
    """Every collective: right or wrong, its latency and its bandwidth; gives what is wrong, by collective."""
    place, rows, found = Place.of(world), [], dict[str, list[Wrong]]()
    limit = limit_between(links_of_all(world))
    for name, collective in COLLECTIVES.items():
        size = rounded_elements(args.large_bytes, place.size)
        wrong = verify(collective, place, size, spoilt=args.spoilt_rank)
        found[name] = wrong
        if wrong:  # its time would mean nothing
            results.add(f"{name}: {blamed(wrong)}", collective=name, correct=False, verdict=blamed(wrong))
            rows.append([name, "WRONG", "", "", ""])
            continue
        line: dict[str, Any] = {"collective": name, "correct": True}
        latency = timed(collective, rounded_elements(args.small_bytes, place.size), place, world, args)
        whole = timed(collective, size, place, world, args)
        _, bus = bandwidths(name, size * ELEMENT_BYTES, whole["seconds"], place.size)
        refuse_impossible(name, size * ELEMENT_BYTES, bus, limit, in_network=world.device.type == "cuda")
        line |= {"small": latency, "large": whole, "busbw_gb_s": bus}
        results.add(f"{name}: {time_text(latency['seconds'])}, {bus:.3g} GB/s", **line)
        rows.append([name, "right", *(time_text(each["seconds"]) for each in (latency, whole)), f"{bus:.3f}"])
    both = (rounded_elements(each, place.size) for each in (args.small_bytes, args.large_bytes))
    sizes = (f"{size_text(elements * ELEMENT_BYTES)} takes" for elements in both)
    results.show(table(["collective", "result", *sizes, "busbw GB/s"], rows))
    return found


def timed(
    collective: Collective, elements: int, place: Place, world: World, args: NcclArgs
) -> dict[str, Any]:
    """The time of one size, as figures for the results."""
    given = collective.given(place, elements)
    out = collective.empty(place, elements, given)
    timing = measure(lambda: collective.run(place, given, out), world, trials=args.trials, budget=args.budget)
    return {"size": elements * ELEMENT_BYTES, **timing.figures()}


def check_pairs(
    rounds: list[list[tuple[int, int]]], args: NcclArgs, world: World, results: Measurements
) -> tuple[list[str], list[Wrong]]:
    """A few partners for each rank, one after the other, in both directions: who is slow, what arrives wrong."""
    elements = rounded_elements(args.large_bytes, 1)
    every: dict[Pair, Timing] = {}
    wrong: list[Wrong] = []

    def measured(pairs: list[Pair]) -> dict[Pair, Timing]:
        timings, found = measure_pairs(
            pairs, world, elements, trials=args.trials, budget=args.budget, spoilt=args.spoilt_rank
        )
        wrong.extend(found)
        return timings

    for pairs in rounds:
        for directed in (pairs, [(receiver, sender) for sender, receiver in pairs]):
            timings = measured(directed)
            every |= timings
            figures = [{"from": a, "to": b, **timing.figures()} for (a, b), timing in timings.items()]
            names = ", ".join(f"{sender} to {receiver}" for sender, receiver in directed[:4])
            results.add(f"pairs {names}", size=elements * ELEMENT_BYTES, pairs=figures)
    return slow_ways(every, results.node_of_rank, measured), wrong


def check_lateness(args: NcclArgs, world: World, results: Measurements) -> list[str]:
    """The rank that all others wait for, if there is one."""
    waited = waits(world, slowed=args.slow_rank)
    late = late_rank(waited)
    results.add("who comes last", waited_seconds=waited, late=late.rank if late else None)
    if late is None:
        return []
    return [
        f"rank {late.rank} ({results.node_of_rank[late.rank]}): the others wait {time_text(late.seconds)} for it, "
        f"in {late.share:.0%} of the rounds"
    ]


def verdict(wrong: dict[str, list[Wrong]], node_of_rank: list[str]) -> str:
    """Who is to blame, where that is (a person drains a node, not a rank), and what showed it; empty for nobody."""
    every = merged([each for found in wrong.values() for each in found])
    if not every:
        return ""
    senders = sorted({sender for each in every for sender in each.senders})
    places = ", ".join(f"rank {sender} is on {node_of_rank[sender]}" for sender in senders)
    seen = ", ".join(name for name, found in wrong.items() if found)
    return f"{blamed(every)}{f' ({places})' if places else ''}; seen in {seen}"


def show_ways(ways: dict[str, Any], results: Measurements) -> None:
    """The library, the network, and how many pairs of ranks go which way."""
    results.show(f"\nlibrary   {ways['library']}{', plugin ' + ways['plugin'] if ways.get('plugin') else ''}")
    if ways.get("network"):
        results.show(f"network   {ways['network']}")
    devices = Counter(ways["devices_by_rank"])
    for device, count in devices.items():
        results.show(f"devices   {device or 'none'}, {count} rank{'s' if count > 1 else ''}")
    for way, count in Counter(kind_of_way(each["way"]) for each in ways["ways"]).items():
        example = next(each for each in ways["ways"] if kind_of_way(each["way"]) == way)
        results.show(
            f"way       {way}: {count} of the connections, such as rank {example['from']} to {example['to']} "
            f"via {example['way']}"
        )
    for each in ways["choices"]:
        results.show(f"chosen    {each['operation']} of {size_text(each['bytes'])}: {each['choice']}")
    results.show("")


if __name__ == "__main__":
    main()
