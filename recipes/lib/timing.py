"""How long a call takes: several trials of many calls each, by the slowest rank; median and spread.

On a GPU by CUDA events, because a call only queues its work; on a CPU by the clock, because it returns when the work
is done.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from recipes.lib.distributed import World


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, trial by trial."""

    trials: tuple[float, ...]
    calls: int
    """Calls in each trial."""

    @property
    def seconds(self) -> float:
        """The median trial."""
        return statistics.median(self.trials)

    @property
    def spread(self) -> float:
        """Between the fastest and the slowest trial, as a part of the median."""
        return (max(self.trials) - min(self.trials)) / self.seconds

    def figures(self) -> dict[str, object]:
        """For a line of results."""
        return {
            "seconds": self.seconds,
            "seconds_min": min(self.trials),
            "seconds_max": max(self.trials),
            "trials": len(self.trials),
            "calls_per_trial": self.calls,
        }


def measure(call: Callable[[], None], world: World, *, trials: int = 5, budget: float = 0.2) -> Timing:
    """Time `call`, which every rank makes equally often, by the slowest rank of each trial."""
    found = measure_each(call, world, trials=trials, budget=budget)
    return slowest(found)


def slowest(timings: Sequence[Timing]) -> Timing:
    """Trial by trial the longest of several ranks' times. Pure."""
    return Timing(
        tuple(max(trial) for trial in zip(*(each.trials for each in timings), strict=True)), timings[0].calls
    )


def measure_each(
    call: Callable[[], None], world: World, *, trials: int = 5, budget: float = 0.2
) -> list[Timing]:
    """The time of `call` on each rank, on all of them.

    After a warm-up, each trial makes so many calls back to back as fit into `budget` seconds, from 1 to 1000: one
    call of a few microseconds is shorter than what starting the clock on all ranks costs.
    """
    device = world.device
    once(call, device)  # connects, allocates, compiles
    calls = most(math.floor(budget / max(most(once(call, device)), 1e-9)))
    calls = int(min(1000, max(1, calls)))
    mine = []
    for _ in range(trials):
        together(world)
        mine.append(_timed(call, device, calls) / calls)
    found = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine, group=world.patient)
    return [Timing(tuple(each), calls) for each in found]


def once(call: Callable[[], None], device: torch.device) -> float:
    """Seconds that one call takes on this rank."""
    return _timed(call, device, 1)


def _timed(call: Callable[[], None], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def together(world: World) -> None:
    """Return when all ranks are here and their GPUs have nothing left to do."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    if world.size > 1:
        # Over gloo: NCCL's barrier is a collective on the GPU, and would be in the first trial's time.
        dist.barrier(world.patient)


def most(value: float) -> float:
    """The largest value of any rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)
