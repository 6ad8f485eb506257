"""Every pair of ranks: who talks to whom when, how fast, and which rank or way is slower than the rest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from recipes.lib.collectives import Wrong, numbers
from recipes.lib.distributed import World
from recipes.lib.timing import Timing, measure_each, slowest

Pair = tuple[int, int]
"""(sender, receiver)."""

SLOW_FACTOR = 2.0
"""A pair is slow that needs so many times longer than is usual."""

MOST_SUSPECTS = 24
"""Pairs that are measured a second time, at most: where more are slow, it is no matter of a single cable."""

Measure = Callable[[list[Pair]], dict[Pair, Timing]]
"""Times of messages of these pairs at once; all ranks call it together."""


def rounds_of_pairs(ranks: int) -> list[list[Pair]]:
    """Rounds in which everybody has one partner; after all of them each pair was there once, in one direction.

    The circle method of tournaments: one stays, the others move on by one seat. With an odd number one rests. Pure.
    """
    seats = [*range(ranks), *([-1] if ranks % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append(sorted((min(pair), max(pair)) for pair in opposite if -1 not in pair))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure_pairs(
    pairs: Sequence[Pair], world: World, elements: int, *, trials: int, budget: float, spoilt: int = -1
) -> tuple[dict[Pair, Timing], list[Wrong]]:
    """Times of messages of `elements` numbers on all these pairs at once, and what arrived wrong.

    No rank is in two of them. All ranks call this together. Rank `spoilt` sends a wrong number, as a broken one would.
    """
    mine = next((pair for pair in pairs if world.rank in pair), None)
    sends = mine is not None and mine[0] == world.rank
    content = numbers(mine[0] if mine else 0, elements, world.device)
    expected = content.clone()
    if sends and world.rank == spoilt:
        content[elements // 2] += 1
    buffer = content if sends else torch.full_like(content, -1.0)

    def message() -> None:
        if mine is None:
            return
        operation = (
            dist.P2POp(dist.isend, buffer, mine[1]) if sends else dist.P2POp(dist.irecv, buffer, mine[0])
        )
        for work in dist.batch_isend_irecv([operation]):
            work.wait()

    message()
    wrong = mine is not None and not sends and not torch.equal(buffer, expected)
    found = [False] * world.size
    dist.all_gather_object(found, wrong, group=world.patient)
    timings = measure_each(message, world, trials=trials, budget=budget)
    return (
        {pair: slowest([timings[pair[0]], timings[pair[1]]]) for pair in pairs},
        [Wrong(receiver, (sender,)) for sender, receiver in pairs if found[receiver]],
    )


def slow_pairs(seconds: Mapping[Pair, float], node_of_rank: Sequence[str]) -> dict[Pair, float]:
    """The pairs that need SLOW_FACTOR times longer than is usual, and how many times. Pure.

    Messages within a node are compared with each other, and messages between nodes with each other. Usual is what the
    fast quarter of them needs: where one rank of three is slow, the median is slow as well.
    """
    slow: dict[Pair, float] = {}
    for within in (True, False):
        pairs = [pair for pair in seconds if (node_of_rank[pair[0]] == node_of_rank[pair[1]]) is within]
        if len(pairs) < 2:
            continue
        usual = sorted(seconds[pair] for pair in pairs)[(len(pairs) - 1) // 4]
        slow |= {pair: seconds[pair] / usual for pair in pairs if seconds[pair] > SLOW_FACTOR * usual}
    return slow


def slow_ways(timings: Mapping[Pair, Timing], node_of_rank: Sequence[str], measure: Measure) -> list[str]:
    """What is slow, in words: `described`, after a second look at what seems to be.

    By the fastest trial, and the faster of both looks: what else a machine does makes some messages slow for a moment,
    and none fast; a bad cable makes the same ones slow again. All ranks call this together.
    """
    seconds = {pair: min(timing.trials) for pair, timing in timings.items()}
    suspects = slow_pairs(seconds, node_of_rank)
    for pair in sorted(suspects, key=lambda pair: -suspects[pair])[:MOST_SUSPECTS]:
        seconds[pair] = min(seconds[pair], *measure([pair])[pair].trials)
    return described(slow_pairs(seconds, node_of_rank), seconds, node_of_rank)


def described(
    slow: Mapping[Pair, float], seconds: Mapping[Pair, float], node_of_rank: Sequence[str]
) -> list[str]:
    """In words, the ranks whose every message is slow, and the other slow ways between two. Pure."""
    found, blamed = [], set[int]()
    for rank, node in enumerate(node_of_rank):
        of_rank = [pair for pair in seconds if rank in pair and not blamed & set(pair)]
        if len({sum(pair) - rank for pair in of_rank}) > 1 and all(pair in slow for pair in of_rank):
            factor = statistics.median(slow[pair] for pair in of_rank)
            found.append(f"rank {rank} ({node}) is slow with everybody: {factor:.1f} times the usual time")
            blamed.add(rank)
    for (sender, receiver), factor in slow.items():
        if not blamed & {sender, receiver}:
            ends = f"{sender} ({node_of_rank[sender]}) to {receiver} ({node_of_rank[receiver]})"
            found.append(f"the way from rank {ends} is slow: {factor:.1f} times the usual time")
    return found
