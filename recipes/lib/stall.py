"""Stall: the part of a step in which this rank's device computed nothing, because it waited.

On a GPU, from a profile of one step: the time in which no kernel ran but those of NCCL, which move data. Where one of
those ran it is exposed communication; else the GPU waited for its host.

On a CPU: the time in which the thread that computes did not run (wall clock less its CPU time): it waited in a
collective of gloo, whose own threads do the sending, or for a core that others had. On a busy machine that is much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

Interval = tuple[float, float]


@dataclass(frozen=True)
class Stall:
    """Of one step, in parts of its time."""

    waiting: float
    """No computation at all."""
    communication: float | None
    """Of that, under way in a collective; None where it cannot be told apart."""


def measure_stall(step: Callable[[], None], device: torch.device) -> Stall:
    """Run one step and see how much of it this rank waited."""
    if device.type != "cuda":
        began, began_cpu = time.perf_counter(), time.thread_time()
        step()
        wall, busy = time.perf_counter() - began, time.thread_time() - began_cpu
        return Stall(max(0.0, 1 - busy / wall), None)
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize(device)
    kernels = [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profiled.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return stall_of(kernels)


def stall_of(kernels: Iterable[tuple[str, Interval]]) -> Stall:
    """From the names and times of one GPU's kernels, from the first one's start to the last one's end. Pure."""
    found = list(kernels)
    computing = [times for name, times in found if not name.startswith("nccl")]
    everything = [times for _, times in found]
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    busy, any_kernel = covered(computing), covered(everything)
    return Stall((whole - busy) / whole, (any_kernel - busy) / whole)


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union. Pure."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
