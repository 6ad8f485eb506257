"""Tensor parallelism by hand: which slice of each matrix a rank holds, and the four messages between slices.

A product of two matrices is split in one of two ways over the ranks of a group:

- by columns (of the transposed weight: rows of [out, in]): each rank computes its part of the *outputs* from the whole
  input. Nothing is sent.
- by rows: each rank has a part of the *inputs* and computes a term of the whole output. The terms must be added up.

One after the other they need one sum: q, k, v are split by columns, which gives each rank some heads of its own, and o
by rows; gate and up by columns, down by rows. So a layer sends twice in its forward pass, after the attention and
after the feed-forward, and twice in its backward pass, at the same two places before them.

The parameters are DTensors. Here they are labels only ("this is slice 1 of 2 of that matrix"), by which checkpoints,
the optimizer and the gradient's norm know the whole; all arithmetic and all messages are on plain local tensors.

Suffixes of tensor names as in `recipes.lib.model`; L is the local part of a dimension.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from recipes.lib.collectives import all_gather_single, reduce_scatter_single
from recipes.lib.model import IGNORE, MAX_LOGITS, Block, Head, Transformer

# ---- Messages, each with its mirror image: what is summed going forward is copied going back, and so on.


class Copied(torch.autograd.Function):
    """Forward nothing: the ranks have the same tensor. Backward a sum: each knows the gradient by its slice only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, ctx.group), None


class Summed(torch.autograd.Function):
    """Forward a sum: each rank has a term. Backward nothing: the sum's gradient is each term's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Gathered(torch.autograd.Function):
    """Forward the whole sequence from everybody's part; backward, everybody's sum of its own part."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x_BLD, group)

    @staticmethod
    def backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor, None]:
        return sum_scattered(gradient_BSD, ctx.group), None


class SumScattered(torch.autograd.Function):
    """Forward each rank's part of the sum of the terms; backward the whole from everybody's part."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_scattered(x_BSD, group)

    @staticmethod
    def backward(ctx: Any, gradient_BLD: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient_BLD, ctx.group), None


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, in new memory: autograd may still need `x`."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gathered(x_BLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts of the sequence, one after the other."""
    mine_LBD = x_BLD.transpose(0, 1).contiguous()  # the collective joins along the first dimension
    length, *rest = mine_LBD.shape
    whole_SBD = mine_LBD.new_empty(length * dist.get_world_size(group), *rest)
    all_gather_single(whole_SBD, mine_LBD, group=group)
    return whole_SBD.transpose(0, 1)


def sum_scattered(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the sequence, summed over the ranks. Half of what an all-reduce sends."""
    whole_SBD = x_BSD.transpose(0, 1).contiguous()
    length, *rest = whole_SBD.shape
    mine_LBD = whole_SBD.new_empty(length // dist.get_world_size(group), *rest)
    reduce_scatter_single(mine_LBD, whole_SBD, group=group)
    return mine_LBD.transpose(0, 1)


# ---- Modules that compute with a slice.


def sliced(whole: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """This rank's slice of a parameter, which knows of the whole."""
    # src_data_rank=None: nothing is sent. The values come later, the same on every rank (`materialize`).
    return nn.Parameter(distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None))


class SlicedLinear(nn.Module):
    """A projection with the columns (dimension 0) or rows (1) of its weight that this rank holds."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh, dimension: int) -> None:
        super().__init__()
        self.weight = sliced(whole.weight, mesh, Shard(dimension))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))


class SlicedEmbedding(nn.Module):
    """Looks up the tokens that are in this rank's rows; the others' are zero, until the ranks' results are summed."""

    def __init__(self, whole: nn.Embedding, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = sliced(whole.weight, mesh, Shard(0))
        self.first = first_row(self.weight, mesh)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        rows_LD = local(self.weight)
        places_BS = tokens_BS - self.first
        elsewhere_BS = (places_BS < 0) | (places_BS >= len(rows_LD))
        found_BSD = F.embedding(places_BS.masked_fill(elsewhere_BS, 0), rows_LD)
        return found_BSD.masked_fill(elsewhere_BS[..., None], 0)


class SlicedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy over logits of which each rank has the columns of its rows of the vocabulary.

    What is exchanged are two numbers per token, never logits: 16k tokens of Llama 3's vocabulary would be 8 GiB.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TL: Tensor, targets_T: Tensor, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        largest_T = logits_TL.amax(dim=1)
        dist.all_reduce(largest_T, dist.ReduceOp.MAX, group)
        shifted_TL = logits_TL - largest_T[:, None]  # without it exp() would overflow
        places_T = targets_T - first
        elsewhere_T = (places_T < 0) | (places_T >= logits_TL.shape[1])
        places_T = places_T.masked_fill(elsewhere_T, 0)
        chosen_T = shifted_TL.gather(1, places_T[:, None])[:, 0].masked_fill(elsewhere_T, 0)
        exponentials_TL = shifted_TL.exp_()
        sums_T, chosen_T = both = torch.stack([exponentials_TL.sum(dim=1), chosen_T])
        dist.all_reduce(both, group=group)
        ignored_T = targets_T == IGNORE
        ctx.save_for_backward(exponentials_TL.div_(sums_T[:, None]), places_T, elsewhere_T, ignored_T)
        return (sums_T.log() - chosen_T).masked_fill(ignored_T, 0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # The softmax, less one at the target: on the rank that has it.
        probabilities_TL, places_T, elsewhere_T, ignored_T = ctx.saved_tensors
        here_T1 = (~elsewhere_T).to(probabilities_TL.dtype)[:, None]
        gradient_TL = probabilities_TL.scatter_add(1, places_T[:, None], -here_T1)
        return gradient_TL.masked_fill_(ignored_T[:, None], 0).mul_(gradient), None, None, None


class SlicedHead(nn.Module):
    """`Head` of `recipes.lib.model` with this rank's rows of the vocabulary, for training only: it gives the loss."""

    def __init__(self, whole: Head, mesh: DeviceMesh) -> None:
        super().__init__()
        # A tied one is handed the embedding's slice.
        self.weight = None if whole.weight is None else sliced(whole.weight, mesh, Shard(0))
        # A field, so that `parallelism.compile_blocks` can put the compiled function here.
        self.chunk_loss = functools.partial(sliced_loss, mesh=mesh)

    def forward(self, x_BSD: Tensor, targets_BS: Tensor, tied_VD: Tensor | None = None) -> Tensor:
        weight_VD = self.weight if tied_VD is None else tied_VD
        assert weight_VD is not None, "an untied head owns its weight"
        x_TD, targets_T = x_BSD.flatten(0, 1), targets_BS.flatten()
        # Counted in whole logits: every rank must make equally many chunks, and the last ones have fewer rows.
        chunks = math.ceil(targets_T.numel() * weight_VD.shape[0] / MAX_LOGITS)
        losses = [
            checkpoint(self.chunk_loss, x, weight_VD, targets, use_reentrant=False, preserve_rng_state=False)
            if chunks > 1
            else self.chunk_loss(x, weight_VD, targets)
            for x, targets in zip(x_TD.chunk(chunks), targets_T.chunk(chunks), strict=True)
        ]
        return torch.stack(losses).sum()


def sliced_loss(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, mesh: DeviceMesh) -> Tensor:
    """Summed cross-entropy of the projection of `x_TD`, of which this rank has some rows; the same on every rank."""
    logits_TL = F.linear(x_TD, local(weight_VD))
    exact_TL = logits_TL.to(torch.promote_types(logits_TL.dtype, torch.float32))
    loss: Tensor = SlicedCrossEntropy.apply(exact_TL, targets_T, first_row(weight_VD, mesh), mesh.get_group())
    return loss


def local(parameter: Tensor) -> Tensor:
    """The slice as a plain tensor; its gradient becomes the parameter's."""
    assert isinstance(parameter, DTensor)
    slice_: Tensor = parameter.to_local()
    return slice_


def first_row(parameter: Tensor, mesh: DeviceMesh) -> int:
    """Number of this rank's first row: all slices but the last ones have ceil(rows / ranks)."""
    ranks = mesh.size()
    return min(len(parameter), mesh.get_local_rank() * -(-len(parameter) // ranks))


# ---- Where in the model.


def parallelize_by_hand(model: Transformer, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Replace what is split by its slices. The norms stay whole on every rank.

    `sequence_parallel`: between the split parts each rank has a part of the sequence instead of a copy of all of it.
    As many bytes are sent (a sum is a sum-scatter and a gathering), while norms and residuals take a part of the
    memory.
    """
    enter, leave = (Gathered, SumScattered) if sequence_parallel else (Copied, Summed)
    group = mesh.get_group()

    def on_entering(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (enter.apply(inputs[0], group), *inputs[1:])

    def on_leaving(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Any:
        return leave.apply(output, group)

    model.embed_tokens = SlicedEmbedding(model.embed_tokens, mesh)
    model.embed_tokens.register_forward_hook(on_leaving)
    for layer in model.layers:
        assert isinstance(layer, Block)
        for part, by_columns, by_rows in (
            (layer.self_attn, ("q_proj", "k_proj", "v_proj"), "o_proj"),
            (layer.mlp, ("gate_proj", "up_proj"), "down_proj"),
        ):
            for name in by_columns:
                setattr(part, name, SlicedLinear(getattr(part, name), mesh, 0))
            setattr(part, by_rows, SlicedLinear(getattr(part, by_rows), mesh, 1))
            part.register_forward_pre_hook(on_entering)
            part.register_forward_hook(on_leaving)
    model.lm_head = SlicedHead(model.lm_head, mesh)
    model.lm_head.register_forward_pre_hook(on_entering)
