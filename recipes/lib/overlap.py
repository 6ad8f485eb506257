"""How much of the gradients' all-reduces is hidden behind the backward pass: a few steps traced by torch.profiler.

An all-reduce costs a step nothing while the device computes something else meanwhile. What is left over is what a
step would be shorter without it. Both are read off the trace: the stretches in which an all-reduce was under way,
and those in which the backward pass computed.

- On a GPU both are kernels: NCCL's, and all others.
- On a CPU they are gloo's threads, and the autograd engine's calls in the main thread. Both want the same cores, so
  "hidden" there says that they ran side by side, not that it was free.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from recipes.lib.metrics import say
from recipes.lib.tables import table
from recipes.lib.training import Plan

REDUCING = "backward that reduces"
"""The range (`record_function`) in which a technique's all-reduces of gradients are started."""
FOLDER = "profile"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """One rank's, over all traced steps; milliseconds."""

    computing: float
    """In which the backward passes that reduce computed."""
    reducing: float
    """In which at least one all-reduce was under way."""
    hidden: float
    """Of those, in which the backward pass computed as well."""
    calls: int

    @property
    def share(self) -> float:
        """Of the all-reduces' time, what was hidden."""
        return self.hidden / self.reducing if self.reducing else 1.0


def overlap(events: Sequence[dict[str, Any]]) -> Overlap:
    """From the events of a trace in Chrome's format. Pure."""
    spans = [event for event in events if event.get("ph") == "X"]
    ranges = [
        _interval(event) for event in spans if event["name"] == REDUCING and event["cat"] == "user_annotation"
    ]
    on_gpu = any(event["cat"] == "kernel" for event in spans)
    found = _of_a_gpu(spans) if on_gpu else _of_a_cpu(spans)
    reducing, computing = (
        [_interval(event) for event, started in each if _within(started, ranges)] for each in found
    )
    reducing_union, computing_union = _union(reducing), _union(computing)
    return Overlap(
        computing=_length(computing_union),
        reducing=_length(reducing_union),
        hidden=_common(reducing_union, computing_union),
        calls=len(reducing),
    )


Started = list[tuple[dict[str, Any], float]]
"""Events, each with when the host started it."""


def _of_a_gpu(spans: Sequence[dict[str, Any]]) -> tuple[Started, Started]:
    """All-reduces and computation. A kernel runs long after the host launched it, so the launch says whose it is."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in spans
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    kernels = [
        (event, launched.get(event["args"].get("correlation"), event["ts"]))
        for event in spans
        if event["cat"] == "kernel"
    ]
    reducing = [each for each in kernels if "nccl" in each[0]["name"] and "AllReduce" in each[0]["name"]]
    computing = [each for each in kernels if "nccl" not in each[0]["name"]]
    return reducing, computing


def _of_a_cpu(spans: Sequence[dict[str, Any]]) -> tuple[Started, Started]:
    """All-reduces and computation. gloo's threads take a call up while `backward` waits for it at the latest."""
    reducing = [(event, event["ts"]) for event in spans if event["name"] == "gloo:all_reduce"]
    engine = "autograd::engine::evaluate_function"
    computing = [(event, event["ts"]) for event in spans if event["name"].startswith(engine)]
    return reducing, computing


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"] / 1000, (event["ts"] + event["dur"]) / 1000


def _within(microseconds: float, ranges: Sequence[Interval]) -> bool:
    return any(start <= microseconds / 1000 <= end for start, end in ranges)


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same stretches without overlaps, in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _common(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Length of what two unions have in common."""
    return _length(first) + _length(second) - _length(_union([*first, *second]))


@contextmanager
def traced(optimizer: torch.optim.Optimizer, plan: Plan, *, skip: int, steps: int) -> Iterator[None]:
    """Trace `steps` optimizer steps after the first `skip`; every rank leaves a trace, rank 0 prints the table.

    The traces open in https://ui.perfetto.dev. Without `steps` nothing is done.
    """
    if steps == 0:
        yield
        return
    world, done = plan.world, False

    def ready(profiler: profile) -> None:  # at a step boundary, on all ranks
        nonlocal done
        done = True
        path = plan.run_directory / FOLDER / f"rank-{world.rank}.json.gz"
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        with gzip.open(path) as file:
            mine = overlap(json.load(file)["traceEvents"])
        everyone = [mine] * world.size
        if world.size > 1:
            dist.all_gather_object(everyone, mine, group=world.patient)
        if world.is_first:
            (path.parent / "overlap.json").write_text(
                json.dumps([asdict(each) for each in everyone], indent=1)
            )
            say(f"overlap of {steps} steps, per step; traces are in {path.parent}")
            say(_shown(everyone, steps))

    activities = [ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    plan_of_steps = schedule(wait=skip - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan_of_steps, on_trace_ready=ready) as profiler:
        hook = optimizer.register_step_post_hook(lambda *_: profiler.step())
        yield
        hook.remove()
    if not done and world.is_first:
        say(f"nothing was traced: this attempt ended before its step {skip + steps}")


def _shown(everyone: Sequence[Overlap], steps: int) -> str:
    rows = [
        [
            str(rank),
            f"{each.computing / steps:.1f} ms",
            f"{each.calls / steps:g}",
            f"{each.reducing / steps:.1f} ms",
            f"{each.share:.0%}",
            f"{(each.reducing - each.hidden) / steps:.1f} ms",
        ]
        for rank, each in enumerate(everyone)
    ]
    return table(["rank", "backward computes", "all-reduces", "under way", "hidden", "left over"], rows)
