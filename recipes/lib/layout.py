"""How the ranks divide the work, as far as the training loop has to know it. A technique knows more."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from recipes.lib.distributed import World


@dataclass(frozen=True)
class Layout:
    """This rank's share of every batch, and of the model's layers.

    Ranks that split a layer (tensor parallelism), a sequence (context parallelism) or the layers (pipeline) among
    themselves train on the same sequences: together they are one share.
    """

    data_rank: int
    """Number of this rank's share of the batch, from 0."""
    data_size: int
    """Shares of the batch."""
    data_group: dist.ProcessGroup | None = None
    """One rank of each share, this one among them; None: every rank is a share of its own."""
    stage_group: dist.ProcessGroup | None = None
    """The ranks that hold the other layers of this rank's copy of the model; None: this one holds all of them."""

    @classmethod
    def each_its_own(cls, world: World) -> Layout:
        """Every rank trains on sequences of its own and holds all layers, or a slice of each."""
        return cls(world.rank, world.size)
