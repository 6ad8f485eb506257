"""The ranks as a grid: copies of the model, slices of a copy, parts of a sequence, parts of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from recipes.lib.distributed import World
from recipes.lib.layout import Layout


@dataclass(frozen=True)
class Grid:
    """Who shares what with this rank."""

    sharding: DeviceMesh
    """Over which parameters are sliced; where there are several copies its first dimension counts those."""
    tensor: DeviceMesh | None
    """The ranks that split each layer with this one; None: it computes whole layers."""
    context: dist.ProcessGroup | None
    """The ranks that split each sequence with this one; None: it has whole sequences."""
    layout: Layout

    @classmethod
    def of(
        cls, world: World, *, copies: int | None = None, context_parallel: int = 1, tensor_parallel: int = 1
    ) -> Grid:
        """The ranks in rows; all ranks call this together. The sizes must divide the ranks.

        Ranks of one layer are neighbours, then come those of one sequence: the more two ranks talk, the nearer they
        are. Ranks that split a sequence need the same parameters, so each of them keeps a slice like any other.
        `copies` of None is one copy without a dimension for it.
        """
        kind = world.device.type
        dimensions = {} if copies is None else {"replicate": copies}
        dimensions["shard"] = world.size // ((copies or 1) * tensor_parallel)
        if tensor_parallel > 1:
            dimensions["tensor"] = tensor_parallel
        mesh = init_device_mesh(kind, tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))
        sharding = mesh["replicate", "shard"] if copies is not None else mesh["shard"]
        tensor = mesh["tensor"] if tensor_parallel > 1 else None
        if tensor is not None:
            # For sums over both: with a group of its own that is one collective, without it two, and a warning.
            mesh["shard", "tensor"]._flatten("shard_tensor")
        together = context_parallel * tensor_parallel
        if together == 1:
            return cls(sharding, tensor, None, Layout.each_its_own(world))
        shape = (world.size // together, context_parallel, tensor_parallel)
        shares = init_device_mesh(kind, shape, mesh_dim_names=("data", "context", "tensor"))
        layout = Layout(world.rank // together, world.size // together, shares.get_group("data"))
        context = shares.get_group("context") if context_parallel > 1 else None
        return cls(sharding, tensor, context, layout)
