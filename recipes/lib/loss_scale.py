"""Dynamic loss scaling: what lets float16 train.

float16 ends at 65,504 and keeps nothing below 6e-8, where many gradients are. So the loss is multiplied by a large
number before the backward pass, and the gradients are divided by it afterwards, in float32. The number is found while
training: halved where a gradient overflows, doubled after a long time without.

torch.amp.GradScaler leaves out the optimizer step whose gradient overflowed. Here the step's backward passes are
repeated with the halved number instead, so that no batch is lost and every step of every run is the same step.
bfloat16 has float32's range and needs none of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

FIRST = 2.0**16
SMALLEST = 1.0
"""A gradient that overflows with this one is not too large, it is wrong: the training loop says so."""
GROWTH_STEPS = 2000
"""Steps without an overflow after which the number is doubled (GradScaler's)."""


class LossScale:
    """The number, powers of two only: dividing by it loses nothing. The same on every rank."""

    def __init__(self) -> None:
        self.value = FIRST
        self.steps_since_change = 0

    def gradients(self, model: nn.Module, passes: Callable[[float], Tensor]) -> Tensor:
        """Call `passes`, which leaves gradients times the number that it is given in `model`, until none overflows.

        Gives what it gave; the gradients are divided by the number. They must be equal on all ranks, so that all of
        them repeat or none does. Waits for the device once a step, to see whether they are finite.
        """
        while True:
            result = passes(self.value)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            finite = math.isfinite(nn.utils.get_total_norm(gradients).item())
            if finite or self.value <= SMALLEST:
                break
            self.value, self.steps_since_change = self.value / 2, 0
            model.zero_grad()
        torch._foreach_mul_(gradients, 1 / self.value)
        self.steps_since_change += 1
        if self.steps_since_change == GROWTH_STEPS:
            self.value, self.steps_since_change = self.value * 2, 0
        return result

    def state(self) -> dict[str, float]:
        """What a resumed run goes on with."""
        return {"loss_scale": self.value, "loss_scale_steps": self.steps_since_change}

    def restore(self, state: dict[str, float]) -> None:
        """Go on with `state`; one without a number is of a run in another format, and this one begins anew."""
        self.value = state.get("loss_scale", FIRST)
        self.steps_since_change = int(state.get("loss_scale_steps", 0))
