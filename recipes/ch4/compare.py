"""DDP, each FSDP strategy and DeepSpeed's ZeRO on the same work in one job: memory, speed and stall side by side.

    torchrun --nproc-per-node 2 -m recipes.ch4.compare strategies=ddp,full_shard steps=6
    torchrun --nproc-per-node 2 -m recipes.ch4.compare strategies=full_shard,zero1,zero2,zero3 steps=6

One set of processes builds a model, trains a few steps, forgets it and goes on to the next strategy: same weights, same
sequences, so the losses must be equal. They are compared with the first strategy's, step by step.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist

from recipes.ch3.ddp import Replicated
from recipes.ch3.ddp_args import DdpArgs
from recipes.ch4.compare_args import CompareArgs
from recipes.ch4.fsdp import Sharded, make_grid
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.ch5.deepspeed import Zero
from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.lib.arguments import TrainArgs, parse_or_exit
from recipes.lib.comparison_plots import comparison_png
from recipes.lib.deepspeed_stack import check_deepspeed
from recipes.lib.distributed import World, joined
from recipes.lib.flops import parameter_count
from recipes.lib.layout import Layout
from recipes.lib.measurements import Measurements, several
from recipes.lib.memory import Keeping, Kept, PeakMemory, kept_bytes
from recipes.lib.own_time import OwnTime
from recipes.lib.parallelism import attention_backends
from recipes.lib.stall import Stall, measure_stall
from recipes.lib.tables import size_text, table
from recipes.lib.timing import together
from recipes.lib.training import Plan, Technique, make_plan, optimizer_step, recipe_main


@dataclass(frozen=True)
class Measured:
    """One strategy's figures; memory and times are those of the rank that has most."""

    strategy: str
    kept: Kept
    peak_bytes: int
    seconds: list[float]
    """Of each timed step."""
    tokens_per_step: int
    stall: Stall
    losses: list[float]
    grad_norms: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks, in the median step."""
        return self.tokens_per_step / statistics.median(self.seconds)

    def figures(self) -> dict[str, object]:
        """For a line of results."""
        steps = self.seconds
        times = {"seconds": statistics.median(steps), "seconds_min": min(steps), "seconds_max": max(steps)}
        return {
            **dataclasses.asdict(self), "step_seconds": steps, **times, "trials": len(steps),
            "tokens_per_second": self.tokens_per_second,
        }  # fmt: skip

    def difference(self, other: Measured) -> tuple[float, float]:
        """Largest relative difference of any step's loss, and of its gradient norm."""
        return _largest(self.losses, other.losses), _largest(self.grad_norms, other.grad_norms)


def ddp(plan: Plan, args: CompareArgs) -> Technique:
    """Chapter 3's, with its own defaults."""
    return Replicated.build(plan, DdpArgs(**shared(args)))


def fsdp(strategy: str) -> Callable[[Plan, CompareArgs], Technique]:
    """This chapter's, with this strategy."""

    def build(plan: Plan, args: CompareArgs) -> Technique:
        copy = copy_ranks(args, plan.world) if strategy == "hybrid_shard" else 0
        own = FsdpArgs(**shared(args), strategy=strategy, shard_size=copy)
        return Sharded.build(plan, own, make_grid(plan.world, own))

    return build


def zero(stage: int) -> Callable[[Plan, CompareArgs], Technique]:
    """Chapter 5's, in this stage."""
    return lambda plan, args: Zero.build(plan, DeepSpeedArgs(**shared(args), stage=stage))


Build = Callable[[Plan, CompareArgs], Technique]

STRATEGIES: dict[str, Build] = {
    "ddp": ddp,
    "shard_grad_op": fsdp("shard_grad_op"),
    "full_shard": fsdp("full_shard"),
    "hybrid_shard": fsdp("hybrid_shard"),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
}


@recipe_main
def main() -> None:
    """Measure one strategy after the other; rank 0 prints and draws."""
    args = parse_or_exit(CompareArgs)
    if args.zero:
        check_deepspeed(f"strategies={args.zero[0]}")
    compare("ch4_compare", args, STRATEGIES)


def compare(
    recipe: str,
    args: CompareArgs,
    strategies: Mapping[str, Build],
    layouts: Mapping[str, Callable[[World], Layout]] = MappingProxyType({}),
    wants: Callable[[World], None] | None = None,
) -> None:
    """Measure those of `strategies` that the arguments name; `layouts` has those that divide the ranks in their way.

    `wants` refuses a world in which one of them could not run, before another is measured.
    """
    with joined(args.device) as world:
        if wants is not None:
            wants(world)
        several(world)
        args.check_ranks(world.size, world.local_size)
        same_for_all = make_plan(recipe, args, world)
        with (
            Measurements(recipe, world, len(args.strategies)) as results,
            attention_backends(world.device),
        ):
            found: list[Measured] = []
            for name in args.strategies:
                plan, build = same_for_all, strategies[name]
                if name in layouts:
                    plan = dataclasses.replace(plan, layout=layouts[name](world))
                if (problem := does_not_fit(name, plan, args)) is not None:
                    results.note(kind="does_not_fit", strategy=name, reason=problem)
                    results.show(f"{name}: {problem}")
                    continue
                if not found:
                    warm_up(build, plan, args)
                found.append(measure_strategy(name, build, plan, args))
                speed = f"{name}: {found[-1].tokens_per_second:,.0f} tokens/s"
                results.add(speed, **found[-1].figures())
            if world.is_first and found:
                show(found, same_for_all, results)


def measure_strategy(name: str, build: Build, plan: Plan, args: CompareArgs) -> Measured:
    """Build, train `steps` steps and one more that is looked into, and forget everything."""
    world, results, seconds = plan.world, [], []
    memory = PeakMemory(world.device)
    technique = build(plan, args)
    own = OwnTime(technique.model, world.device)
    for step in range(1, args.steps + 1):
        together(world)
        began = time.perf_counter()
        loss, norm = optimizer_step(plan, technique, step, own)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - began)
        own.step_is_over()
        results.append((loss.item(), norm.item()))
    peak = memory.peak()
    kept = (
        technique.kept()
        if isinstance(technique, Keeping)
        else kept_bytes(technique.model, technique.optimizer)
    )
    together(world)
    stall = measure_stall(lambda: _one_more(plan, technique, own), world.device)
    everyone = [(peak, kept, seconds, stall)] * world.size
    dist.all_gather_object(everyone, (peak, kept, seconds, stall), group=world.patient)
    return Measured(
        strategy=name,
        kept=max((each[1] for each in everyone), key=lambda kept: kept.parameters),
        peak_bytes=max(each[0] for each in everyone),
        seconds=[max(step) for step in zip(*(each[2] for each in everyone), strict=True)][args.untimed :],
        tokens_per_step=args.batch_size * args.sequence_length,
        stall=max((each[3] for each in everyone), key=lambda stall: stall.waiting),
        losses=[loss for loss, _ in results],
        grad_norms=[norm for _, norm in results],
    )


def warm_up(build: Build, plan: Plan, args: CompareArgs) -> None:
    """One step that nobody measures: the first of a process loads libraries, whose memory is no strategy's."""
    technique = build(plan, args)
    optimizer_step(plan, technique, 1, OwnTime(technique.model, plan.world.device))


def copy_ranks(args: CompareArgs, world: World) -> int:
    """Ranks that share a copy in hybrid_shard. On one node of an even number of ranks half, or there were one copy."""
    if args.shard_size:
        return args.shard_size
    return world.size // 2 if world.local_size == world.size and world.size % 2 == 0 else world.local_size


def does_not_fit(name: str, plan: Plan, args: CompareArgs) -> str | None:
    """Why a GPU cannot hold what a rank keeps in this strategy: better said than tried. None where it may."""
    world = plan.world
    if world.device.type != "cuda":
        return None
    sharers = {"ddp": 1, "hybrid_shard": copy_ranks(args, world)}.get(name, world.size)
    # Parameters, gradients and two moments; what ZeRO holds besides is not counted.
    needed = 4 * plan.precision.master.itemsize * parameter_count(plan.size) / sharers
    has = torch.cuda.get_device_properties(world.device).total_memory
    if needed < has:
        return None
    return f"does not fit: parameters, gradients and moments are {size_text(needed)} a rank, a GPU has {size_text(has)}"


def show(found: list[Measured], plan: Plan, results: Measurements) -> None:
    """The table and the picture."""
    rows = []
    for each in found:
        loss, norm = each.difference(found[0])
        stall = f"{each.stall.waiting:.0%}"
        if each.stall.communication is not None:
            stall += f" ({each.stall.communication:.0%} communication)"
        rows.append([
            each.strategy,
            *(size_text(size) for size in (each.kept.parameters, each.kept.gradients, each.kept.moments)),
            size_text(each.peak_bytes),
            f"{each.tokens_per_second:,.0f}",
            " to ".join(f"{each.tokens_per_step / bound:,.0f}" for bound in (max(each.seconds), min(each.seconds))),
            stall,
            f"{each.losses[-1]:.5f}",
            f"{loss:.1e}",
            f"{norm:.1e}",
        ])  # fmt: skip
    head = ["strategy", "parameters", "gradients", "moments", "peak memory", "tokens/s", "min to max", "stall",
            "last loss", "loss differs by", "norm differs by"]  # fmt: skip
    results.show("\n" + table(head, rows))
    results.show(
        f"per rank, the rank that has most; {len(found[0].seconds)} timed steps; peak memory above what was in use "
        f"before the model; differences are relative to {found[0].strategy}, the largest of any step"
    )
    kind = "GPU" if plan.world.device.type == "cuda" else "CPU thread"
    where = f"{plan.args.model} on {plan.world.size} ranks, {results.hardware}"
    subtitle = f"{where}; stall: part of a step in which the {kind} waits"
    comparison_png(results.picture("compare.png"), "The same work by every strategy", subtitle, found)


def _one_more(plan: Plan, technique: Technique, own: OwnTime) -> None:
    optimizer_step(plan, technique, plan.args.steps, own)


def shared(args: CompareArgs) -> dict[str, object]:
    """What every technique takes."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}


def _largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
