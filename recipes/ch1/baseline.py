"""The baseline: a model trained on one device, without torch.distributed.

    python -m recipes.ch1.baseline steps=20

Every other recipe does what this one does, on more devices; their tests hold their loss and gradient norm
against this one's. Mixed precision is autocast's: parameters stay in float32 and are rounded to bfloat16
where they are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.ch1.baseline_args import BaselineArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.distributed import alone
from recipes.lib.model import Transformer
from recipes.lib.optimizer import build_optimizer
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, recipe_main, train


@dataclass(frozen=True)
class Baseline:
    """A whole model on one device."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    plan: Plan

    @classmethod
    def build(cls, plan: Plan) -> Baseline:
        """The model with its initial weights, and its optimizer."""
        args = plan.args
        with torch.device("meta"):  # no memory yet: shapes only
            model = Transformer(plan.size)
        checkpoint_activations(model, args.activation_checkpointing)
        if args.compile:
            compile_blocks(model)
        model.to(plan.precision.master)
        initialize(model, plan)
        return cls(model, build_optimizer(model, args), plan)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; `.grad` adds up over them."""
        total = torch.zeros((), device=token_count.device)
        for tokens_BS, targets_BS in microbatches:
            with self.plan.precision.autocast(token_count.device):
                loss = self.model(tokens_BS, targets_BS)
            # The model gives a sum. Divided by the tokens of the whole batch, not of this microbatch, the
            # gradients of microbatches of any size add up to that of the mean.
            (loss / token_count).backward()
            total = total + loss.detach()
        return total


@recipe_main
def main() -> None:
    """Train on one device."""
    args = parse_or_exit(BaselineArgs)
    with alone(args.device) as world:
        plan = make_plan("ch1_baseline", args, world)
        train(plan, Baseline.build(plan))


if __name__ == "__main__":
    main()
