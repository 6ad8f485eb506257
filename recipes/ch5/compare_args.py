"""Arguments of `ch5_compare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from recipes.ch4.compare_args import STRATEGIES, ZERO, CompareArgs
from recipes.ch5.megatron_args import MegatronArgs
from recipes.lib.arguments import TrainArgs, argument

CHOICES = (*STRATEGIES, *ZERO, "megatron")


@dataclass(frozen=True, kw_only=True)
class Chapter5CompareArgs(CompareArgs):
    """Which stacks; the rest is what every one of them gets, but for Megatron-Core's own sizes."""

    recipe: ClassVar[str] = "ch5_compare"

    strategies: list[str] = argument(
        ["full_shard", *ZERO, "megatron"],
        "what is compared, in this order; the first is what the others must equal; zero1 to zero3 are DeepSpeed's, "
        "megatron is Megatron-Core",
        CHOICES,
    )
    tensor_parallel: int = argument(1, "megatron: ranks that split every matrix", minimum=1)
    pipeline_parallel: int = argument(1, "megatron: ranks that have a part of the layers each", minimum=1)

    def __post_init__(self) -> None:
        """Refuse what would be ignored, and what Megatron-Core cannot do. Raises ArgumentError."""
        super().__post_init__()
        if "megatron" in self.strategies:
            megatron_args(self)

    def check_ranks(self, ranks: int, ranks_per_node: int) -> None:
        """Refuse sizes that do not divide the ranks. Raises ArgumentError."""
        super().check_ranks(ranks, ranks_per_node)
        if "megatron" in self.strategies:
            megatron_args(self).check_ranks(ranks, ranks_per_node)


def megatron_args(args: Chapter5CompareArgs) -> MegatronArgs:
    """What Megatron-Core gets. It compiles what it can by itself. Raises ArgumentError for what it cannot do."""
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
    own = {"compile": False, "async_save": False}
    return MegatronArgs(
        **{**shared, **own},
        tensor_parallel=args.tensor_parallel,
        pipeline_parallel=args.pipeline_parallel,
    )
