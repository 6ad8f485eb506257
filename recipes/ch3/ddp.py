"""Distributed data parallelism: every rank holds the whole model and trains on its part of the batch.

    torchrun --nproc-per-node 2 -m recipes.ch3.ddp steps=20
    torchrun --nproc-per-node 2 -m recipes.ch3.ddp steps=8 bucket_mb=1 profile=3

Gradients are summed over the ranks in buckets while the backward pass still computes the next ones. With
several microbatches a step, only the last backward pass sends anything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from recipes.ch3.ddp_args import UNTRACED_STEPS, DdpArgs
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.distributed import joined
from recipes.lib.loss_scale import LossScale
from recipes.lib.model import Transformer
from recipes.lib.optimizer import build_optimizer, own_part
from recipes.lib.overlap import REDUCING, traced
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, microbatch_rows, recipe_main, train


@dataclass(frozen=True)
class Replicated:
    """A whole model on every rank, its gradients summed over all of them."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    plan: Plan
    scale: LossScale | None
    """Of the loss, where float16 wants one."""

    @classmethod
    def build(cls, plan: Plan, args: DdpArgs) -> Replicated:
        """The wrapped model with its initial weights, and its optimizer. Raises ArgumentError."""
        if args.static_graph and (count := microbatch_rows(args, plan.layout)[1]) > 1:
            # It would stop summing gradients over ranks after the first step, and say nothing
            # (github.com/pytorch/pytorch/pull/187732).
            problem = (
                f"wants one microbatch a step, this run has {count}: torch cannot do it together with no_sync"
            )
            raise ArgumentError("static_graph", "true", problem)
        with torch.device("meta"):  # no memory yet: shapes only
            model = Transformer(plan.size)
        checkpoint_activations(model, args.activation_checkpointing)
        if args.compile:
            compile_blocks(model)
            # Asked to compile inside of DDP, torch would cut each layer's graph where a bucket ends, so that buckets
            # leave early. A layer is a graph of its own here, and its gradients leave when its backward pass is over:
            # early enough, and the kernels stay fused. (The cutting also refuses activation checkpointing.)
            torch._dynamo.config.optimize_ddp = False
        model.to(plan.precision.master)
        initialize(model, plan)
        replicated = DistributedDataParallel(
            model,
            device_ids=[plan.world.device.index] if plan.world.device.type == "cuda" else None,
            bucket_cap_mb=args.bucket_mb,
            gradient_as_bucket_view=args.gradient_as_bucket_view,
            static_graph=args.static_graph,
        )
        compress(replicated, args, plan.world.device)
        scale = LossScale() if plan.precision.compute == torch.float16 else None
        optimizer = build_optimizer(replicated, args, args.optimizer_sharding)
        if plan.world.device.type == "cuda":
            let_go_of_first_buckets(optimizer)
        return cls(replicated, optimizer, plan, scale)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; the last backward pass sums the gradients over ranks."""
        if self.scale is None:
            return self._passes(microbatches, token_count, 1.0)
        return self.scale.gradients(self.model, lambda scale: self._passes(microbatches, token_count, scale))

    def _passes(self, microbatches: Sequence[Microbatch], token_count: Tensor, scale: float) -> Tensor:
        # DDP divides the sum by the number of ranks: right for ranks of equal shares whose losses are means.
        # These losses are parts of one global mean already, so the division is undone.
        factor = self.plan.world.size * scale
        total = torch.zeros((), device=token_count.device)
        for number, (tokens_BS, targets_BS) in enumerate(microbatches, start=1):
            last = number == len(microbatches)
            # no_sync: gradients only add up locally. It must enclose the forward pass, too, which is where
            # DDP decides whether to listen for gradients.
            with nullcontext() if last else self.model.no_sync():
                with self.plan.precision.autocast(token_count.device):
                    loss = self.model(tokens_BS, targets_BS)
                with record_function(REDUCING if last else "backward"):  # for the trace
                    (loss * factor / token_count).backward()
            total = total + loss.detach()
        return total

    def memory(self) -> dict[str, float]:
        """What a checkpoint keeps of the technique."""
        return self.scale.state() if self.scale is not None else {}

    def recall(self, memory: dict[str, float]) -> None:
        """Go on with what a checkpoint kept."""
        if self.scale is not None:
            self.scale.restore(memory)


def let_go_of_first_buckets(optimizer: torch.optim.Optimizer) -> None:
    """After the first step, wait until nothing holds its buckets any more. Once; a third of a second.

    DDP makes its buckets anew in the second step, in the order in which the gradients came. NCCL's process group keeps
    what an all-reduce used until its watchdog, which looks every 100 ms, has seen its end: a second step that is
    launched sooner has both sets of buckets at its peak, as many bytes as all gradients (4.6 GiB for llama_1b).
    """

    def wait(*_: object) -> None:
        torch.cuda.synchronize()
        time.sleep(0.3)
        hook.remove()

    hook = own_part(optimizer).register_step_post_hook(wait)


def compress(replicated: DistributedDataParallel, args: DdpArgs, device: torch.device) -> None:
    """Send fewer bytes per gradient. Every way loses something; what, the parity tests show.

    Raises ArgumentError for what gloo cannot do.
    """
    if args.compression == "float16":
        replicated.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif args.compression == "bfloat16":
        if device.type != "cuda":
            raise ArgumentError("compression", "bfloat16", "wants NCCL, that is GPUs; gloo sums float16")
        replicated.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif args.compression == "power_sgd":
        mebibytes = sum(p.numel() * p.element_size() for p in replicated.parameters()) / 2**20
        if device.type != "cuda" and mebibytes > args.bucket_mb:
            # Its second and third message leave from gloo's threads, those of two buckets in any order, on each rank
            # another: a rank would get one bucket's bytes for the other's.
            problem = f"wants {mebibytes:.1f} or more, one bucket for all gradients, with PowerSGD on gloo"
            raise ArgumentError("bucket_mb", args.bucket_mb, problem)
        # Each matrix travels as two thin ones. What they lack is added to the next step's gradient (error feedback).
        # That rest is not in checkpoints: it belongs to one rank and to the buckets that DDP made in this process.
        # A resumed run sends whole gradients for the first steps, as a new one does, and loses one step's rest.
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=args.power_sgd_rank,
            start_powerSGD_iter=args.power_sgd_start,
        )
        replicated.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


@recipe_main
def main() -> None:
    """Train with a copy of the model on every rank."""
    args = parse_or_exit(DdpArgs)
    with joined(args.device) as world:
        plan = make_plan("ch3_ddp", args, world)
        technique = Replicated.build(plan, args)
        with traced(technique.optimizer, plan, skip=UNTRACED_STEPS, steps=args.profile):
            train(plan, technique)


if __name__ == "__main__":
    main()
