"""How much of a device training uses: arithmetic counted, a step timed, both held against two peaks.

    torchrun --nproc-per-node 2 -m recipes.ch2.mfu
    torchrun --nproc-per-node 8 -m recipes.ch2.mfu model=llama_1b sequence_length=4096 batch_size=4 compile=true \
        matrix_sizes=1024,2048,4096,8192

MFU is arithmetic that the model needs, per second, over the data sheet's peak. What no kernel reaches is a poor
yardstick: the same over the rate of a large product of matrices, measured here a minute before, says what is left to
win. A device whose peak is not known has no MFU, only the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from recipes.ch2.mfu_args import MfuArgs
from recipes.lib.arguments import TrainArgs, parse_or_exit
from recipes.lib.distributed import World, joined
from recipes.lib.efficiency_plots import rates_png
from recipes.lib.flop_parts import Counted, counted, parts_of
from recipes.lib.flops import flops_per_token, parameter_count, peak_flops
from recipes.lib.limits import Impossible
from recipes.lib.measurements import Measurements, connect
from recipes.lib.model import Transformer, materialize
from recipes.lib.model_sizes import ModelSize
from recipes.lib.optimizer import build_optimizer
from recipes.lib.parallelism import (
    Precision,
    attention_backends,
    checkpoint_activations,
    compile_blocks,
    precision,
)
from recipes.lib.planner import model_size
from recipes.lib.tables import table, time_text
from recipes.lib.timing import Timing, measure
from recipes.lib.training import recipe_main
from recipes.lib.transports import nccl_log, ways_of_all


@recipe_main
def main() -> None:
    """Count, sweep, train; rank 0 prints and draws."""
    args = parse_or_exit(MfuArgs)
    with nccl_log() as log, joined(args.device) as world:
        connect(world)
        size, numbers = model_size(args.model), precision(args.dtype, world.device)
        with (
            Measurements("ch2_mfu", world, len(args.matrix_sizes) + 3) as results,
            attention_backends(world.device),
        ):
            count = counted(size, args.sequence_length, args.activation_checkpointing)
            show_count(args, size, count, results)
            sweep = [product_rate(side, numbers, world, args, results) for side in args.matrix_sizes]
            steps = time_steps(args, size, numbers, world, results)
            if world.size > 1:
                results.note(kind="transport", **ways_of_all(world, log))
            show_rates(args, size, count, sweep, steps, device_peak(world, numbers), results, world)


def show_count(args: MfuArgs, size: ModelSize, count: Counted, results: Measurements) -> None:
    """The table of parts, and why the counter says less."""
    parts = parts_of(size, args.sequence_length)
    cost = flops_per_token(size, args.sequence_length)
    rows = [
        [part.name, f"{part.full / 1e6:,.3f}", f"{part.causal / 1e6:,.3f}", f"{part.full / cost.full:.1%}"]
        for part in parts
    ]
    rows.append(["together", f"{cost.full / 1e6:,.3f}", f"{cost.causal / 1e6:,.3f}", ""])
    results.show(
        f"\n{args.model}, {parameter_count(size) / 1e6:,.1f}M parameters, sequences of {args.sequence_length}: "
        "MFLOP per token, forward and backward"
    )
    results.show(table(["part", "F (all of S x S)", "C (causal half)", "share of F"], rows))
    needed = sum(part.full for part in parts if part.products)
    total = count.forward + count.backward
    again = total - needed
    results.show(
        f"torch's counter on the real model: {total / 1e6:,.3f} MFLOP per token; "
        f"{again / 1e6:,.3f} are recomputed, the rest is F without the gains of norms, which are no matrix products"
    )
    figures = {part.name: part.full for part in parts}
    results.note(kind="flops", parts=figures, full=cost.full, causal=cost.causal, **dataclasses.asdict(count))


def product_rate(
    side: int, numbers: Precision, world: World, args: MfuArgs, results: Measurements
) -> dict[str, Any]:
    """FLOP/s of one square product, every rank at once."""
    left, right = (torch.randn(side, side, device=world.device, dtype=numbers.compute) for _ in range(2))
    out = torch.empty_like(left)
    timing = measure(lambda: torch.mm(left, right, out=out), world, trials=args.trials, budget=args.budget)
    line = {"side": side, "flops": 2.0 * side**3 / timing.seconds, **timing.figures()}
    results.add(f"product of {side} x {side}: {line['flops'] / 1e12:.3g} TFLOP/s", **line)
    return line


def time_steps(
    args: MfuArgs, size: ModelSize, numbers: Precision, world: World, results: Measurements
) -> dict[str, Timing]:
    """Forward alone; with the backward pass, which sums gradients over the ranks; with the optimizer."""
    with torch.device("meta"):
        model = Transformer(size)
    checkpoint_activations(model, args.activation_checkpointing)
    if args.compile:
        compile_blocks(model)
    model.to(numbers.master)
    materialize(model, seed=0, device=world.device)
    # A sum over ranks as in ch3_ddp; one rank has nothing to sum.
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    optimizer = build_optimizer(model, TrainArgs())
    shape = (args.batch_size, args.sequence_length)
    tokens_BS = torch.randint(0, size.vocab_size, shape, device=world.device)

    def forward() -> torch.Tensor:
        with numbers.autocast(world.device):
            loss: torch.Tensor = wrapped(tokens_BS, tokens_BS)
        return loss

    def forward_alone() -> None:
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext():
            forward()

    def both() -> None:
        (forward() / tokens_BS.numel()).backward()
        optimizer.zero_grad()

    def step() -> None:
        (forward() / tokens_BS.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls: dict[str, Callable[[], None]] = {
        "forward": forward_alone, "forward and backward": both, "whole step": step,
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        timing = measure(call, world, trials=args.trials, budget=args.budget)
        results.add(
            f"{name}: {time_text(timing.seconds)}", part=name, tokens=tokens_BS.numel(), **timing.figures()
        )
        found[name] = timing
    return found


def device_peak(world: World, numbers: Precision) -> float | None:
    """FLOP/s of the data sheet; None where it is unknown, or for another number format than bfloat16."""
    if world.device.type != "cuda" or numbers.compute != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name(world.device))


def show_rates(
    args: MfuArgs,
    size: ModelSize,
    count: Counted,
    sweep: list[dict[str, Any]],
    steps: dict[str, Timing],
    peak: float | None,
    results: Measurements,
    world: World,
) -> None:
    """Rates of the step over both peaks; rank 0 draws them beside the sweep. Raises Impossible above the peak."""
    best = max(line["flops"] for line in sweep)
    cost = flops_per_token(size, args.sequence_length)
    third = 1 / 3  # of both formulas: 2 of the 6 FLOP per parameter are the forward pass
    tokens = args.batch_size * args.sequence_length
    rows, marks = [], []
    for name, timing in steps.items():
        share = third if name == "forward" else 1.0
        done = count.forward if name == "forward" else count.forward + count.backward
        rates = [share * cost.full, share * cost.causal, done]
        full, causal, hardware = (each * tokens / timing.seconds for each in rates)
        figures = {
            "tokens_per_second_per_device": tokens / timing.seconds, "flops_full": full, "flops_causal": causal,
            "flops_counted": hardware, "share_of_matrix_rate": full / best, "matrix_rate": best, "peak": peak,
        }  # fmt: skip
        if peak is not None:
            if causal > peak:
                raise Impossible(f"{name}: {causal / 1e12:.0f} TFLOP/s by formula C, above the device's peak")
            figures["mfu_full"], figures["mfu_causal"] = full / peak, causal / peak
        results.note(kind="rate", part=name, **figures)
        marks.append((name, full))
        rows.append([
            name, time_text(timing.seconds), f"{timing.spread:.0%}", f"{tokens / timing.seconds:,.0f}",
            f"{full / 1e12:.3g}", "-" if peak is None else f"{full / peak:.1%}",
            "-" if peak is None else f"{causal / peak:.1%}", f"{full / best:.1%}", f"{hardware / best:.1%}",
        ])  # fmt: skip
    known = (
        "no MFU: the peak of this device is not known" if peak is None else f"peak {peak / 1e12:.0f} TFLOP/s"
    )
    results.show(
        f"\non each of {world.size} rank{'s'[: world.size != 1]}; {known}; matrix rate measured here "
        f"{best / 1e12:.3g} TFLOP/s"
    )
    head = [
        "", "time", "spread", "tokens/s", "TFLOP/s (F)", "MFU (F)", "MFU (C)", "F of matrix rate", "counted of it",
    ]  # fmt: skip
    results.show(table(head, rows))
    if world.is_first:
        subtitle = f"{args.model}, {results.hardware}; median of the trials, the band is fastest to slowest"
        rates_png(results.picture("mfu.png"), subtitle, sweep, marks, peak)


if __name__ == "__main__":
    main()
