"""Tensor parallelism: every matrix is split over a few ranks, which train on the same sequences together.

    torchrun --nproc-per-node 2 -m recipes.ch2.tensor_parallel tensor_parallel=2 steps=20
    torchrun --nproc-per-node 4 -m recipes.ch2.tensor_parallel tensor_parallel=2 by=dtensor sequence_parallel=true
    torchrun --nproc-per-node 2 -m recipes.ch2.tensor_parallel tensor_parallel=2 by=compare

The ranks form a grid: `tensor_parallel` neighbours hold one copy of the model together, and the copies share out the
batch. Messages between neighbours carry activations, four times per layer and microbatch, and everybody waits for
them: neighbours belong into one node, on NVLink. Messages between copies carry gradients, once a step. Where the slices
are and what is sent for them is in `tensor_parallel_by_hand` and, the same by torch, in `tensor_parallel_dtensor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from recipes.ch2.tensor_parallel_args import TensorParallelArgs
from recipes.ch2.tensor_parallel_by_hand import parallelize_by_hand
from recipes.ch2.tensor_parallel_dtensor import parallelize_with_dtensor
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.distributed import World, joined
from recipes.lib.gradient_sums import sum_bucketed, sum_flat
from recipes.lib.layout import Layout
from recipes.lib.model import Transformer
from recipes.lib.optimizer import build_optimizer
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.step_times import Contestant, compare
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, recipe_main, train

BUCKET_BYTES = 25 * 2**20
"""Of gradients that the copies sum together."""


@dataclass(frozen=True, kw_only=True)
class Grid(Layout):
    """Copies of the model times slices of a copy."""

    mesh: DeviceMesh
    """Dimensions "data" and "tensor"."""


def make_grid(world: World, args: TensorParallelArgs) -> Grid:
    """Neighbours in rank, which are in one node, share a copy. Raises ArgumentError for ranks that do not divide."""
    slices = args.tensor_parallel
    if world.size % slices:
        raise ArgumentError(
            "tensor_parallel", slices, f"wants a divisor of {world.size}, the number of ranks"
        )
    shape = (world.size // slices, slices)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("data", "tensor"))
    data = mesh["data"]
    return Grid(
        data_rank=data.get_local_rank(), data_size=data.size(), data_group=data.get_group(), mesh=mesh
    )


@dataclass(frozen=True)
class Split:
    """A copy of the model whose matrices are split over neighbouring ranks."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    plan: Plan
    args: TensorParallelArgs

    @classmethod
    def build(cls, plan: Plan, args: TensorParallelArgs) -> Split:
        """The split model with its initial weights, and its optimizer."""
        assert isinstance(plan.layout, Grid)
        with torch.device("meta"):  # shapes only: no rank needs to hold a matrix whole
            model = Transformer(plan.size)
        model.to(plan.precision.master)
        parallelize = parallelize_by_hand if args.by == "hand" else parallelize_with_dtensor
        parallelize(model, plan.layout.mesh["tensor"], sequence_parallel=args.sequence_parallel)
        checkpoint_activations(model, args.activation_checkpointing)
        if args.compile:
            compile_blocks(model)
        initialize(model, plan)
        return cls(model, build_optimizer(model, args), plan, args)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; then the copies sum their gradients."""
        total = torch.zeros((), device=token_count.device)
        for tokens_BS, targets_BS in microbatches:
            with self.plan.precision.autocast(token_count.device):
                loss = self.model(tokens_BS, targets_BS)
            (loss / token_count).backward()
            total = total + loss.detach()
        self._sum_gradients()
        return total

    def _sum_gradients(self) -> None:
        """Complete the gradients of this copy, then sum them over all copies, slice by slice."""
        layout = self.plan.layout
        assert isinstance(layout, Grid)
        whole, gradients = [], []
        for parameter in self.model.parameters():
            assert parameter.grad is not None, "every parameter is used"
            if isinstance(parameter, DTensor):
                # DTensor may leave a term per rank (of a norm, under sequence parallelism), and would then sum the
                # terms wherever they are read: for the norm of the gradient, and again for the update.
                parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
                gradients.append(parameter.grad.to_local())
            else:
                whole.append(parameter.grad)
        if self.args.by == "hand" and self.args.sequence_parallel:
            # The norms, by hand: each rank has seen its part of the sequence only.
            sum_flat(whole, layout.mesh.get_group("tensor"))
        if layout.data_size > 1:
            sum_bucketed([*gradients, *whole], BUCKET_BYTES, layout.data_group)


def contestants(plan: Plan, args: TensorParallelArgs) -> list[Contestant]:
    """Copies alone, and both ways to split them, on the same sequences."""

    def contestant(name: str, by: str, ranks: int, sequence_parallel: bool) -> Contestant:
        changed = dataclasses.replace(args, by=by, tensor_parallel=ranks, sequence_parallel=sequence_parallel)
        grid = make_grid(plan.world, changed)
        return Contestant(
            name, dataclasses.replace(plan, layout=grid), lambda plan: Split.build(plan, changed)
        )

    ranks = args.tensor_parallel
    copies = plan.world.size // ranks
    split = f"{copies} cop{'y' if copies == 1 else 'ies'} split in {ranks}"
    return [
        contestant(f"{plan.world.size} whole copies", "hand", 1, False),
        contestant(f"{split}: by hand", "hand", ranks, False),
        contestant(f"{split}: by hand, sequence too", "hand", ranks, True),
        contestant(f"{split}: DTensor", "dtensor", ranks, False),
        contestant(f"{split}: DTensor, sequence too", "dtensor", ranks, True),
    ]


@recipe_main
def main() -> None:
    """Train with matrices split over ranks, or time the ways to do it."""
    args = parse_or_exit(TensorParallelArgs)
    with joined(args.device) as world:
        plan = make_plan("ch2_tensor_parallel", args, world, make_grid(world, args))
        if args.by == "compare":
            compare(contestants(plan, args), trials=args.trials, budget=args.budget)
        else:
            train(plan, Split.build(plan, args))


if __name__ == "__main__":
    main()
