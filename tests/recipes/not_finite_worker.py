"""Two ranks train with each technique, and one of them makes a number that is none: what do the ranks say of it?

torchrun --nproc-per-node 2 -m tests.recipes.not_finite_worker FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.lib.distributed import World, joined
from recipes.lib.finite import NotFinite
from recipes.lib.model import Head, Transformer
from recipes.lib.training import train
from tests.recipes.parity import Case, build, plan_for

CULPRIT, STEP = 1, 4
"""The rank that is wrong, and its step."""
MICROBATCHES = 2
TECHNIQUES = ("ddp", "fsdp")
PLACES = ("loss", "gradient")


def plant(model: nn.Module, place: str, world: World) -> None:
    """Spoil the first microbatch of one step on one rank: its loss, or a gradient on its way back."""
    passes = 0

    def spoil(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if world.rank == CULPRIT and passes == (STEP - 1) * MICROBATCHES + 1:
            if place == "loss":
                return output * float("nan")
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    for module in model.modules():
        if isinstance(module, Head if place == "loss" else Transformer):
            module.register_forward_hook(spoil)


def main() -> None:
    folder, said = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    with joined("cpu") as world:
        for technique in TECHNIQUES:
            for place in PLACES:
                name = f"{technique}-{place}"
                # Nobody looks at the loss of step 4: the checkpoint of step 6 would be the next to be saved.
                args = {
                    "batch_size": 8,
                    "microbatch_size": 2,
                    "steps": 6,
                    "log_every": 6,
                    "save_every": 3,
                    "dtype": "float32",
                }
                plan = plan_for(Case(name, technique, 2, args=args), folder, world)
                plan.run_directory.mkdir(exist_ok=True)
                built = build(Case(name, technique, 2, args=args), plan)
                plant(built.model, place, world)
                try:
                    train(plan, built)
                except NotFinite as error:
                    said[name] = str(error)
        (folder / f"said-{world.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
