"""Data parallelism from scratch: what DistributedDataParallel does, with broadcast and all-reduce alone.

    torchrun --nproc-per-node 2 -m recipes.ch2.data_parallel steps=20
    torchrun --nproc-per-node 2 -m recipes.ch2.data_parallel variant=compare bucket_mb=0.5

Every rank holds the whole model and trains on its own sequences. Two things keep the copies equal: all begin with rank
0's parameters, and all make the same update, with the sum of everybody's gradients. The variants differ in when that
sum is made:

- flat: after the backward pass, in one message. The network idles during the backward pass, the processor after it.
- bucketed: the same in several messages. Takes a bucket of memory for packing instead of another set of gradients.
- overlapped: a bucket leaves as soon as its gradients are there, while the backward pass computes the next ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.ch2.data_parallel_args import DataParallelArgs
from recipes.ch3.ddp import Replicated
from recipes.ch3.ddp_args import DdpArgs
from recipes.lib.arguments import TrainArgs, parse_or_exit
from recipes.lib.distributed import joined
from recipes.lib.gradient_sums import buckets, gradients_of, pack, sum_bucketed, sum_flat, unpack
from recipes.lib.metrics import say
from recipes.lib.model import Transformer
from recipes.lib.optimizer import build_optimizer
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.step_times import Contestant, compare
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, recipe_main, train


def broadcast_parameters(model: nn.Module) -> None:
    """Overwrite every rank's parameters with rank 0's."""
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)


def disagreement(model: nn.Module) -> float:
    """The largest difference between any two ranks in any parameter: 0 for copies that are equal."""
    apart = 0.0
    for parameter in model.parameters():
        highest, lowest = parameter.detach().clone(), parameter.detach().clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        apart = max(apart, (highest - lowest).max().item())
    return apart


class Summing(Protocol):
    """How the gradients of the ranks are summed."""

    def before_last_backward(self) -> None:
        """The next backward pass completes the step's gradients."""

    def after_last_backward(self) -> None:
        """Return when every `.grad` is the sum over all ranks."""


@dataclass(frozen=True)
class Afterwards:
    """Flat or in buckets, when the backward pass is over."""

    parameters: Sequence[nn.Parameter]
    size: float | None
    """Bytes of a bucket; None is one message."""

    def before_last_backward(self) -> None:
        """Nothing is sent before its end."""

    def after_last_backward(self) -> None:
        """Send everything."""
        gradients = gradients_of(self.parameters)
        if self.size is None:
            sum_flat(gradients)
        else:
            sum_bucketed(gradients, self.size)


class Overlapped:
    """Each bucket is sent by the hook of its last gradient, and waited for at the end only."""

    def __init__(self, parameters: Sequence[nn.Parameter], size: float) -> None:
        self._buckets = buckets(parameters, size)
        self._bucket_of = {each: number for number, bucket in enumerate(self._buckets) for each in bucket}
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, dist.Work]] = []
        self._listening = False
        for parameter in parameters:
            # After accumulation: `.grad` then holds all microbatches, and all uses of a tied table.
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def before_last_backward(self) -> None:
        """From now on a gradient that arrives is complete."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent, self._listening = [], True

    def _arrived(self, parameter: Tensor) -> None:
        if not self._listening:
            return  # more microbatches follow: what was sent now would have to be sent again
        self._missing[self._bucket_of[parameter]] -= 1
        # In the buckets' order, not in that of completion: all-reduces are matched by their order, and a rank
        # that sends two buckets the other way round adds one to the other.
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            row = pack(gradients_of(self._buckets[len(self._sent)]))
            work = dist.all_reduce(row, async_op=True)
            assert work is not None, "async_op gives a handle"
            self._sent.append((row, work))

    def after_last_backward(self) -> None:
        """Wait for the messages, in the order in which they left."""
        assert len(self._sent) == len(self._buckets), "a parameter has no gradient: its bucket never left"
        for bucket, (row, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            unpack(row, gradients_of(bucket))
        self._sent, self._listening = [], False


@dataclass(frozen=True)
class Copies:
    """A whole model on every rank, and how the copies' gradients are summed."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    plan: Plan
    summing: Summing

    @classmethod
    def build(cls, plan: Plan, args: DataParallelArgs) -> Copies:
        """The model with rank 0's initial weights, and its optimizer."""
        with torch.device("meta"):  # no memory yet: shapes only
            model = Transformer(plan.size)
        checkpoint_activations(model, args.activation_checkpointing)
        if args.compile:
            compile_blocks(model)
        model.to(plan.precision.master)
        # Each rank draws weights of its own. (The other recipes draw the same everywhere, and send nothing.)
        own_seed = dataclasses.replace(plan.args, seed=args.seed + plan.world.rank)
        initialize(model, dataclasses.replace(plan, args=own_seed))
        if args.broadcast:
            broadcast_parameters(model)
        parameters, size = list(model.parameters()), args.bucket_mb * 2**20
        summing: Summing = {
            "flat": lambda: Afterwards(parameters, None),
            "bucketed": lambda: Afterwards(parameters, size),
            "overlapped": lambda: Overlapped(parameters, size),
        }[args.variant]()
        return cls(model, build_optimizer(model, args), plan, summing)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; after the last one the gradients are summed over ranks."""
        total = torch.zeros((), device=token_count.device)
        for number, (tokens_BS, targets_BS) in enumerate(microbatches, start=1):
            if number == len(microbatches):
                self.summing.before_last_backward()
            with self.plan.precision.autocast(token_count.device):
                loss = self.model(tokens_BS, targets_BS)
            # Divided by the tokens of all ranks: the sum over ranks is then the gradient of the global mean.
            (loss / token_count).backward()
            total = total + loss.detach()
        self.summing.after_last_backward()
        return total


class Alone:
    """No sum at all: what a step takes when nothing is sent. Its copies would drift apart."""

    def before_last_backward(self) -> None:
        """Nothing."""

    def after_last_backward(self) -> None:
        """Nothing."""


def contestants(plan: Plan, args: DataParallelArgs) -> list[Contestant]:
    """All variants and torch's own, on the same work; the first sends nothing."""

    def copies(variant: str, plan: Plan) -> Copies:
        return Copies.build(plan, dataclasses.replace(args, variant=variant))

    def nothing_sent(plan: Plan) -> Copies:
        return dataclasses.replace(copies("flat", plan), summing=Alone())

    def by_torch(plan: Plan) -> Replicated:
        shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
        return Replicated.build(plan, DdpArgs(**shared, bucket_mb=math.ceil(args.bucket_mb)))

    size = f"{args.bucket_mb:g} MiB"
    return [
        Contestant("nothing is sent", plan, nothing_sent),
        Contestant("flat: one message", plan, functools.partial(copies, "flat")),
        Contestant(f"bucketed, {size}", plan, functools.partial(copies, "bucketed")),
        Contestant(f"overlapped, {size}", plan, functools.partial(copies, "overlapped")),
        Contestant(f"torch's DDP, {math.ceil(args.bucket_mb)} MiB", plan, by_torch),
    ]


@recipe_main
def main() -> None:
    """Train with a copy of the model on every rank, or time the variants."""
    args = parse_or_exit(DataParallelArgs)
    with joined(args.device) as world:
        plan = make_plan("ch2_data_parallel", args, world)
        if args.variant == "compare":
            compare(contestants(plan, args), trials=args.trials, budget=args.budget)
            return
        copies = Copies.build(plan, args)
        before = disagreement(copies.model)
        if world.is_first:
            how = "after the broadcast" if args.broadcast else "without a broadcast"
            say(f"{how} the copies differ by {before:.3g} in their first weights")
        train(plan, copies)
        after = disagreement(copies.model)
        if world.is_first:
            say(f"after the last step the copies differ by {after:.3g}")


if __name__ == "__main__":
    main()
