"""The projection onto the vocabulary and its cross-entropy as one operation, chunk by chunk.

A chunk's logits give its loss, and at once the gradient of its logits (softmax less one at the target): with them
everything that the backward pass will need, D numbers a token instead of V. No logits outlive their chunk and none are
computed twice. Recomputing them instead would cost 2·D·V more FLOP per token, 2% of Llama-3-8B's.

Suffixes of tensor names: T tokens, D model width, V vocabulary (or this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

IGNORE = -100
"""Target of a position that is not trained on (padding): it adds neither to the loss nor to the count."""

Chunk = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""x_TD, weight_VD, targets_T -> the summed loss, the gradient of x and of the weight."""


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of the vocabulary this rank has, where tensor parallelism splits them."""

    first: int
    rows: int
    most_rows: int
    """Of any rank: the last ones have fewer where the split is uneven."""
    group: dist.ProcessGroup
    """The ranks that have the other rows."""

    @classmethod
    def of(cls, weight_VD: DTensor) -> VocabularyPart:
        """The part in a table that is split by rows."""
        mesh = weight_VD.device_mesh
        most = -(-weight_VD.shape[0] // mesh.size())
        first = min(mesh.get_local_rank() * most, weight_VD.shape[0])
        return cls(first, weight_VD.to_local().shape[0], most, mesh.get_group())

    def loss_and_gradients(
        self, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the function of this name; the loss is whole on every rank, the gradient of x is this part's alone."""
        exact_TV = _exact_logits(x_TD, weight_VD)
        # An empty part (more ranks than rows) has no maximum of its own.
        largest_T = exact_TV.amax(1) if self.rows else exact_TV.new_full((len(exact_TV),), -torch.inf)
        dist.all_reduce(largest_T, dist.ReduceOp.MAX, self.group)
        exact_TV -= largest_T[:, None]
        local_T = targets_T - self.first
        mine_T = (local_T >= 0) & (local_T < self.rows)
        own_T = torch.where(mine_T, local_T, 0)[:, None]
        at_target_T = exact_TV.gather(1, own_T)[:, 0] * mine_T if self.rows else torch.zeros_like(largest_T)
        sums_2T = torch.stack((exact_TV.exp_().sum(1), at_target_T))
        dist.all_reduce(sums_2T, group=self.group)
        total_T, at_target_T = sums_2T
        counts_T = targets_T != IGNORE
        loss = ((total_T.log() - at_target_T) * counts_T).sum()
        exact_TV *= (counts_T / total_T)[:, None]
        if self.rows:
            exact_TV.scatter_add_(1, own_T, -(mine_T & counts_T).to(exact_TV.dtype)[:, None])
        return loss, *_gradients(exact_TV, x_TD, weight_VD)


def loss_and_gradients(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of one chunk, summed over its tokens, and its gradients with respect to x and the weight.

    The softmax is computed in float32, or wider if `x_TD` is.
    """
    exact_TV = _exact_logits(x_TD, weight_VD)
    counts_T = targets_T != IGNORE
    target_T1 = torch.where(counts_T, targets_T, 0)[:, None]
    largest_T1 = exact_TV.amax(1, keepdim=True)
    exact_TV -= largest_T1
    at_target_T = exact_TV.gather(1, target_T1)[:, 0]
    exact_TV.exp_()
    total_T = exact_TV.sum(1)
    loss = ((total_T.log() - at_target_T) * counts_T).sum()
    exact_TV *= (counts_T / total_T)[:, None]
    exact_TV.scatter_add_(1, target_T1, -counts_T.to(exact_TV.dtype)[:, None])
    return loss, *_gradients(exact_TV, x_TD, weight_VD)


def _exact_logits(x_TD: Tensor, weight_VD: Tensor) -> Tensor:
    logits_TV = F.linear(x_TD, weight_VD)
    return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))


def _gradients(gradient_TV: Tensor, x_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and of the weight, from that of the logits, in the dtype that the forward product had."""
    rounded_TV = gradient_TV.to(weight_VD.dtype)
    return rounded_TV @ weight_VD, rounded_TV.T @ x_TD


def fused_loss(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunks: int, compute: Chunk) -> Tensor:
    """Summed cross-entropy whose gradients are ready when the forward pass is over.

    `compute` does each of `chunks` equal parts of the tokens.
    """
    losses, parts_of_x, weight_gradient = [], [], None
    with torch.no_grad():
        for x, targets in zip(x_TD.chunk(chunks), targets_T.chunk(chunks), strict=True):
            loss, of_x, of_weight = compute(x, weight_VD, targets)
            losses.append(loss)
            parts_of_x.append(of_x)
            if chunks == 1:
                weight_gradient = of_weight
            elif weight_gradient is None:
                # In float32: a sum of many chunks in bfloat16 would lose the small ones.
                weight_gradient = of_weight.to(torch.promote_types(of_weight.dtype, torch.float32))
            else:
                weight_gradient += of_weight
            # Or it would live beside the next chunk's: 1 GiB of Llama-3-8B's vocabulary.
            del of_weight
        assert weight_gradient is not None
        total = torch.stack(losses).sum()
        x_gradient, weight_gradient = torch.cat(parts_of_x), weight_gradient.to(weight_VD.dtype)
    # A sum of two, so that an operation of torch's own is where the paths of x and the weight meet: zero-bubble
    # schedules cut the graph there, which torch 2.11 cannot do at a Function of Python's (it says that
    # '_input_metadata' is invalid).
    found: Tensor = _Known.apply(x_TD, x_gradient, total)
    return found + _Known.apply(weight_VD, weight_gradient, torch.zeros_like(total))


class _Known(torch.autograd.Function):
    """A number, with a gradient that is known already."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, gradient: Tensor, value: Tensor
    ) -> Tensor:
        """`value`, whose gradient with respect to `tensor` is `gradient`."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, times that of the number."""
        (known,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return known * gradient.to(known.dtype), None, None
