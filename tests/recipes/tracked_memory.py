"""What torch itself says a training step keeps: its own trackers over tensors that are only pretended.

FakeTensorMode runs every operation of the real model for its shapes alone, and the fake process group is every other
rank. So eight billion parameters on four ranks are tracked here in seconds, without their memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from recipes.ch4.fsdp import make_grid, shard
from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.distributed import World
from recipes.lib.model import Transformer
from recipes.lib.optimizer import build_optimizer
from recipes.lib.parallelism import Precision, checkpoint_activations
from recipes.lib.workload import Workload


class FusedNorm(torch.autograd.Function):
    """Keeps what CUDA's fused RMSNorm keeps: its input and a number per token. A CPU's keeps float32 copies instead."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        root = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        context.save_for_backward(x, weight, root)
        return torch.empty_like(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, _ = context.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None


@contextmanager
def ranks(count: int) -> Iterator[None]:
    """This process is rank 0 of so many; the others are pretended."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tracked_peak(work: Workload, monkeypatch: Any) -> int:
    """Bytes of all tensors at the fullest moment of the second step, in which the moments of AdamW are there."""
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight, norm.eps))
    sharded = work.sharded
    precision = Precision(torch.bfloat16, torch.float32)
    args = FsdpArgs(strategy=work.strategy if sharded else "full_shard")
    world = World(rank=0, size=work.data, local_rank=0, local_size=work.data, device=torch.device("cpu"))
    grid = make_grid(world, args) if sharded else None
    with FakeTensorMode():
        model = Transformer(work.size)
        checkpoint_activations(model, work.checkpointing, layers=work.recomputed_layers)
        if grid is not None:
            shard(model, grid, precision, args)
        optimizer = build_optimizer(model, args)
        tracker = FSDPMemTracker(model, optimizer) if sharded else MemTracker()
        if not sharded:
            tracker.track_external(model, optimizer)
        tokens = torch.zeros(work.microbatch, work.sequence_length, dtype=torch.long)
        for _ in range(2):
            tracker.reset_mod_stats()
            with tracker:
                if sharded:
                    loss = model(tokens, tokens)
                else:
                    with precision.autocast(torch.device("cpu")):
                        loss = model(tokens, tokens)
                (loss / 1000).backward()
                optimizer.step()
                optimizer.zero_grad()
        (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return int(snapshot["Total"])
