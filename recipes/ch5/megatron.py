r"""Megatron-Core: every way to split a model at once, in one library.

    torchrun --nproc-per-node 8 -m recipes.ch5.megatron model=llama_8b sequence_length=4096 batch_size=64 \
        tensor_parallel=2 pipeline_parallel=2 stages_per_rank=2
    torchrun --nproc-per-node 8 -m recipes.ch5.megatron experts=8 expert_parallel=4 batch_size=64

The ranks form a grid. `tensor_parallel` neighbours split every matrix, and between the matrices the sequence;
`context_parallel` ranks split the sequence everywhere; `pipeline_parallel` ranks have some layers each, in
`stages_per_rank` places of the model (virtual stages); what is left are copies, which share out the batch, and over
which the experts of a mixture are spread. Each copy keeps a part of the optimizer's state (the distributed optimizer).

What this file shows: how the grid is made, how a schedule is given the model and the loss, how gradients and the norm
come together, and how Megatron's distributed checkpoint (`torch_dist`) fits into the contract of every other recipe.
It wants GPUs, and its own environment: `python -m launcher env install megatron`.
"""

from __future__ import annotations

import functools
import math
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.ch5.megatron_args import MegatronArgs
from recipes.lib.arguments import parse_or_exit
from recipes.lib.distributed import COLLECTIVE_TIMEOUT, LaunchError, World, joined, sum_over_ranks
from recipes.lib.flops import parameter_count
from recipes.lib.layout import Layout
from recipes.lib.memory import Kept
from recipes.lib.model import IGNORE
from recipes.lib.optimizer import BETAS
from recipes.lib.stack import needs
from recipes.lib.training import Microbatch, Plan, make_plan, recipe_main, train
from recipes.lib.writing import without_zip_checksums, writing_threads

with needs("megatron"):
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from recipes.ch5.megatron_model import build, config_of, mask_padding, own_pieces

_HOW_TO_SAVE = {
    # Moments under the parameters' names, whole: they load into any other grid.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Megatron:
    """This rank's stages, the optimizer over them, and the schedule by which they are computed."""

    model: nn.ModuleList
    """Of Megatron's own data parallel wrappers, one around each stage."""
    optimizer: MegatronOptimizer
    plan: Plan
    args: MegatronArgs
    stack: str = "Megatron-Core (torch_dist)"

    @classmethod
    def build(cls, plan: Plan, args: MegatronArgs) -> Megatron:
        """This rank's part of the model with its initial values, and its part of the optimizer."""
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        config = config_of(plan, args)
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=args.overlap,
            use_distributed_optimizer=args.distributed_optimizer,
        )
        stages = [DistributedDataParallel(config, reduction, stage) for stage in build(plan, args, config)]
        if args.overlap:
            # Gradients are summed with the last microbatch alone. (One function for one stage, a list for several.)
            pauses = [stage.no_sync for stage in stages]
            config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=args.peak_lr,
                weight_decay=args.weight_decay,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                # 0 would not compute the norm either.
                clip_grad=args.clip_norm or math.inf,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=args.distributed_optimizer,
            ),
            stages,
            use_gloo_process_groups=False,
        )
        return cls(nn.ModuleList(stages), optimizer, plan, args)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of all microbatches by Megatron's schedule for this grid.

        Each stage is called with what the stage before has sent; the first looks tokens up, the last has the loss. At
        the end Megatron sums gradients over copies, tied tables and (of norms) over parts of the sequence, and divides
        them by the number of tokens, which it counts itself.
        """
        for stage in self.model:
            stage.zero_grad_buffer()
        microbatches = [
            (own_pieces(tokens_BS), own_pieces(targets_BS)) for tokens_BS, targets_BS in microbatches
        ]
        rows, length = microbatches[0][0].shape
        losses = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[iter(microbatches) for _ in self.model],
            model=list(self.model),
            num_microbatches=len(microbatches),
            # Of whole sequences: Megatron divides by the ranks that split them.
            seq_length=length * self.args.context_parallel,
            micro_batch_size=rows,
            forward_only=False,
        )
        total = sum(losses, torch.zeros((), device=token_count.device))  # none but in the last stage
        total = sum_over_ranks(total, parallel_state.get_pipeline_model_parallel_group())
        return sum_over_ranks(total, parallel_state.get_context_parallel_group())

    def _forward(self, data: Iterator[Microbatch], stage: nn.Module) -> tuple[Tensor, Any]:
        """One microbatch through one stage, and what makes its output a loss."""
        tokens_BS, targets_BS = next(data)
        # No mask and no positions: attention is causal, and rotary tables count by themselves.
        output = stage(tokens_BS, None, None)
        return output, functools.partial(self._loss, targets_BS)

    def _loss(self, targets_BS: Tensor, logits_BSV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The summed cross-entropy of a microbatch, its number of tokens, and what is to be collected."""
        counted_BS = targets_BS != IGNORE
        loss_BS = tensor_parallel.vocab_parallel_cross_entropy(
            mask_padding(logits_BSV.float(), self.plan.size), targets_BS.masked_fill(~counted_BS, 0)
        )
        loss = (loss_BS * counted_BS).sum()
        return loss, counted_BS.sum().int(), loss.detach().clone()

    def clip_and_update(self, rate: float) -> Tensor:
        """The norm over all ranks' gradients, clipping, AdamW, and parts of the parameters sent to the other copies."""
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, self.args.weight_decay * group["wd_mult"]
        done, norm, _ = self.optimizer.step()
        assert done, "only a scaled loss (float16) makes it leave out a step"
        self.optimizer.zero_grad()
        return torch.as_tensor(norm, device=self.plan.world.device)

    def kept(self) -> Kept:
        """Parameters as they compute, gradients in float32, and what the optimizer has of this rank's part."""
        parameters, gradients = 0, 0
        for parameter in self.model.parameters():
            parameters += parameter.numel() * parameter.element_size()
            gradients += parameter.numel() * 4
        state = [value for _, values in self.optimizer.state.items() for value in values.values()]
        moments = sum(value.numel() * value.element_size() for value in state if value.ndim)
        if self.plan.precision.compute == torch.bfloat16:
            moments += moments // 2  # beside the two moments the parameter that was rounded
        return Kept(parameters, gradients, moments)

    def size(self) -> int:
        """Parameters, and of each its float32 original and two moments."""
        size = self.plan.size
        experts = 3 * size.width * size.ffn_width * size.layers * max(0, self.args.experts - 1)
        return (parameter_count(size) + experts) * (self.plan.precision.compute.itemsize + 12)

    def write(self, folder: Path) -> None:
        """Every rank its part, under names of the whole model, with Megatron's own writer."""
        # Megatron's own queue is a process, which the SIGTERM that asks a job to stop ends: no save would follow it.
        filesystem_async._results_queue = queue.SimpleQueue()
        # Every copy has all of the state by now, and would leave the writing to the first one.
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
        each = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=writing_threads(self.plan.world))
        strategy = FullyParallelSaveStrategyWrapper(each, copies)
        with without_zip_checksums():
            dist_checkpointing.save(self._state(is_loading=False), str(folder), strategy)

    def read(self, folder: Path) -> None:
        """The parts that this rank has now, whichever ranks have written them."""
        self._begin_moments()
        state = dist_checkpointing.load(self._state(is_loading=True), str(folder))
        for number, stage in enumerate(self.model):
            stage.module.load_state_dict(state[f"model{number}"])
        parts, moments = self.optimizer.chained_optimizers, state["optimizer"]
        for part, saved in zip(parts, [moments] if len(parts) == 1 else moments.values(), strict=True):
            self._read_moments(part, saved)

    def _begin_moments(self) -> None:
        """Give AdamW the state that it makes in its first step: what is to be read needs a place.

        Megatron's own loader is made for Apex's AdamW, which does not count steps for each parameter as torch's does.
        """
        for part in self.optimizer.chained_optimizers:
            if not isinstance(part.optimizer, torch.optim.AdamW):
                continue  # where Apex or Transformer Engine is installed, theirs
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}

    def _read_moments(self, part: MegatronOptimizer, saved: dict[str, Any]) -> None:
        """Take over the state of one optimizer: that of experts, or of everything else."""
        if "param_state" not in saved or not isinstance(part.optimizer, torch.optim.AdamW):
            part.load_state_dict(saved)  # not distributed, or not torch's
            return
        moments = saved.pop("param_state")
        part.load_state_dict(saved)
        counts = {parameter: state.pop("step") for parameter, state in part.optimizer.state.items()}
        part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, count in counts.items():
            # A clone each: Megatron gives all of them one tensor, which every parameter's update would count up.
            part.optimizer.state[parameter]["step"] = count.clone()

    def _state(self, is_loading: bool) -> dict[str, Any]:
        """Where each tensor belongs in the whole: Megatron's description of what is saved or wanted."""
        how = dict(_HOW_TO_SAVE)  # a copy: Megatron puts the groups of ranks into it
        state = {
            f"model{number}": stage.module.sharded_state_dict(metadata=how)
            for number, stage in enumerate(self.model)
        }
        moments = self.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=how)
        return {**state, "optimizer": moments}


def make_layout(world: World, args: MegatronArgs) -> Layout:
    """Megatron's grid: neighbours split a matrix, then a sequence; stages are as far apart as can be.

    Raises ArgumentError for sizes that do not fill the ranks.
    """
    args.check_ranks(world.size, world.local_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        virtual_pipeline_model_parallel_size=args.stages_per_rank if args.stages_per_rank > 1 else None,
        context_parallel_size=args.context_parallel,
        expert_model_parallel_size=args.expert_parallel,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=False,
    )
    return Layout(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        data_group=parallel_state.get_data_parallel_group(),
        stage_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def want_gpus(world: World) -> None:
    """Refuse a CPU. Raises LaunchError."""
    if world.device.type != "cuda":
        raise LaunchError(
            "Megatron-Core computes on GPUs alone, and here it would be a CPU: use a node with GPUs"
        )


@recipe_main
def main() -> None:
    """Train by Megatron-Core."""
    args = parse_or_exit(MegatronArgs)
    with joined(args.device) as world:
        want_gpus(world)
        plan = make_plan("ch5_megatron", args, world, make_layout(world, args))
        train(plan, Megatron.build(plan, args))


if __name__ == "__main__":
    main()
