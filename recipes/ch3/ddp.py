"""Distributed data parallelism: every rank holds the whole model and trains on its part of the batch.

    torchrun --nproc-per-node 2 -m recipes.ch3.ddp steps=20

Gradients are summed over the ranks in buckets while the backward pass still computes the next ones. With
several microbatches a step, only the last backward pass sends anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from recipes.ch3.ddp_args import DdpArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.distributed import joined
from recipes.lib.model import Transformer
from recipes.lib.optimizer import build_optimizer
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, recipe_main, train


@dataclass(frozen=True)
class Replicated:
    """A whole model on every rank, its gradients summed over all of them."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    plan: Plan

    @classmethod
    def build(cls, plan: Plan, args: DdpArgs) -> Replicated:
        """The wrapped model with its initial weights, and its optimizer."""
        with torch.device("meta"):  # no memory yet: shapes only
            model = Transformer(plan.size)
        checkpoint_activations(model, args.activation_checkpointing)
        if args.compile:
            compile_blocks(model)
        model.to(plan.precision.master)
        initialize(model, plan)
        replicated = DistributedDataParallel(
            model,
            device_ids=[plan.world.device.index] if plan.world.device.type == "cuda" else None,
            bucket_cap_mb=args.bucket_mb,
            gradient_as_bucket_view=args.gradient_as_bucket_view,
        )
        return cls(replicated, build_optimizer(replicated, args), plan)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; the last backward pass sums the gradients over ranks."""
        # DDP divides the sum by the number of ranks: right for ranks of equal shares whose losses are means.
        # These losses are parts of one global mean already, so the division is undone.
        ranks = self.plan.world.size
        total = torch.zeros((), device=token_count.device)
        for number, (tokens_BS, targets_BS) in enumerate(microbatches, start=1):
            last = number == len(microbatches)
            # no_sync: gradients only add up locally. It must enclose the forward pass, too, which is where
            # DDP decides whether to listen for gradients.
            with nullcontext() if last else self.model.no_sync():
                with self.plan.precision.autocast(token_count.device):
                    loss = self.model(tokens_BS, targets_BS)
                (loss * ranks / token_count).backward()
            total = total + loss.detach()
        return total


@recipe_main
def main() -> None:
    """Train with a copy of the model on every rank."""
    args = parse_or_exit(DdpArgs)
    with joined(args.device) as world:
        plan = make_plan("ch3_ddp", args, world)
        train(plan, Replicated.build(plan, args))


if __name__ == "__main__":
    main()
