"""`parity` with mixtures of experts among its techniques: DeepSpeed's, and one in plain torch to hold them against.

python -m tests.recipes.moe_parity FOLDER CASES.json cpu    (one rank; torch's variables in the environment)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.ch5.deepspeed_moe import Experts, make_layout
from recipes.ch5.deepspeed_moe_args import DeepSpeedMoeArgs
from recipes.lib.model import FeedForward, Transformer, materialize
from recipes.lib.model_sizes import ModelSize
from recipes.lib.optimizer import build_optimizer
from recipes.lib.training import Microbatch, Plan
from tests.recipes import parity


class PlainMixture(nn.Module):
    """All experts in one place: each computes all tokens, and what it was not chosen for counts nothing.

    By the definition of GShard (arXiv 2006.16668): T tokens, E experts.
    """

    def __init__(self, size: ModelSize, args: DeepSpeedMoeArgs) -> None:
        super().__init__()
        self.args = args
        self.router = nn.Linear(size.width, args.experts, bias=False)
        self.experts = nn.ModuleDict({str(number): FeedForward(size) for number in range(args.experts)})
        self.balance = self.wanted = torch.zeros(())

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        likely_TE = F.softmax(self.router(x_TD), dim=1)
        first_TE = F.one_hot(likely_TE.argmax(1), self.args.experts)
        self.balance = self.args.experts * (likely_TE.mean(0) * first_TE.float().mean(0)).sum()
        choices = [first_TE]
        if self.args.experts_per_token == 2:
            rest_TE = likely_TE.masked_fill(first_TE.bool(), -1)
            choices.append(F.one_hot(rest_TE.argmax(1), self.args.experts))
        self.wanted = sum(choices).sum(0)
        if self.args.drop_tokens:
            choices = self._with_room(choices)
        chosen_TE = sum(choices) * likely_TE
        if self.args.experts_per_token == 2:  # of two, the weights add up to one
            chosen_TE = chosen_TE / chosen_TE.sum(1, keepdim=True).clamp(min=1e-7)
        output_TD = sum(
            chosen_TE[:, n, None] * expert(x_TD) for n, expert in enumerate(self.experts.values())
        )
        return output_TD.view_as(x_BSD)

    def _with_room(self, choices: list[Tensor]) -> list[Tensor]:
        """First choices in their order, then second ones, until an expert is full."""
        tokens, experts = choices[0].shape
        room = -(-tokens * self.args.capacity_factor * len(choices) // experts)
        places, before_E = [], torch.zeros(experts, dtype=torch.long, device=choices[0].device)
        for choice_TE in choices:
            place_TE = choice_TE.cumsum(0) - 1 + before_E
            places.append(choice_TE * (place_TE < room))
            before_E = before_E + choice_TE.sum(0)
        return places


@dataclass(frozen=True)
class Plain:
    """One process that has everything, with torch's AdamW."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    args: DeepSpeedMoeArgs

    @classmethod
    def build(cls, plan: Plan, args: DeepSpeedMoeArgs) -> Plain:
        with torch.device("meta"):
            model = Transformer(plan.size)
            for layer in model.layers:
                layer.mlp = PlainMixture(plan.size, args)
        materialize(model, args.seed, plan.world.device)
        return cls(model, build_optimizer(model, args), args)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        total = torch.zeros((), device=token_count.device)
        for tokens_BS, targets_BS in microbatches:
            loss = self.model(tokens_BS, targets_BS)
            balance = sum(layer.mlp.balance for layer in self.model.layers)
            (loss / token_count + self.args.load_balance * balance / len(microbatches)).backward()
            total += loss.detach()
        return total


parity.TECHNIQUES["mixture"] = parity.Kind(DeepSpeedMoeArgs, Experts.build, make_layout)
parity.TECHNIQUES["plain_mixture"] = parity.Kind(DeepSpeedMoeArgs, Plain.build)

if __name__ == "__main__":
    parity.main()
