"""A real recipe of which one rank misbehaves, for tests: the recipes themselves hold no code for this.

    python -m tests.box_runs.faulty recipe=recipes.ch4.fsdp fault=slow_input faulty_rank=1 steps=20

`slow_input` lets that rank wait half a second for each batch, as for a slow disk; `slow_compute` lets each layer's
forward pass take ten times as long and burn the CPU meanwhile; `hang` stops it for ever inside of a layer, at
`faulty_step` of the first attempt. `none` is the recipe as it is.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

from recipes.lib import training
from recipes.lib.dataset import Dataset
from recipes.lib.model import Block

SLOW_INPUT_SECONDS = 0.5
SLOWNESS = 10.0


def main() -> None:
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    recipe, fault = words.pop("recipe"), words.pop("fault")
    rank, step = int(words.pop("faulty_rank", "-1")), int(words.pop("faulty_step", "-1"))
    sys.argv[1:] = [f"{key}={value}" for key, value in words.items()]
    if int(os.environ["RANK"]) == rank and fault != "none":
        {"slow_input": slow_input, "slow_compute": slow_compute, "hang": lambda: hang_at(step)}[fault]()
    importlib.import_module(recipe).main()


def slow_input() -> None:
    load = Dataset.batch

    def batch(self: Dataset, *args: Any) -> Any:
        time.sleep(SLOW_INPUT_SECONDS)
        return load(self, *args)

    Dataset.batch = batch  # type: ignore[method-assign]


def slow_compute() -> None:
    compute = Block.forward

    def forward(self: Block, *args: Any) -> Any:
        start = time.perf_counter()
        output = compute(self, *args)
        end = start + SLOWNESS * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return output

    Block.forward = forward  # type: ignore[method-assign]


def hang_at(step: int) -> None:
    do_step, compute = training.optimizer_step, Block.forward
    now = [0]

    def optimizer_step(plan: Any, technique: Any, number: int, *rest: Any) -> Any:
        now[0] = number
        return do_step(plan, technique, number, *rest)

    def forward(self: Block, *args: Any) -> Any:
        if now[0] == step and os.environ["ATTEMPT"] == "1":
            stuck_in_a_layer()
        return compute(self, *args)

    training.optimizer_step = optimizer_step
    Block.forward = forward  # type: ignore[method-assign]


def stuck_in_a_layer() -> None:
    time.sleep(1000)


if __name__ == "__main__":
    main()
