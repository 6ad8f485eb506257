r"""DeepSpeed's ZeRO: N ranks share the optimizer's state (stage 1), gradients (2) and parameters (3).

    torchrun --nproc-per-node 2 -m recipes.ch5.deepspeed steps=20
    torchrun --nproc-per-node 2 -m recipes.ch5.deepspeed stage=3 offload_optimizer=cpu offload_parameters=cpu steps=20

The same idea as FSDP's (chapter 4), which came after it, in another form: an engine around the model, and one JSON
configuration that says everything (deepspeed_config.py composes it; the run directory has it as deepspeed.json). Who
computes with which parameters decides what a rank must hold besides its own part:

    stage 1    whole parameters and gradients; updates its part, and gathers all parts after the step
    stage 2    whole parameters; of each bucket of gradients it keeps the sum of its own part
    stage 3    its part of everything; gathers each layer before it computes, and frees it

Model, data, loss, training loop and checkpoints are those of every other recipe, so losses and gradient norms are
chapter 1's. A checkpoint has the parameters by name and shape (recipes/lib/zero_state.py), not DeepSpeed's partitions:
it loads into any number of ranks, any stage, and any other chapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.ch5.deepspeed_config import deepspeed_config
from recipes.ch5.deepspeed_engine import Engine, show, start
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.deepspeed_stack import (
    check_deepspeed,
    import_deepspeed,
    missing_for_disks,
    missing_tools,
)
from recipes.lib.distributed import joined
from recipes.lib.model import Transformer
from recipes.lib.optimizer import clip_gradients
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.training import Microbatch, Plan, make_plan, microbatch_rows, recipe_main, train


@dataclass(frozen=True, kw_only=True)
class Zero(Engine):
    """A model under ZeRO."""

    @classmethod
    def build(cls, plan: Plan, args: DeepSpeedArgs) -> Zero:
        """The engine over the model with its initial weights. Raises ArgumentError, LaunchError."""
        deepspeed = import_deepspeed("ch5_deepspeed", plan.world)
        if args.adam == "deepspeed" and (problem := missing_tools()):
            raise ArgumentError("adam", "deepspeed", f"{problem}; nearest: torch")
        if args.on_disk and (problem := missing_for_disks()):
            key = "offload_optimizer" if args.offload_optimizer == "nvme" else "offload_parameters"
            raise ArgumentError(key, "nvme", problem)
        rows, microbatches = microbatch_rows(args, plan.layout)
        config = deepspeed_config(
            args,
            rows=rows,
            microbatches=microbatches,
            shares=plan.layout.data_size,
            bfloat16=plan.precision.is_mixed,
            on_gpu=plan.world.device.type == "cuda",
        )
        with torch.device("meta"):  # shapes only
            model = Transformer(plan.size)
        checkpoint_activations(model, args.activation_checkpointing)
        if args.compile:
            compile_blocks(model)
        # In stage 3 a parameter looks empty once it is sliced.
        decaying = {name: p.ndim >= 2 for name, p in model.named_parameters()}
        # Without ZeRO there is no float32 beside parameters that have been rounded.
        model.to(plan.precision.compute if args.stage else plan.precision.master)
        swapper = None  # that parameters go to a disk with: a new one would delete what is there
        for part in (model.embed_tokens, *model.layers, model.norm, model.lm_head):
            part.to_empty(device=plan.world.device)
            if args.stage == 3:  # one after the other: no rank ever holds more than one layer whole
                sliced = deepspeed.zero.Init(module=part, config_dict_or_path=config, param_swapper=swapper)
                swapper = sliced.param_swapper if args.offload_parameters == "nvme" else None
        named = dict(model.named_parameters())
        groups = [
            {"params": [p for name, p in named.items() if decaying[name]], "weight_decay": args.weight_decay},
            {"params": [p for name, p in named.items() if not decaying[name]], "weight_decay": 0.0},
        ]
        engine, state = start(deepspeed, model, groups, config, plan)
        return cls(engine=engine, plan=plan, config=config, stage=args.stage, state=state)

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; the engine reduces when and where its stage wants it."""
        # It divides by the number of ranks, and would by that of microbatches: right for losses that are means over
        # equal shares. These losses are parts of one global mean already.
        factor = self.plan.world.size
        total = torch.zeros((), device=token_count.device)
        for number, (tokens_BS, targets_BS) in enumerate(microbatches, start=1):
            # Said, not left to the engine's counter: that goes on counting through a resume with another number.
            self.engine.set_gradient_accumulation_boundary(number == len(microbatches))
            with self.autocast():
                loss = self.engine(tokens_BS, targets_BS)
            self.engine.backward(loss * (factor / token_count), scale_wrt_gas=False)
            total = total + loss.detach()
        return total

    def clip(self) -> Tensor:
        """Stage 0: all gradients are here."""
        return clip_gradients(self.model, self.plan.args.clip_norm)


@recipe_main
def main() -> None:
    """Train in DeepSpeed's engine."""
    args = parse_or_exit(DeepSpeedArgs)
    check_deepspeed("ch5_deepspeed")  # before data are prepared for minutes
    with joined(args.device) as world:
        plan = make_plan("ch5_deepspeed", args, world)
        technique = Zero.build(plan, args)
        show(technique.config, plan.run_directory, world)
        train(plan, technique)


if __name__ == "__main__":
    main()
