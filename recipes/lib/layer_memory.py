"""Bytes that one layer and the head keep and need, operation by operation, for `recipes.lib.model`. Pure; no torch.

Letters as in the model: D width, F feed-forward width, A all query heads together, K all key/value heads together, V
vocabulary. Counted by hand from the model's code; `tests/recipes/test_memory_model.py` holds them against torch's own
accounting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.lib.calibration import Calibration
from recipes.lib.workload import Stage, Workload

MAX_LOGITS = 2**29
"""As in `recipes.lib.model`, which imports torch; a test holds them equal."""


@dataclass(frozen=True)
class LayerBytes:
    """Of one microbatch in one layer."""

    kept: float
    """From the forward pass until the layer's backward pass."""
    backward: float
    """More than that, at the fullest moment of the layer's backward pass."""


def layer_bytes(work: Workload, calibration: Calibration) -> LayerBytes:
    """What the three modes of recomputation keep, and what the backward pass adds.

    That moment is in the feed-forward: gradients of both factors of its product exist beside what they are made of.
    """
    size, tokens, split = work.size, work.tokens, work.tensor
    number, stream = work.compute_bytes, work.residual_bytes
    x = tokens * size.width * stream / split
    # Inputs of matrix products: gathered where tensor parallelism splits them.
    d = tokens * size.width * number
    q = tokens * size.heads * size.head_dim * number / split
    k = v = tokens * size.kv_heads * size.head_dim * number / split
    f = tokens * size.ffn_width * number / split
    logsumexp = tokens * size.heads * 4 / split
    roots = 2 * tokens * 4 / split  # of both norms
    down_gradient = size.width * size.ffn_width * number / split
    out = x / stream * number  # of o_proj and down_proj
    if work.compiled:
        # What torch's min-cut partitioner chooses: SiLU and rotation again, products of matrices kept.
        everything = x + d + q + k + v + q + logsumexp + out + d + 3 * f + roots
        products = x + q + k + v + q + logsumexp + out + 2 * f
        backward = {
            "none": x + 2 * f - f + down_gradient,
            "selective": x + calibration.compiled_backward_f * f,
            "full": (everything - x) + x + calibration.compiled_backward_f * f - f,
        }
    else:
        everything = x + d + q + k + v + q + logsumexp + x + d + 4 * f + roots
        # Selective keeps the result of every product, also of those whose result no gradient needs.
        products = x + q + k + v + out + 2 * f + out + q + logsumexp
        grown = x + 2 * f + down_gradient
        again = d + q + k + x + d + 2 * f + roots - (q + k + 2 * out)
        backward = {"none": grown, "selective": grown + again, "full": grown + everything - x}
    kept = {"none": everything, "selective": products, "full": x}
    return LayerBytes(kept[work.checkpointing], backward[work.checkpointing])


def chunks(work: Workload) -> int:
    """Into how many parts the head takes the tokens."""
    return max(1, math.ceil(work.tokens * work.size.vocab_size / MAX_LOGITS))


def head_bytes(work: Workload, stage: Stage) -> tuple[float, float]:
    """Of the norm, the projection and the loss: logits at their fullest moment, and everything around them.

    Fused, that is at the last chunk's gradient of the weight: its logits in float32 and rounded, that gradient, and
    where there are several chunks their sum in float32. Compiled, the float32 ones are gone by then; an estimate, which
    no measurement has met yet.

    Not fused, it is the backward pass of the softmax: its result, its gradient and the gradient before it, each in
    float32. Compiled, it is two arrays of logits, or one and the gradient of the weight.
    """
    size, number = work.size, work.compute_bytes
    parts = chunks(work)
    rows = math.ceil(work.tokens / parts)
    logits = rows * stage.vocabulary
    wide = max(4, number)
    weight_gradient = stage.vocabulary * size.width * number
    before = weight_gradient if parts > 1 else 0
    if work.fused_loss:
        chunk_of_x = rows * size.width * number
        summed = stage.vocabulary * size.width * wide if parts > 1 else 0
        made, product = logits * (wide + number), chunk_of_x + weight_gradient
        fullest = summed + (max(made, logits * number + product) if work.compiled else made + product)
    elif work.compiled:
        fullest = before + logits * number + max(logits * number, weight_gradient)
    else:
        fullest = before + max(3 * logits * wide, logits * number + weight_gradient)
    hidden = work.tokens * size.width * (work.residual_bytes / work.tensor + number)
    if work.fused_loss and work.residual_bytes > number:
        # The norm's result before it is rounded: the forward pass has not let go of it.
        hidden += work.tokens * size.width * work.residual_bytes
    finished = (parts - 1) * rows * size.width * number
    return fullest, hidden + finished
