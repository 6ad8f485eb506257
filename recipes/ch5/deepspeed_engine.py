"""What ZeRO and the mixture have in common: a model in DeepSpeed's engine, in the training loop of all recipes."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.ch5.deepspeed_whole_state import WholeState
from recipes.lib.distributed import World
from recipes.lib.memory import Kept
from recipes.lib.metrics import say
from recipes.lib.model import initial_values
from recipes.lib.optimizer import set_learning_rate
from recipes.lib.pretrained import load_pretrained
from recipes.lib.training import Plan
from recipes.lib.zero_state import ZeroState

CONFIG_FILE = "deepspeed.json"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model in DeepSpeed's engine."""

    engine: Any
    plan: Plan
    config: dict[str, Any]
    """What the engine was told."""
    stage: int
    state: ZeroState | WholeState

    @property
    def model(self) -> nn.Module:
        """The model that the engine has."""
        module: nn.Module = self.engine.module
        return module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW that the engine has, over this rank's part."""
        optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        return optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        """ZeRO has parameters that have been rounded, and others in float32 beside them; without it, torch rounds."""
        return nullcontext() if self.stage else self.plan.precision.autocast(self.plan.world.device)

    def clip_and_update(self, rate: float) -> Tensor:
        """Clip, step, and in stages 1 and 2 gather the parameters that the others have updated.

        Gives the gradient's norm of before, infinite after an overflow, for which no step was made.
        """
        set_learning_rate(self.optimizer, rate)
        if self.stage == 0:
            norm = self.clip()
            self.engine.step()
            return norm
        self.engine.step()
        # After an overflow it has left out the step and says the norm of an earlier one.
        found = math.inf if self.engine.optimizer.overflow else self.engine.get_global_grad_norm()
        return torch.as_tensor(found, dtype=torch.float32, device=self.plan.world.device)

    def clip(self) -> Tensor:
        """Clip the gradients where there is no ZeRO that does it with its step; gives their norm of before."""
        raise NotImplementedError

    def kept(self) -> Kept:
        """Bytes that this rank holds between two steps."""
        return self.state.kept()

    def checkpoint_state(self) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Model and optimizer by name and shape, as every technique saves them."""
        return self.state.model(), self.state.optimizer()

    def state_was_loaded(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Compute with what a checkpoint held."""
        self.state.loaded(model, optimizer)


def start(
    deepspeed: Any, model: nn.Module, groups: list[dict[str, Any]], config: dict[str, Any], plan: Plan
) -> tuple[Any, ZeroState | WholeState]:
    """The engine over the model, and where its parameters and moments are. They get their initial values: in float32,
    ZeRO itself would begin with what bfloat16 left of them."""
    # Not by LOCAL_RANK, DeepSpeed's own way: where Slurm shows each task its own GPU only, that is number 0.
    place = types.SimpleNamespace(device_rank=plan.world.device.index or 0)
    engine, *_ = deepspeed.initialize(args=place, model=model, model_parameters=groups, config=config)
    stage = config["zero_optimization"]["stage"]
    state = ZeroState(model, engine.optimizer, stage) if stage else WholeState(model, engine.basic_optimizer)
    if plan.args.init_from and plan.resume_from is None:
        values = state.model()
        load_pretrained(model, plan.args.init_from, values)
        state.take(values)
    else:
        layers, seed, device = plan.size.layers, plan.args.seed, plan.world.device
        state.fill(lambda name, shape: initial_values(name, shape, layers, seed, device))
    return engine, state


def show(config: dict[str, Any], directory: Path, world: World) -> None:
    """Rank 0 prints the configuration and leaves it in the run directory."""
    if world.is_first:
        text = json.dumps(config, indent=2)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        say(f"{CONFIG_FILE}: {text}")
