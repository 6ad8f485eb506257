"""A model sharded over more ranks than anybody has: this process is one, the others are pretended.

torch's fake process group answers every collective at once and sends nothing; on the meta device tensors have shapes
and no memory. What remains is exactly what FSDP2 would do to this rank's parameters, in seconds on a laptop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from recipes.ch2.plan_args import PlanArgs
from recipes.ch4.fsdp import shard
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.grid import Grid
from recipes.lib.layout import Layout
from recipes.lib.memory_model import predict_memory
from recipes.lib.model import Transformer
from recipes.lib.parallelism import Precision
from recipes.lib.planner import model_size
from recipes.lib.tables import size_text, table
from recipes.lib.workload import Workload


@dataclass(frozen=True)
class Shards:
    """What one rank of many holds."""

    bytes: int
    """Of its slices of all parameters, padding left out."""
    slices: int
    empty: int
    """Parameters of which this rank has no row: FSDP2 cuts along the first dimension, which may have fewer."""
    seconds: float


def dry_run(args: PlanArgs) -> str:
    """Build the model for `dry_run` ranks as its first and its last, and compare their bytes with the prediction."""
    size = model_size(args.model)
    master = torch.bfloat16 if args.param_dtype == "bfloat16" else torch.float32
    ranks = args.dry_run
    work = Workload(
        size=size, sequence_length=args.sequence_length, microbatch=args.microbatch_size or 1, data=ranks,
        shard=ranks, master_bytes=master.itemsize,
    )  # fmt: skip
    predicted = predict_memory(work).moments[-1].parts["parameters"]
    rows = []
    for rank in sorted({0, ranks - 1}):
        found = shards_of(args.model, ranks, rank, master)
        rows.append(
            [
                f"rank {rank}", f"{found.bytes:,}", f"{predicted:,.0f}", f"{found.bytes / predicted - 1:+.3%}",
                found.slices, found.empty, f"{found.seconds:.1f} s",
            ]
        )  # fmt: skip
    head = ["", "bytes of parameters", "predicted", "difference", "slices", "empty", "built in"]
    return "\n".join(
        [
            f"{args.model} by FSDP2 on {ranks} pretended ranks, {size_text(16 * predicted / master.itemsize)} of "
            "parameters, gradients and moments on each",
            table(head, rows),
        ]
    )


def shards_of(model_name: str, ranks: int, rank: int, master: torch.dtype = torch.float32) -> Shards:
    """The slices that `ch4_fsdp` would give this rank. Joins a fake process group and leaves it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    began = time.perf_counter()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        with torch.device("meta"):
            model = Transformer(model_size(model_name)).to(master)
        grid = Grid(mesh, None, None, Layout(rank, ranks))
        shard(model, grid, Precision(torch.bfloat16, master), FsdpArgs(model=model_name))
        mine = []
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            mine.append(parameter.to_local())
    finally:
        dist.destroy_process_group()
    return Shards(
        bytes=sum(each.numel() * each.element_size() for each in mine),
        slices=len(mine),
        empty=sum(not each.numel() for each in mine),
        seconds=time.perf_counter() - began,
    )
