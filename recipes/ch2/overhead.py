"""What communication adds to a step, by strategy and size of the model.

    torchrun --nproc-per-node 2 -m recipes.ch2.overhead
    torchrun --nproc-per-node 8 -m recipes.ch2.overhead models=llama_1b,llama_8b sequence_length=4096 batch_size=1

The same forward and backward pass is timed three ways: with the strategy's collectives; without them, on a model that
each rank has to itself; and the collectives' bytes alone, in one message each. What the first takes longer than the
second is the cost; what the third takes longer than that was hidden behind the computation. The optimizer is left out:
its work differs by strategy, and is no communication.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from recipes.ch2.overhead_args import OverheadArgs
from recipes.ch4.fsdp import shard
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.distributed import World, joined
from recipes.lib.efficiency_plots import overhead_png
from recipes.lib.flops import parameter_count
from recipes.lib.grid import Grid
from recipes.lib.layout import Layout
from recipes.lib.measurements import Measurements, several
from recipes.lib.model import Transformer, materialize
from recipes.lib.model_sizes import ModelSize
from recipes.lib.parallelism import Precision, attention_backends, precision
from recipes.lib.planner import model_size
from recipes.lib.tables import size_text, table, time_text
from recipes.lib.timing import Timing, measure
from recipes.lib.training import recipe_main
from recipes.lib.transports import nccl_log, ways_of_all


@recipe_main
def main() -> None:
    """Every strategy over all models; rank 0 prints and draws."""
    args = parse_or_exit(OverheadArgs)
    with nccl_log() as log, joined(args.device) as world:
        several(world)
        count = len(args.models) * len(args.strategies)
        with Measurements("ch2_overhead", world, count) as results, attention_backends(world.device):
            lines = [
                one(name, strategy, args, world, results)
                for name in args.models
                for strategy in args.strategies
            ]
            results.note(kind="transport", **ways_of_all(world, log))
            show(lines, results, args)
            if world.is_first:
                subtitle = (
                    f"forward and backward of {args.batch_size} x {args.sequence_length} tokens per rank; "
                    f"{results.hardware}; median, the whisker is fastest to slowest"
                )
                overhead_png(results.picture("overhead.png"), subtitle, lines)


def one(name: str, strategy: str, args: OverheadArgs, world: World, results: Measurements) -> dict[str, Any]:
    """The three times of one strategy and model."""
    size, numbers = model_size(name), precision(args.dtype, world.device)
    together = timed(
        build(size, strategy, numbers, world, alone=False), nullcontext, size, numbers, args, world
    )
    # Each rank for itself: gathering and summing over one rank are copies, which the strategy makes anyway.
    apart = build(size, strategy, numbers, world, alone=True)
    quiet = apart.no_sync if isinstance(apart, DistributedDataParallel) else nullcontext
    compute = timed(apart, quiet, size, numbers, args, world)
    del apart  # before the messages: a large model's copy would be in their way
    sent, messages = messages_alone(size, strategy, numbers, args, world)
    line = {
        "model": name, "strategy": strategy, "ranks": world.size, "compute_seconds": compute.seconds,
        "compute_spread": compute.spread, "added_seconds": together.seconds - compute.seconds, "bytes": sent,
        "messages_seconds": messages.seconds, **together.figures(),
    }  # fmt: skip
    results.add(f"{strategy} of {name}: {time_text(together.seconds)}", **line)
    return line


def build(size: ModelSize, strategy: str, numbers: Precision, world: World, *, alone: bool) -> nn.Module:
    """The model spread over all ranks, or, `alone`, the same code around a model that this rank has to itself."""
    with torch.device("meta"):
        model = Transformer(size)
    model.to(numbers.master)
    if strategy == "ddp":
        materialize(model, seed=0, device=world.device)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    shape = (world.size, 1) if alone else (1, world.size)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("copies", "shard"))["shard"]
    grid = Grid(mesh, None, None, Layout.each_its_own(world))
    shard(model, grid, numbers, FsdpArgs(strategy=strategy))
    materialize(model, seed=0, device=world.device)
    return model


def timed(
    model: nn.Module,
    quiet: Callable[[], AbstractContextManager[Any]],
    size: ModelSize,
    numbers: Precision,
    args: OverheadArgs,
    world: World,
) -> Timing:
    """Forward and backward, by the slowest rank. Inside `quiet` nothing is sent."""
    shape = (args.batch_size, args.sequence_length)
    tokens_BS = torch.randint(0, size.vocab_size, shape, device=world.device)
    autocast = nullcontext if isinstance(model, FSDPModule) else lambda: numbers.autocast(world.device)

    def call() -> None:
        with quiet():
            with autocast():
                loss = model(tokens_BS, tokens_BS)
            (loss / tokens_BS.numel()).backward()
        model.zero_grad()

    return measure(call, world, trials=args.trials, budget=args.budget)


def messages_alone(
    size: ModelSize, strategy: str, numbers: Precision, args: OverheadArgs, world: World
) -> tuple[int, Timing]:
    """Bytes of the arrays that the strategy exchanges in a step, and the time of that with nothing else to do.

    DDP sums all gradients. FSDP gathers all parameters, full_shard once more for the backward pass, and sums and
    scatters the gradients.
    """
    share = -(-parameter_count(size) // world.size)
    whole = share * world.size
    gradients = torch.zeros(whole, dtype=numbers.master, device=world.device)
    if strategy == "ddp":
        return gradients.nbytes, measure(
            lambda: void(dist.all_reduce(gradients)), world, trials=args.trials, budget=args.budget
        )
    parameters = torch.zeros(whole, dtype=numbers.compute, device=world.device)
    my_parameters = torch.zeros(share, dtype=numbers.compute, device=world.device)
    my_gradients = torch.zeros(share, dtype=numbers.master, device=world.device)
    gathers = 2 if strategy == "full_shard" else 1

    def call() -> None:
        for _ in range(gathers):
            _all_gather(parameters, my_parameters)
        _reduce_scatter(my_gradients, gradients)

    sent = gathers * parameters.nbytes + gradients.nbytes
    return sent, measure(call, world, trials=args.trials, budget=args.budget)


# torch 2.13 warns of the names that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def void(_: object) -> None:
    """A collective's handle, which nobody needs."""


def show(lines: list[dict[str, Any]], results: Measurements, args: OverheadArgs) -> None:
    """The table; a difference within the spread of its two times is not called one."""
    rows = []
    for line in lines:
        noise = line["seconds_max"] - line["seconds_min"] + line["compute_spread"] * line["compute_seconds"]
        added, alone = line["added_seconds"], line["messages_seconds"]
        told = abs(added) > noise
        hidden = f"{min(1.0, max(0.0, 1 - added / alone)):.0%}" if told else "-"
        rows.append([
            line["model"], line["strategy"], time_text(line["seconds"]),
            f"{(line['seconds_max'] - line['seconds_min']) / line['seconds']:.0%}",
            time_text(line["compute_seconds"]), f"{line['compute_spread']:.0%}",
            f"{added / line['seconds']:.0%}" + ("" if told else " (within the spread)"),
            size_text(line["bytes"]), time_text(alone), hidden,
        ])  # fmt: skip
    head = [
        "model", "strategy", "step", "spread", "without", "spread", "added", "exchanged", "that alone", "of it hidden",
    ]  # fmt: skip
    results.show(
        f"\nforward and backward pass of {args.batch_size} x {args.sequence_length} tokens on each of "
        f"{lines[0]['ranks']} ranks, with and without communication"
    )
    results.show(table(head, rows))


if __name__ == "__main__":
    main()
