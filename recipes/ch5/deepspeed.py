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

import json
import math
import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.ch5.deepspeed_args import DeepSpeedArgs
from recipes.ch5.deepspeed_config import deepspeed_config
from recipes.lib.arguments import ArgumentError, parse_or_exit
from recipes.lib.checkpoint import set_torch_state, torch_state
from recipes.lib.deepspeed_stack import (
    check_deepspeed,
    import_deepspeed,
    missing_for_disks,
    missing_tools,
)
from recipes.lib.distributed import World, joined
from recipes.lib.memory import Kept, kept_bytes
from recipes.lib.metrics import say
from recipes.lib.model import Transformer, initial_values
from recipes.lib.optimizer import clip_gradients, set_learning_rate
from recipes.lib.parallelism import checkpoint_activations, compile_blocks
from recipes.lib.pretrained import load_pretrained
from recipes.lib.training import Microbatch, Plan, initialize, make_plan, microbatch_rows, recipe_main, train
from recipes.lib.zero_state import ZeroState

CONFIG_FILE = "deepspeed.json"


@dataclass(frozen=True)
class Zero:
    """A model in DeepSpeed's engine."""

    engine: Any
    plan: Plan
    config: dict[str, Any]
    """What the engine was told."""
    state: ZeroState | None
    """None in stage 0, where parameters and optimizer are torch's own."""

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
        if args.stage == 0:
            initialize(model, plan)
        else:
            model.to(plan.precision.compute)
            for part in (model.embed_tokens, *model.layers, model.norm, model.lm_head):
                part.to_empty(device=plan.world.device)
                if args.stage == 3:  # one after the other: no rank ever holds more than one layer whole
                    deepspeed.zero.Init(module=part, config_dict_or_path=config)
        named = dict(model.named_parameters())
        groups = [
            {"params": [p for name, p in named.items() if decaying[name]], "weight_decay": args.weight_decay},
            {"params": [p for name, p in named.items() if not decaying[name]], "weight_decay": 0.0},
        ]
        # Not by LOCAL_RANK, DeepSpeed's own way: where Slurm shows each task its own GPU only, that is number 0.
        place = types.SimpleNamespace(device_rank=plan.world.device.index or 0)
        engine, *_ = deepspeed.initialize(args=place, model=model, model_parameters=groups, config=config)
        if args.stage == 0:
            return cls(engine, plan, config, None)
        state = ZeroState(model, engine.optimizer, args.stage)
        fill(state, model, plan)
        return cls(engine, plan, config, state)

    @property
    def model(self) -> nn.Module:
        """The model that the engine has."""
        module: nn.Module = self.engine.module
        return module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW that ZeRO has, over this rank's part."""
        optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        return optimizer

    def accumulate_gradients(self, microbatches: Sequence[Microbatch], token_count: Tensor) -> Tensor:
        """Forward and backward of each microbatch; the engine reduces when and where its stage wants it."""
        # It divides by the number of ranks, and would by that of microbatches: right for losses that are means over
        # equal shares. These losses are parts of one global mean already.
        factor = self.plan.world.size
        total = torch.zeros((), device=token_count.device)
        # With bf16 in the configuration the parameters have been rounded; without ZeRO there is no float32 beside them.
        for number, (tokens_BS, targets_BS) in enumerate(microbatches, start=1):
            # Said, not left to the engine's counter: that goes on counting through a resume with another number.
            self.engine.set_gradient_accumulation_boundary(number == len(microbatches))
            with self.plan.precision.autocast(token_count.device) if self.state is None else nullcontext():
                loss = self.engine(tokens_BS, targets_BS)
            self.engine.backward(loss * (factor / token_count), scale_wrt_gas=False)
            total = total + loss.detach()
        return total

    def clip_and_update(self, rate: float) -> Tensor:
        """Clip, step, and in stages 1 and 2 gather the parameters that the others have updated."""
        set_learning_rate(self.optimizer, rate)
        if self.state is None:
            norm = clip_gradients(self.model, self.plan.args.clip_norm)
            self.engine.step()
            return norm
        return step_under_zero(self.engine, self.plan.world.device)

    def kept(self) -> Kept:
        """Bytes that this rank holds between two steps."""
        return kept_bytes(self.model, self.optimizer) if self.state is None else self.state.kept()

    def checkpoint_state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Model and optimizer by name and shape, as every technique saves them."""
        if self.state is None:
            return torch_state(self.model, self.optimizer)
        return self.state.model(), self.state.optimizer()

    def state_was_loaded(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Compute with what a checkpoint held."""
        if self.state is None:
            set_torch_state(self.model, self.optimizer, model, optimizer)
        else:
            self.state.loaded(optimizer)


def step_under_zero(engine: Any, device: torch.device) -> Tensor:
    """Clip and step; gives the gradient's norm of before, infinite after an overflow, for which no step was made."""
    engine.step()
    # After an overflow it has left out the step and says the norm of an earlier one.
    norm = math.inf if engine.optimizer.overflow else engine.get_global_grad_norm()
    return torch.as_tensor(norm, dtype=torch.float32, device=device)


def fill(state: ZeroState, model: Transformer, plan: Plan) -> None:
    """Give the parameters their initial values, in float32: ZeRO itself would begin with what bfloat16 left of them."""
    if plan.resume_from is None and plan.args.init_from:
        load_pretrained(model, plan.args.init_from, state.model())
    else:
        for name, shape in state.shapes.items():
            state.put(name, initial_values(name, shape, plan.size.layers, plan.args.seed, plan.world.device))
    state.compute_with_it()


def show(config: dict[str, Any], directory: Path, world: World) -> None:
    """Rank 0 prints the configuration and leaves it in the run directory."""
    if world.is_first:
        text = json.dumps(config, indent=2)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        say(f"{CONFIG_FILE}: {text}")


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
