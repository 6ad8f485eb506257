"""What several devices gain and cost, and why training, answering and serving run into different limits.

    torchrun --nproc-per-node 2 -m recipes.ch1.first_steps
    python -m recipes.ch1.first_steps load=2

First the same batch is trained on one rank, then shared by all of them: with the exchange of gradients and without it,
which tells what of it is not hidden behind arithmetic. Then rank 0 alone uses one model in three ways. Training reads
each weight once for thousands of tokens, and arithmetic is the limit. Decoding reads every weight for one token, and
memory is. A stream of requests shares what is read among those that are there at the same time, and each of them waits.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.ch1.baseline import Baseline
from recipes.ch1.first_steps_args import FirstStepsArgs
from recipes.ch3.ddp import Replicated
from recipes.ch3.ddp_args import DdpArgs
from recipes.lib.arguments import TrainArgs, parse_or_exit
from recipes.lib.counted import Counted
from recipes.lib.decoding import Cache, advance
from recipes.lib.distributed import joined
from recipes.lib.first_steps_plots import first_steps_png
from recipes.lib.layout import Layout
from recipes.lib.measurements import Measurements, connect
from recipes.lib.model import Transformer
from recipes.lib.own_time import OwnTime
from recipes.lib.parallelism import attention_backends
from recipes.lib.request_stream import Served, arrivals, serve
from recipes.lib.roofline import Roof, measure_roof
from recipes.lib.tables import table, time_text
from recipes.lib.timing import most, once, together
from recipes.lib.training import Plan, Technique, make_plan, optimizer_step, recipe_main
from recipes.lib.workloads import Gain, Workload


@recipe_main
def main() -> None:
    """Measure both; rank 0 prints and draws."""
    args = parse_or_exit(FirstStepsArgs)
    with joined(args.device) as world, attention_backends(world.device):
        connect(world)
        plan = make_plan("ch1_first_steps", args, world)
        with Measurements("ch1_first_steps", world, 3, plan.run_directory) as results:
            roof = measure_roof(world, plan.precision.compute)
            results.note(kind="roof", **dataclasses.asdict(roof))
            alone = dist.new_group([0])  # made by all ranks, even by those that are not in it
            uses, model = trained_alone(plan, args, alone) if world.is_first else ([], None)
            gain = shared(plan, args, most(uses[0].seconds if uses else 0.0))
            results.add(f"{world.size} ranks: {gain.speedup:.2f} times as fast as one", **gain.figures())
            show_gain(gain, results)
            served, pace = None, 0.0
            if model is not None:
                uses += answered(model, args, world.device)
                served, pace = streamed(model, uses, args)
            together(world)  # the others have had nothing to do
            results.add("training, prefill, decoding", **{each.name: each.figures(roof) for each in uses})
            show_uses(uses, roof, results)
            results.add("a stream of requests", **(served.figures() if served else {}))
            if served is not None:
                show_stream(served, pace, args, results)
                first_steps_png(results.picture("first_steps.png"), gain, uses, roof, results.hardware)


def trained_alone(
    plan: Plan, args: FirstStepsArgs, alone: dist.ProcessGroup
) -> tuple[list[Workload], Transformer]:
    """Training on this rank, without the others; and the model to answer with."""
    plan = dataclasses.replace(plan, layout=Layout(0, 1, alone))
    baseline = Baseline.build(plan)
    seconds = median_step(plan, baseline, args)
    with Counted() as work:
        optimizer_step(plan, baseline, 1, OwnTime(baseline.model, plan.world.device))
    tokens = args.batch_size * args.sequence_length
    model = baseline.model.to(plan.precision.compute).requires_grad_(False)
    return [Workload("training", args.batch_size, tokens, work.flops, work.bytes, seconds)], model


def shared(plan: Plan, args: FirstStepsArgs, one: float) -> Gain:
    """The same batch on all ranks, with and without the exchange of gradients. `one` is one rank's time."""
    tokens = args.batch_size * args.sequence_length
    if plan.world.size == 1:
        return Gain(1, tokens, one, one, one)
    common = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
    replicated = Replicated.build(plan, DdpArgs(**common))
    several = most(median_step(plan, replicated, args))
    with replicated.model.no_sync():
        silent = most(median_step(plan, replicated, args))
    return Gain(plan.world.size, tokens, one, several, silent)


def median_step(plan: Plan, technique: Technique, args: FirstStepsArgs) -> float:
    """Seconds of a training step on this rank."""
    own, seconds = OwnTime(technique.model, plan.world.device), []
    for step in range(1, args.warmup_steps + args.steps + 1):
        seconds.append(once(functools.partial(optimizer_step, plan, technique, step, own), plan.world.device))
    return statistics.median(seconds[args.warmup_steps :])


def answered(model: Transformer, args: FirstStepsArgs, device: torch.device) -> list[Workload]:
    """One prompt: the whole of it at once, then an answer's token; and a token for each of a batch of answers."""
    found = []
    for name, rows, known, new in (
        ("prefill", 1, 0, args.prompt_tokens),
        ("decoding", 1, args.prompt_tokens, 1),
        ("decoding a batch", args.rows, args.prompt_tokens, 1),
    ):
        cache = Cache(model, rows, known + new)
        tokens_BS = random_tokens((rows, new), model, args.seed)
        lengths_B = torch.full((rows,), known, device=device)
        call = functools.partial(advance, model, cache, slice(None), tokens_BS, lengths_B, known + new)
        with Counted() as work:
            call()
        seconds = statistics.median(once(call, device) for _ in range(args.steps))
        found.append(Workload(name, rows, rows * new, work.flops, work.bytes, seconds))
    return found


def streamed(model: Transformer, uses: list[Workload], args: FirstStepsArgs) -> tuple[Served, float]:
    """Requests that arrive at `load` times the pace that the batch can keep up with; and that pace, per second."""
    seconds = {each.name: each.seconds for each in uses}
    # A request takes the device for its prefill and, together with the rest of the batch, for each further token.
    each_takes = seconds["prefill"] + seconds["decoding a batch"] * (args.new_tokens - 1) / args.rows
    due = arrivals(args.requests, args.load / each_takes, args.seed)
    prompts = random_tokens((args.requests, args.prompt_tokens), model, args.seed)
    return serve(model, list(prompts), due, rows=args.rows, new_tokens=args.new_tokens), 1 / each_takes


def random_tokens(shape: tuple[int, int], model: Transformer, seed: int) -> Tensor:
    """What a prompt says does not change what it costs."""
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(model.size.vocab_size, shape, generator=generator, device=device)


def show_gain(gain: Gain, results: Measurements) -> None:
    """The table of one rank and several."""
    rows = [["1", time_text(gain.one), f"{gain.tokens / gain.one:,.0f}", "", "", ""]]
    if gain.ranks > 1:
        share = f"{gain.exposed / gain.several:.0%}"
        rows.append(
            [
                *(str(gain.ranks), time_text(gain.several), f"{gain.tokens / gain.several:,.0f}"),
                *(f"{gain.speedup:.2f}", f"{gain.efficiency:.0%}", f"{time_text(gain.exposed)} ({share})"),
            ]
        )
    head = ["ranks", "a step takes", "tokens/s", "times as fast", "efficiency", "exchange not hidden"]
    results.show(f"\nthe same batch of {gain.tokens:,} tokens, trained\n" + table(head, rows))


def show_uses(uses: list[Workload], roof: Roof, results: Measurements) -> None:
    """The table of the workloads on one device."""
    rows = [
        [
            *(each.name, each.sequences, f"{each.tokens:,}", time_text(each.seconds)),
            *(f"{each.flops / 1e9:.3g}", f"{each.bytes / 1e9:.3g}", f"{each.intensity:.3g}"),
            f"{each.flops / each.seconds / roof.flops_per_second:.0%}",
            f"{each.bytes / each.seconds / roof.bytes_per_second:.0%}",
            each.limit(roof),
        ]
        for each in uses
    ]
    head = [
        "on one device",
        "sequences",
        "tokens",
        "takes",
        "GFLOP",
        "GB",
        "FLOP/byte",
        "of FLOP/s",
        "of GB/s",
        "limit",
    ]
    results.show(f"\n{roof.text()}\n{table(head, rows)}")


def show_stream(served: Served, pace: float, args: FirstStepsArgs, results: Measurements) -> None:
    """What the requests of the stream got, and what they mostly did: wait, or be answered."""
    found = served.figures()
    results.show(
        f"\n{args.requests} requests at {args.load:g} times the {pace:.3g} a second that the batch can answer: "
        f"{args.requests / served.seconds:.3g} requests/s, {served.tokens / served.seconds:,.0f} tokens/s, "
        f"{served.rows_used:.1f} of {args.rows} rows in use, {served.idle / served.seconds:.0%} of the time none"
    )
    names = {"wait": "for a free row", "first_token": "to the first token", "per_token": "per further token"}
    rows = [[names[n], *(time_text(found[f"{n}_{how}"]) for how in ("median", "max"))] for n in names]
    results.show(table(["a request takes", "median", "longest"], rows))
    answer = found["per_token_median"] * args.new_tokens
    limit = "queue" if found["wait_median"] > answer else "latency"
    what = {
        "queue": "requests wait longer than they are answered: more rows, or another device",
        "latency": "an answer takes as long as its tokens, one after the other, whoever else is served",
    }[limit]
    results.show(f"limit of the stream: {limit}; {what}")


if __name__ == "__main__":
    main()
