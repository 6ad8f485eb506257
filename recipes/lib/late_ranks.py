"""Which rank the others wait for.

In a collective everybody ends together, so the total time names nobody. But who comes last waits least: the time that
each rank spends inside the call tells, without clocks that agree.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from recipes.lib.distributed import World
from recipes.lib.timing import together

ROUNDS = 40
MOSTLY = 0.75
"""Part of the rounds in which the same rank is last, before it is called late: chance picks another one each time."""
LEAST_SECONDS = 5e-4
LEAST_FACTOR = 2.0
"""Of the time that the collective takes anyway."""


@dataclass(frozen=True)
class Late:
    """The rank that holds the others up."""

    rank: int
    seconds: float
    """By which it comes later than the others, in the median round."""
    share: float
    """Of the rounds in which it was the last."""


def waits(world: World, *, rounds: int = ROUNDS, slowed: int = -1, pause: float = 0.005) -> list[list[float]]:
    """Seconds that each rank spent in a small all-reduce after the same small piece of work, [round][rank].

    Rank `slowed` rests for `pause` seconds before each call, as a slow one would.
    """
    cuda = world.device.type == "cuda"
    width = 2048 if cuda else 256
    matrix = torch.full((width, width), 1 / width, device=world.device)
    flag = torch.ones(1, device=world.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
    mine = []
    for number in range(rounds + 1):
        together(world)
        matrix @ matrix
        if world.rank == slowed:
            time.sleep(pause)
        if begin is not None and end is not None:
            begin.record()
            dist.all_reduce(flag)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            dist.all_reduce(flag)
            seconds = time.perf_counter() - began
        if number:  # the first round warms up
            mine.append(seconds)
    found = [mine] * world.size
    dist.all_gather_object(found, mine, group=world.patient)
    return [list(each) for each in zip(*found, strict=True)]


def late_rank(waited: Sequence[Sequence[float]]) -> Late | None:
    """The rank that is last so often and so late that it is no chance; None where there is none. Pure."""
    last = [min(range(len(each)), key=lambda rank: each[rank]) for each in waited]
    rank, times = Counter(last).most_common(1)[0]
    own = statistics.median(each[rank] for each in waited)
    others = statistics.median(
        statistics.median(seconds for other, seconds in enumerate(each) if other != rank) for each in waited
    )
    share, seconds = times / len(waited), others - own
    if share < MOSTLY or seconds < max(LEAST_SECONDS, LEAST_FACTOR * own):
        return None
    return Late(rank, seconds, share)
