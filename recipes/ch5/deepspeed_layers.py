"""The shared model as DeepSpeed's PipelineModule wants it: a list in which each one's output is the next one's input.

Each stage makes only what is its own. Layers have numbers for names there; `as_model` gives them those that they have
in the whole model, so that a checkpoint of a pipeline is one of any other recipe.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from recipes.lib.model import Block, Head, Transformer, rotary_table
from recipes.lib.model_sizes import ModelSize
from recipes.lib.parallelism import Precision


class Table(nn.Embedding):
    """The embedding of tokens; where it is tied, the last stage has another copy of it."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__(size.vocab_size, size.width)


class Layer(Block):
    """A block that finds its rotary tables by itself: only one tensor is handed from layer to layer."""

    def __init__(self, size: ModelSize, precision: Precision) -> None:
        super().__init__(size)
        self.size, self.precision = size, precision

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        with self.precision.autocast(x_BSD.device):
            return super().forward(x_BSD, *rotary_table(self.size, x_BSD.shape[1], x_BSD.device))


class Norm(nn.RMSNorm):
    """The last norm."""

    def __init__(self, size: ModelSize, precision: Precision) -> None:
        super().__init__(size.width, eps=size.norm_epsilon)
        self.precision = precision

    def forward(self, x_BSD: Tensor) -> Tensor:
        with self.precision.autocast(x_BSD.device):
            return super().forward(x_BSD)


class LastHead(Head):
    """The head's weight at the end of the list; it is used in the loss, which DeepSpeed calls after the list."""

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        return x_BSD


class Loss:
    """The summed cross-entropy of a microbatch, scaled as DeepSpeed wants it; and its sum over microbatches."""

    def __init__(self, size: ModelSize, precision: Precision) -> None:
        # As a tied one it owns no weight, and is handed whichever there is.
        self._head, self._precision = Head(dataclasses.replace(size, tied=True)), precision
        self.weight: Tensor | None = None
        """Of the stage that has the head; None in the others, where no loss is computed."""
        self.scale: Tensor | float = 1.0
        self.total = torch.zeros(())

    def __call__(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        with self._precision.autocast(x_BSD.device):
            loss: Tensor = self._head(x_BSD, targets_BS, self.weight)
        self.total = self.total + loss.detach()
        return loss * self.scale


def as_list(size: ModelSize, precision: Precision, pipe: Any) -> list[Any]:
    """What each stage makes its part of; `pipe` is deepspeed.pipe."""
    layers = [pipe.LayerSpec(Layer, size, precision) for _ in range(size.layers)]
    norm = pipe.LayerSpec(Norm, size, precision)
    if not size.tied:
        return [pipe.LayerSpec(Table, size), *layers, norm, pipe.LayerSpec(LastHead, size)]
    # One key, two stages: DeepSpeed sums the gradients of both copies.
    last = pipe.TiedLayerSpec("table", Table, size, forward_fn=lambda table, x_BSD: x_BSD)
    return [pipe.TiedLayerSpec("table", Table, size), *layers, norm, last]


def as_model(module: nn.Module, size: ModelSize) -> Transformer:
    """The layers of this stage under the names that they have in the whole model; it is never called."""
    with torch.device("meta"):
        model = Transformer(size)
    parts = dict(module.named_children())
    tied = dict(parts.pop("tied_modules").named_children())
    layers = {str(int(number) - 1): part for number, part in parts.items() if isinstance(part, Layer)}
    model.layers = nn.ModuleDict(layers)  # with their numbers for names, unlike a shorter list
    model.embed_tokens = tied.get("table") or parts.get("0")
    model.norm = parts.get(str(size.layers + 1))
    model.lm_head = parts.get(str(size.layers + 2))
    return model
