"""A part of the layers: the shared model cut into stages, whose parameters keep their names in the whole.

So a checkpoint of one number of stages loads into any other, and into DDP and FSDP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recipes.lib.model import Transformer, rotary_table
from recipes.lib.parallelism import Precision


class Stage(nn.Module):
    """Consecutive layers; the first stage has the embedding before them, the last one the norm and the head after.

    `forward` gives what the next stage wants, [B, S, D] in the master format; the last one's goes to `loss`. The
    modules belong to a `Transformer`, too, in which their parameters have their names.
    """

    def __init__(self, model: Transformer, number: int, count: int, precision: Precision) -> None:
        super().__init__()
        self.number, self.is_first, self.is_last = number, number == 0, number == count - 1
        self.size, self.precision = model.size, precision
        layers = dict(model.layers.named_children())
        self.layers = nn.ModuleList(
            layers[str(layer)] for layer in layers_of(number, count, model.size.layers)
        )
        has_table = self.is_first or (self.is_last and self.size.tied)
        self.embed_tokens = model.embed_tokens if has_table else None
        self.norm = model.norm if self.is_last else None
        self.lm_head = model.lm_head if self.is_last else None

    def forward(self, input: Tensor) -> Tensor:
        """Of tokens [B, S] in the first stage, of the stage before's output [B, S, D] in the others."""
        with self.precision.autocast(input.device):
            rotation = rotary_table(self.size, input.shape[1], input.device)
            x_BSD = self.embed_tokens(input) if self.is_first else input
            for layer in self.layers:
                x_BSD = layer(x_BSD, *rotation)
            return x_BSD if self.norm is None else self.norm(x_BSD)

    def loss(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """The summed cross-entropy of the last stage's output."""
        with self.precision.autocast(x_BSD.device):
            table_VD = self.embed_tokens.weight if self.size.tied else None
            output: Tensor = self.lm_head(x_BSD, targets_BS, table_VD)
            return output


def layers_of(stage: int, stages: int, layers: int) -> range:
    """The layers of a stage: as many in each as possible, one more in the first ones where they do not divide.

    The last stage has the head besides, and is better off with fewer.
    """
    least, more = divmod(layers, stages)
    begin = stage * least + min(stage, more)
    return range(begin, begin + least + (stage < more))


def keep_stages(model: Transformer, stages: Sequence[int], count: int) -> None:
    """Remove from `model` what belongs to none of `stages`, of `count` in all.

    Call it while the model is on the meta device: what is removed never takes memory. A tied table is wanted in the
    first stage and in the last.
    """
    kept = {layer for stage in stages for layer in layers_of(stage, count, model.size.layers)}
    layers = {str(number): layer for number, layer in enumerate(model.layers) if number in kept}
    model.layers = nn.ModuleDict(layers)  # with their numbers for names, unlike a shorter list
    has_first, has_last = 0 in stages, count - 1 in stages
    if not has_first and not (has_last and model.size.tied):
        model.embed_tokens = None
    if not has_last:
        model.norm = model.lm_head = None


def activations(model: Transformer, rows: int, length: int, precision: Precision) -> Tensor:
    """What one stage hands to the next, on the meta device: shape and format alone.

    The residual stream stays in the master format, also where the matrix products are in bfloat16.
    """
    return torch.empty(rows, length, model.size.width, dtype=precision.master, device="meta")
