"""Which cuts of a model its shape allows: the launcher asks before submission, so no torch here."""

from __future__ import annotations

import math

from recipes.lib.arguments import ArgumentError
from recipes.lib.model_sizes import SIZES


def check_tensor_and_context(model: str, tensor: int, context: int) -> None:
    """Refuse ranks of one layer that would not get equal parts of it. Raises ArgumentError.

    `tensor` ranks share the heads, the key/value heads and the feed-forward features; `context` ranks then
    exchange whole heads of what one of those has.
    """
    size = SIZES[model]
    nearest = nearest_divisor(math.gcd(size.heads, size.kv_heads, size.ffn_width), tensor)
    for what, number in (
        ("heads", size.heads),
        ("key/value heads", size.kv_heads),
        ("features", size.ffn_width),
    ):
        if number % tensor:
            problem = f"wants a divisor of the {number} {what} of model={model}; nearest: {nearest}"
            raise ArgumentError("tensor_parallel", tensor, problem)
    heads, kv_heads = size.heads // tensor, size.kv_heads // tensor
    # Where there are fewer key/value heads than ranks, several of them get the same ones.
    if heads % math.lcm(kv_heads, context):
        left = f"{heads} heads over {kv_heads} key/value heads"
        nearest = nearest_divisor(heads, context)  # kv_heads divide heads: a multiple of both does, too
        problem = f"does not divide the {left} that a rank has of model={model}; nearest: {nearest}"
        raise ArgumentError("context_parallel", context, problem)


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; the smaller one of two."""
    divisors = [each for each in range(1, number + 1) if number % each == 0]
    return min(divisors, key=lambda each: (abs(each - wanted), each))
