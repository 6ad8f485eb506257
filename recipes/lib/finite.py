"""Whose numbers went wrong first: what each rank computed by itself, before the sums over ranks hid it.

A loss or a gradient that is no number spreads to every rank in the same step, because both are sums over all of them.
So a rank keeps, of each step since the last line of metrics, what it had computed alone: its share of the loss, and one
number per sequence of the gradient that arrived at its first layer. That is a copy of a few bytes on the device; nobody
waits for it, and nobody reads it until the sum is wrong.

Not seen here: a gradient of weights alone that goes wrong in a rank whose activations' gradients are good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recipes.lib.distributed import World
from recipes.lib.model import Block


class NotFinite(Exception):
    """The loss or the gradient is nan or infinite: going on would train on nothing and save it."""


@dataclass(frozen=True)
class _Step:
    step: int
    loss: Tensor
    grad_norm: Tensor
    """Both of the global batch."""
    own_loss: Tensor
    own_gradients: list[Tensor]


@dataclass(frozen=True)
class Account:
    """What one rank says of its own numbers in a step."""

    loss: float
    gradient_is_finite: bool


class OwnNumbers:
    """This rank's own numbers in the steps since `forget`."""

    def __init__(self, model: nn.Module) -> None:
        self._steps: list[_Step] = []
        self._gradients: list[Tensor] = []
        first = next((module for module in model.modules() if isinstance(module, Block)), None)
        if first is not None:  # a model of other parts: its loss alone is known
            first.register_forward_pre_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(self._keep)

    def _keep(self, gradient_BSD: Tensor) -> None:
        # Under causal attention the first position has a part in every later one, so what is wrong in any of them
        # is wrong in its gradient. Cloned: a view would keep the whole gradient in memory.
        local = gradient_BSD.to_local() if isinstance(gradient_BSD, DTensor) else gradient_BSD
        self._gradients.append(local.detach()[..., :1, 0].clone())

    def keep(self, step: int, own_loss: Tensor, loss: Tensor, grad_norm: Tensor) -> None:
        """After each step: `own_loss` is of this rank's sequences, the others of the global batch."""
        self._steps.append(_Step(step, loss, grad_norm, own_loss, self._gradients))
        self._gradients = []

    def forget(self) -> None:
        """The steps until here were finite: such a loss and norm come from parameters and gradients that are."""
        self._steps = []

    def first_wrong(self, world: World) -> str:
        """Which step since `forget` was the first to go wrong and on which ranks; all ranks call this together."""
        wrong = next(
            kept for kept in self._steps if not (_is_finite(kept.loss) and _is_finite(kept.grad_norm))
        )
        mine = Account(
            wrong.own_loss.item(), all(bool(each.isfinite().all()) for each in wrong.own_gradients)
        )
        accounts = [mine] * world.size
        if world.size > 1:
            dist.all_gather_object(accounts, mine, group=world.patient)
        values = f"loss {wrong.loss.item():g}, gradient norm {wrong.grad_norm.item():g}"
        return f"step {wrong.step}: {values}; {blame(accounts)}"


def blame(accounts: Sequence[Account]) -> str:
    """The ranks whose own numbers are wrong, by the accounts of all. Pure."""
    losses = [rank for rank, account in enumerate(accounts) if not math.isfinite(account.loss)]
    if losses:
        own = accounts[losses[0]].loss
        return f"first wrong on {_named(losses, accounts)}: the loss of its own sequences is {own:g}"
    gradients = [rank for rank, account in enumerate(accounts) if not account.gradient_is_finite]
    if gradients:
        named = _named(gradients, accounts)
        return f"first wrong on {named}: its own loss is finite, its backward pass made the gradient"
    return "no rank is to blame: the loss and the activations' gradients of each are finite"


def _named(ranks: Sequence[int], accounts: Sequence[Account]) -> str:
    if len(ranks) == len(accounts) > 1:
        return f"all {len(ranks)} ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _is_finite(value: Tensor) -> bool:
    return math.isfinite(value.item())
