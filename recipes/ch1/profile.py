"""Where the time and the memory of a training step go, and what limits it: compute, memory, network, input or host.

    python -m recipes.ch1.profile
    torchrun --nproc-per-node 2 -m recipes.ch1.profile
    python -m recipes.ch1.profile input_delay=0.2

The profiler records some steps; each rank's trace is in the run directory, for https://ui.perfetto.dev. The table is
made from the same trace (`recipes.lib.step_trace`), so whatever it claims can be looked at there. The profiler costs
time itself: the steps are timed without it as well, and both are shown. The last line pretends a slow disk.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from recipes.ch1.baseline import Baseline
from recipes.ch1.profile_args import ProfileArgs
from recipes.ch3.ddp import Replicated
from recipes.ch3.ddp_args import DdpArgs
from recipes.ch4.fsdp import Sharded, make_grid
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.arguments import ArgumentError, TrainArgs, parse_or_exit
from recipes.lib.distributed import joined
from recipes.lib.measurements import Measurements, connect
from recipes.lib.parallelism import attention_backends
from recipes.lib.profile_plots import profile_png
from recipes.lib.roofline import measure_roof
from recipes.lib.step_parts import NamedParts
from recipes.lib.step_trace import CATEGORIES, PREFIX, Memory, StepTimes, bottleneck, memory_of, times_of
from recipes.lib.tables import size_text, table, time_text
from recipes.lib.timing import Timing, most, together
from recipes.lib.training import Plan, Technique, make_plan, optimizer_step, recipe_main

ADVICE = {
    "compute": "arithmetic: a lower precision, a larger share of the peak, or more devices",
    "memory": "moving numbers: fuse small operations (compile=true), keep fewer activations, larger products",
    "network": "the exchange between ranks: more work per exchange, more overlap, a faster way between the ranks",
    "input": "fetching the batch: prepare it ahead, in other processes, or from a faster disk",
    "host": "Python starts the work too slowly: larger operations, compile=true",
}


@recipe_main
def main() -> None:
    """Profile some steps on every rank; rank 0 prints and draws."""
    args = parse_or_exit(ProfileArgs)
    with joined(args.device) as world:
        connect(world)
        if args.delayed_rank >= world.size:
            raise ArgumentError("delayed_rank", args.delayed_rank, f"there are ranks 0 to {world.size - 1}")
        plan = make_plan("ch1_profile", args, world)
        technique = build(plan, args)
        delay = args.input_delay if args.delayed_rank in (-1, world.rank) else 0.0
        parts = NamedParts(technique, world.device, compiled=args.compile, input_delay=delay)
        with (
            Measurements("ch1_profile", world, 3, plan.run_directory) as results,
            attention_backends(world.device),
        ):
            roof = measure_roof(world, plan.precision.compute)
            results.add(roof.text(), what_is="roof", **dataclasses.asdict(roof))
            results.show(roof.text())
            plain = timed_steps(plan, parts, args)
            results.add(f"a step without the profiler: {time_text(plain.seconds)}", **plain.figures())
            trace = recorded(plan, parts, args)
            events = json.loads(trace.read_text())["traceEvents"]
            times = times_of(events, roof.ridge)
            memory = memory_of(events, cuda=world.device.type == "cuda")
            everybody: list[StepTimes] = [times] * world.size
            if world.size > 1:
                dist.all_gather_object(everybody, times, group=world.patient)
            rank = show(everybody, plain, memory, technique, results)
            if world.is_first:
                profile_png(results.picture("profile.png"), everybody, rank, memory, results.hardware)


def build(plan: Plan, args: ProfileArgs) -> Technique:
    """What is profiled. Raises ArgumentError for `single` on several ranks."""
    name = args.technique if args.technique != "auto" else "ddp" if plan.world.size > 1 else "single"
    if name == "single" and plan.world.size > 1:
        raise ArgumentError("technique", "single", f"{plan.world.size} ranks want ddp or fsdp")
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
    if name == "ddp":
        return Replicated.build(plan, DdpArgs(**shared))
    if name == "fsdp":
        sharding = FsdpArgs(**shared)
        return Sharded.build(plan, sharding, make_grid(plan.world, sharding))
    return Baseline.build(plan)


def timed_steps(plan: Plan, parts: NamedParts, args: ProfileArgs) -> Timing:
    """Steps without the profiler, after the warm-up, each by the slowest rank."""
    for step in range(1, args.warmup_steps + 1):
        optimizer_step(plan, parts, step, parts)
    seconds = []
    for step in range(1, args.steps + 1):
        together(plan.world)
        began = time.perf_counter()
        optimizer_step(plan, parts, args.warmup_steps + step, parts)
        if plan.world.device.type == "cuda":
            torch.cuda.synchronize(plan.world.device)
        seconds.append(most(time.perf_counter() - began))
    return Timing(tuple(seconds), calls=1)


def recorded(plan: Plan, parts: NamedParts, args: ProfileArgs) -> Path:
    """This rank's trace of `steps` steps, and on a GPU a snapshot of its memory; gives the trace's file."""
    world, folder = plan.world, plan.run_directory
    cuda = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    together(world)
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True) as profiler:
        # One step more on a GPU: there a step lasts from the end of the one before to its own.
        for step in range(args.steps + cuda):
            with torch.profiler.record_function(PREFIX + "step"):
                optimizer_step(plan, parts, args.warmup_steps + args.steps + step + 1, parts)
        together(world)
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / f"memory-rank-{world.rank}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    trace = folder / f"trace-rank-{world.rank}.json"
    profiler.export_chrome_trace(str(trace))
    return trace


def show(
    ranks: list[StepTimes], plain: Timing, memory: Memory, technique: Technique, results: Measurements
) -> int:
    """The tables, and the verdict over all ranks; gives the rank that decides it."""
    by_category = [{name: each.category(name) for name in CATEGORIES} for each in ranks]
    limit, rank = bottleneck(by_category)
    shown = ranks[rank]
    results.show(
        f"a step takes {time_text(plain.seconds)} (spread {plain.spread:.0%}), "
        f"with the profiler {time_text(shown.seconds)} (rank {rank}, the mean of {shown.steps})\n"
    )
    head = ["part", "time", "of the step", *CATEGORIES[:2]]
    rows = []
    for part, seconds in shown.parts():
        each = [shown.by_part.get((part, name), 0.0) for name in CATEGORIES[:2]]
        share = f"{seconds / shown.seconds:.1%}"
        rows.append([part, time_text(seconds), share, *(time_text(one) if one else "" for one in each)])
    results.show(table(head, rows))
    if len(ranks) > 1:
        hidden = 1 - shown.category("network") / shown.exchange if shown.exchange else 0.0
        results.show(
            f"\nthe ranks exchange for {time_text(shown.exchange)} of it, {hidden:.0%} behind arithmetic"
        )
        rows = [[n, *(time_text(each[name]) for name in CATEGORIES)] for n, each in enumerate(by_category)]
        results.show(table(["rank", *CATEGORIES], rows))
    kept = kept_bytes(technique)
    results.show("\n" + table(["memory of rank 0", "bytes"], memory_rows(kept, memory)))
    share = by_category[rank][limit] / shown.seconds
    verdict = f"\nbottleneck: {limit}, {share:.0%} of the step"
    others = f" on rank {rank}, which the others wait for" if len(ranks) > 1 else ""
    results.show(f"{verdict}{others}\n  {ADVICE[limit]}")
    figures: dict[str, Any] = {"bottleneck": limit, "rank": rank, "share": share, "ranks": by_category}
    parts = dict(shown.parts())
    results.add(
        f"bottleneck: {limit}", **figures, parts=parts, kept_bytes=kept, peak_bytes=dict(memory.peaks),
        seconds_profiled=shown.seconds, exchange_seconds=shown.exchange,
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip
    return rank


def kept_bytes(technique: Technique) -> dict[str, int]:
    """What stays from step to step on this rank: exact, from the tensors themselves."""
    moments = [value for state in technique.optimizer.state.values() for value in state.values()]
    tensors = {"parameters": list(technique.model.parameters()), "optimizer's moments": moments}
    if isinstance(technique.model, DistributedDataParallel):  # elsewhere gradients come and go with the step
        tensors["gradients, in DDP's buckets"] = tensors["parameters"]
    return {
        name: sum(local(each).nbytes for each in each_kind if torch.is_tensor(each))
        for name, each_kind in tensors.items()
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard."""
    shard: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def memory_rows(kept: dict[str, int], memory: Memory) -> list[list[str]]:
    """What stays, and how far above that each part goes."""
    rows = [[f"kept: {name}", size_text(size)] for name, size in kept.items()]
    return rows + [[f"above that in {part}", size_text(size)] for part, size in memory.peaks.items()]


if __name__ == "__main__":
    main()
