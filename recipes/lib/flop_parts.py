"""The arithmetic of a token by part, and what torch's own counter says of the real model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from recipes.lib.model import Transformer
from recipes.lib.model_sizes import ModelSize
from recipes.lib.parallelism import checkpoint_activations


@dataclass(frozen=True)
class Part:
    """FLOP per token of one part, forward and backward; their sum over all parts is `flops_per_token`."""

    name: str
    full: float
    causal: float
    products: bool
    """Whether these are products of matrices, which is all that torch's counter counts."""


def parts_of(size: ModelSize, sequence_length: int) -> list[Part]:
    """Formulas F (full) and C (causal) taken apart: 6 FLOP per multiplied parameter, and attention's two products."""
    width, heads = size.width, size.heads * size.head_dim
    kv = size.kv_heads * size.head_dim
    weights = {
        "attention projections": size.layers * width * (2 * heads + 2 * kv),
        "feed-forward": size.layers * 3 * width * size.ffn_width,
        "output projection": size.vocab_size * width,
        "gains of norms": (2 * size.layers + 1) * width,
    }
    found = [Part(name, 6.0 * count, 6.0 * count, "gains" not in name) for name, count in weights.items()]
    scores = 12.0 * size.layers * heads * sequence_length
    return [*found, Part("attention scores and values", scores, scores / 2, True)]


@dataclass(frozen=True)
class Counted:
    """FLOP per token by torch's counter."""

    forward: float
    backward: float
    """With what is recomputed."""
    by_operation: dict[str, float]


def counted(size: ModelSize, sequence_length: int, checkpointing: str = "none") -> Counted:
    """Count on the meta device: no memory, no arithmetic, and any size in a second.

    There attention is two plain products over all positions, so the count is of the `full` convention. (On a CPU the
    counter does not know the attention kernel and leaves it out; on a GPU it counts the whole matrix, too.)
    """
    with torch.device("meta"):
        model = Transformer(size)
        tokens_BS = torch.zeros(1, sequence_length, dtype=torch.long)
    checkpoint_activations(model, checkpointing)
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(tokens_BS, tokens_BS)
        forward = counter.get_total_flops()
        loss.backward()
    total = counter.get_total_flops()
    by_operation = {
        str(key): value / sequence_length for key, value in counter.get_flop_counts()["Global"].items()
    }
    return Counted(forward / sequence_length, (total - forward) / sequence_length, by_operation)
