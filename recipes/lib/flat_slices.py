"""A run of a tensor's numbers, as torch.distributed.checkpoint can save and load it: how ZeRO slices parameters.

FSDP slices a parameter by rows, ZeRO by position: all numbers in one line, cut where a rank's part ends, be it in the
midst of a row. A checkpoint knows boxes alone. A run of a matrix is three at most: the rest of a row, whole rows, and
the beginning of one. So ZeRO's slices go into the format of all other recipes, under the parameter's name and in its
shape, and load into any number of ranks, any stage and any technique, without a second file format and a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one of each per dimension."""


def boxes(shape: Sequence[int], start: int, count: int) -> list[Box]:
    """The boxes that `count` numbers from position `start` on fill, in their order; none for a count of 0. Pure."""
    if count == 0:
        return []
    if len(shape) == 1:
        return [((start,), (count,))]
    assert len(shape) == 2, "the models here have vectors and matrices"
    width, end = shape[1], start + count
    row, column = divmod(start, width)
    found: list[Box] = []
    if column:
        length = min(width - column, count)
        found.append(((row, column), (1, length)))
        row += 1
    whole = max(0, end // width - row)
    if whole:
        found.append(((row, 0), (whole, width)))
        row += whole
    if end > row * width:
        found.append(((row, 0), (1, end - row * width)))
    return found


class FlatSlice(Tensor):
    """`numbers` of a tensor of `shape`, from position `start` on; an empty one is of a rank that has none of it.

    It has the shape of the whole, as a DTensor does, and can be saved, loaded and staged, nothing else.
    """

    _pieces: list[tuple[tuple[int, ...], Tensor]]
    """The boxes that the numbers fill: offsets, and a view of the numbers."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], start: int, numbers: Tensor) -> FlatSlice:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=numbers.dtype, device=numbers.device)
        assert isinstance(self, FlatSlice)
        self._pieces = []
        begin = 0
        for offsets, sizes in boxes(shape, start, numbers.numel()):
            length = math.prod(sizes)
            self._pieces.append((offsets, numbers[begin : begin + length].view(sizes)))
            begin += length
        return self

    def numbers(self) -> Tensor:
        """They in one line, copied."""
        return torch.cat([piece.flatten() for _, piece in self._pieces])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.new_empty.default:
            # What the stager begins a copy with; the pieces follow as attributes.
            device = (kwargs or {}).get("device", args[0].device)
            return FlatSlice(args[1], 0, torch.empty(0, dtype=args[0].dtype, device=device))
        raise NotImplementedError(f"{function} of a slice: it is for checkpoints alone")

    def __create_write_items__(self, name: str, object: Any) -> list[WriteItem]:
        """What a save writes."""
        return [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), piece.size()),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.size(),
                ),
            )
            for offsets, piece in self._pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What a load fills."""
        return [ChunkStorageMetadata(torch.Size(offsets), piece.size()) for offsets, piece in self._pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The piece that begins there."""
        return next(piece for offsets, piece in self._pieces if torch.Size(offsets) == index.offset)
