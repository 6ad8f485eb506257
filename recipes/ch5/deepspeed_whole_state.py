"""Without ZeRO: what a rank has of model and optimizer in DeepSpeed's engine, as checkpoints name it.

torch's own way goes by the module tree, in which each expert of a mixture is twice: under its own number, and under the
number that DeepSpeed gives it on its rank. Here are the former alone, as `ZeroState` has them for the other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipes.lib.memory import Kept, kept_bytes


class WholeState:
    """Parameters and AdamW's state, whole; the experts are those of this rank."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._adamw = model, optimizer
        self._named = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._named.items()}

    def model(self) -> dict[str, Tensor]:
        """The parameters."""
        return {name: parameter.detach() for name, parameter in self._named.items()}

    def optimizer(self) -> dict[str, Any]:
        """State and options under each parameter's name; made where there was no step yet, as AdamW makes it."""
        found: dict[str, Any] = {}
        options = torch.optim.AdamW([torch.empty(0)], fused=True).param_groups[0].keys() - {"params"}
        for group in self._adamw.param_groups:
            in_it = {id(parameter) for parameter in group["params"]}
            for name, parameter in self._named.items():
                if id(parameter) not in in_it:
                    continue
                state = self._adamw.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                found |= {f"state.{name}.{key}": value for key, value in state.items()}
                found |= {f"param_groups.{name}.{option}": group[option] for option in options}
        return found

    def loaded(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Nothing is left to do: all was filled in place, and options follow from the arguments."""

    def take(self, model: Mapping[str, Any]) -> None:
        """Nothing is left to do, either."""

    def fill(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Give every parameter its initial values."""
        for name, shape in self.shapes.items():
            self._named[name].detach().copy_(value(name, shape))

    def kept(self) -> Kept:
        """Bytes on this rank between two steps."""
        return kept_bytes(self._model, self._adamw)
