r"""Fully sharded data parallelism (FSDP2): parameters, gradients and moments are split over the ranks.

    torchrun --nproc-per-node 2 -m recipes.ch4.fsdp steps=20
    torchrun --nproc-per-node 4 -m recipes.ch4.fsdp tensor_parallel=2 context_parallel=2 steps=20

Each rank keeps a slice of every parameter. A layer is gathered just before it computes and freed after; its
gradients are summed and sliced in one collective (reduce-scatter). Llama-3-8B needs 16 bytes per parameter
for float32 weights, gradients and AdamW's moments: 120 GiB, which N ranks share. On four GPUs:

    PYTORCH_ALLOC_CONF=expandable_segments:True torchrun --nproc-per-node 4 -m recipes.ch4.fsdp \
        model=llama_8b sequence_length=8192 batch_size=4 activation_checkpointing=selective compile=true

(expandable_segments: without it, memory that layers of changing sizes leave behind is too scattered to be
used again.) One GPU of 139 GiB holds it all with activation_checkpointing=full: 124 GiB at two sequences of
4096. On a smaller one, param_dtype=bfloat16 halves the 120 GiB, and cpu_offload=true moves them to the host.
Measured figures are in benchmarks/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from recipes.ch4.fsdp_args import FsdpArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.context_parallel import Context, split_sequences
from recipes.lib.distributed import World, joined, sum_over_ranks
from recipes.lib.file_optimizer import FileAdamW
from recipes.lib.float8 import check_float8, use_float8
from recipes.lib.grid import Grid
from recipes.lib.model import Transformer
from recipes.lib.optimizer import BETAS, build_optimizer, parameter_groups
from recipes.lib.parallelism import Precision, checkpoint_activations, compile_blocks
from recipes.lib.tensor_parallel import split_layers
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, recipe_main, train


@dataclass(frozen=True)
class Sharded:
    """A model of which every rank keeps a slice."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    defer_reduction: bool
    context: Context | None

    @classmethod
    def build(cls, plan: Plan, args: FsdpArgs, grid: Grid) -> Sharded:
        """The sharded model with its initial weights, and its optimizer."""
        if args.param_dtype == "bfloat16":
            plan = dataclasses.replace(
                plan, precision=Precision(plan.precision.compute, master=torch.bfloat16)
            )
        with torch.device("meta"):  # shapes only: no rank could hold a large model whole
            model = Transformer(plan.size)
            if args.float8 != "none":
                check_float8(args.float8, plan.precision.compute, plan.world.device)
                use_float8(model, args.float8)
        context = split_sequences(model, grid.context) if grid.context is not None else None
        if grid.tensor is not None:
            split_layers(model, grid.tensor)
        checkpoint_activations(model, args.activation_checkpointing, args.kept, args.recomputed_layers)
        if args.compile:
            compile_blocks(model)
        model.to(plan.precision.master)
        shard(model, grid, plan.precision, args)
        # Memory only now, for this rank's slices.
        initialize(model, plan, storage="cpu" if args.cpu_offload else None)
        # The optimizer comes last: it must see the slices, not the parameters that they replaced.
        optimizer: torch.optim.Optimizer
        if args.optimizer_folder:
            folder, groups = args.optimizer_folder, parameter_groups(model, args)
            optimizer = FileAdamW(groups, lr=args.peak_lr, betas=BETAS, folder=folder, world=plan.world)
        else:
            optimizer = build_optimizer(model, args)
        return cls(model, optimizer, args.defer_reduction, context)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; the hooks gather, reduce and free."""
        assert isinstance(self.model, FSDPModule), "fully_shard has made it one, too"
        total = torch.zeros((), device=token_count.device)
        for number, (tokens_BS, targets_BS) in enumerate(microbatches, start=1):
            last = number == len(microbatches)
            # Reduced after every microbatch, gradients add up in slices. Deferred, they add up whole: one
            # reduce-scatter a step, and 4 bytes per parameter of the whole model on every rank.
            self.model.set_requires_gradient_sync(last or not self.defer_reduction)
            # hybrid_shard sums over the groups once a step in either case: slices are small enough to wait.
            self.model.set_requires_all_reduce(last)
            self.model.set_is_last_backward(last)
            part = (tokens_BS, targets_BS)
            loss = self.model(*(part if self.context is None else self.context.part(*part)))
            (loss / token_count).backward()
            total = total + loss.detach()
        return total if self.context is None else sum_over_ranks(total, self.context.group)


def make_grid(world: World, args: FsdpArgs) -> Grid:
    """How the ranks share the work. Raises ArgumentError where they cannot be divided as the arguments say."""
    args.check_ranks(world.size, world.local_size)
    copies = None
    if args.strategy == "hybrid_shard":
        copies = world.size // (args.shard_size or world.local_size)
    return Grid.of(
        world,
        copies=copies,
        context_parallel=args.context_parallel,
        tensor_parallel=args.tensor_parallel,
    )


def shard(model: Transformer, grid: Grid, precision: Precision, args: FsdpArgs) -> None:
    """Slice the model's parameters over the grid's ranks, one group of collectives per layer."""
    exact = torch.promote_types(precision.master, torch.float32)
    rounding = MixedPrecisionPolicy(
        param_dtype=precision.compute,
        reduce_dtype=torch.bfloat16 if args.reduce_dtype == "bfloat16" else exact,
        # Inputs arrive in the right format as the embedding's output; the rotary tables stay in float32.
        cast_forward_inputs=False,
    )
    # Pinned memory is for copies to a GPU, and cannot be had without one.
    mesh = grid.sharding
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if args.cpu_offload else OffloadPolicy()
    free_after_forward = args.strategy != "shard_grad_op"

    def split(*modules: torch.nn.Module, free: bool) -> None:
        fully_shard(
            list(modules),
            mesh=mesh,
            reshard_after_forward=free,
            shard_placement_fn=sliced_dimension,
            mp_policy=rounding,
            offload_policy=offload,
        )

    for layer in model.layers:
        split(layer, free=free_after_forward)
    if not model.size.tied:
        # The tables are the largest parameters: on their own, neither waits in memory while the other is
        # used.
        split(model.embed_tokens, free=free_after_forward)
        # The backward pass begins here, so freeing these two would gather them again at once.
        split(model.norm, model.lm_head, free=False)
    split(model, free=False)  # what is left: nothing, or the tied table and the norm

    for number, layer in enumerate(model.layers if args.prefetch else ()):
        # In the order in which they will be needed. Each costs the memory of one more whole layer.
        layer.set_modules_to_forward_prefetch(list(model.layers[number + 1 :][: args.prefetch]))
        layer.set_modules_to_backward_prefetch(list(model.layers[:number])[::-1][: args.prefetch])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum, not FSDP's mean over ranks: each rank's loss is a part of the global mean already.
            module.set_gradient_divide_factor(1.0)
            # As a plain sum: torch's other way to express the factor is an operation that only NCCL has.
            module.set_force_sum_reduction_for_comms(True)


def sliced_dimension(parameter: torch.nn.Parameter) -> Shard:
    """FSDP slices the rows, or the columns of a matrix whose rows tensor parallelism has split already.

    The rows once more would interleave the slices, and such checkpoints do not load into every other layout.
    """
    split = parameter.placements if isinstance(parameter, DTensor) else ()
    return Shard(1) if Shard(0) in split else Shard(0)


@recipe_main
def main() -> None:
    """Train with a slice of the model on every rank."""
    args = parse_or_exit(FsdpArgs)
    with joined(args.device) as world:
        grid = make_grid(world, args)
        plan = make_plan("ch4_fsdp", args, world, grid.layout)
        if args.float8 != "none":  # no MFU then: the peak is bfloat16's
            products = dataclasses.replace(plan.precision, products=torch.float8_e4m3fn)
            plan = dataclasses.replace(plan, precision=products)
        train(plan, Sharded.build(plan, args, grid))


if __name__ == "__main__":
    main()
