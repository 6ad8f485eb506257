"""Summing gradients over ranks by hand, in one message or in several.

A message costs its start as well as its bytes, and a model has hundreds of gradients: so they are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """All of them in one row, copied."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def unpack(row: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a row that was packed back into its tensors."""
    for tensor, part in zip(tensors, row.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def buckets(tensors: Sequence[T], size: float) -> list[list[T]]:
    """Neighbours in groups of at most `size` bytes (a larger tensor is alone), the *last* ones first.

    The backward pass goes from the last layer to the first: so the first bucket is the first to be complete.
    """
    found: list[list[T]] = []
    room = 0.0
    for tensor in reversed(tensors):
        room -= tensor.nbytes
        if room < 0 or not found:
            found.append([])
            room = size - tensor.nbytes
        found[-1].append(tensor)
    return found


def sum_flat(gradients: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum the gradients of all ranks (of `group`), in place and in one message."""
    row = pack(gradients)
    dist.all_reduce(row, group=group)
    unpack(row, gradients)


def sum_bucketed(gradients: Sequence[Tensor], size: float, group: dist.ProcessGroup | None = None) -> None:
    """The same in messages of `size` bytes."""
    for bucket in buckets(gradients, size):
        sum_flat(bucket, group)


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that are there: the same ones on all ranks, which run the same model."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
