"""Arguments of `ch4_compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.lib.arguments import ArgumentError, TrainArgs, argument, arguments_of

STRATEGIES = ("ddp", "shard_grad_op", "full_shard", "hybrid_shard")
"""By what a rank keeps, from all to least."""
ZERO = ("zero1", "zero2", "zero3")
"""DeepSpeed's (chapter 5), where it is installed: shares the optimizer's state, gradients too, parameters too."""
_OF_SAVING = ("log_every", "save_every", "keep", "keep_every", "async_save")


@dataclass(frozen=True, kw_only=True)
class CompareArgs(TrainArgs):
    """Which strategies, for how many steps; the rest is every strategy's."""

    recipe: ClassVar[str] = "ch4_compare"

    strategies: list[str] = argument(
        list(STRATEGIES),
        "what is compared, in this order; the first is what the others must equal; zero1 to zero3 are DeepSpeed's",
        (*STRATEGIES, *ZERO),
    )
    steps: int = argument(10, "optimizer steps of each strategy", minimum=2)
    untimed: int = argument(
        3, "of those, first steps that are not timed: they allocate and compile", minimum=1
    )
    shard_size: int = argument(
        0,
        "hybrid_shard: ranks that share one copy; 0 is one node's ranks, on one node half of them",
        minimum=0,
    )

    def __post_init__(self) -> None:
        """Refuse what would be ignored. Raises ArgumentError."""
        super().__post_init__()
        known = arguments_of(CompareArgs)
        for name in _OF_SAVING:
            if getattr(self, name) != known[name].default:
                problem = f"{self.recipe} measures, and saves no checkpoint"
                raise ArgumentError(name, getattr(self, name), problem)
        if self.untimed >= self.steps:
            raise ArgumentError(
                "untimed", self.untimed, f"wants less than steps={self.steps}: none would be timed"
            )
        if not self.strategies:
            raise ArgumentError("strategies", "", f"wants one or more of {', '.join((*STRATEGIES, *ZERO))}")
        twice = [name for name in self.strategies if self.strategies.count(name) > 1]
        if twice:
            raise ArgumentError("strategies", ",".join(self.strategies), f"names {twice[0]} twice")
        if self.zero and self.dtype == "float64":
            raise ArgumentError(
                "dtype", "float64", f"{self.zero[0]} keeps its parameters in float32; nearest: float32"
            )
        if self.shard_size and "hybrid_shard" not in self.strategies:
            raise ArgumentError("shard_size", self.shard_size, "wants hybrid_shard among the strategies")

    @property
    def zero(self) -> list[str]:
        """Those that are DeepSpeed's."""
        return [name for name in self.strategies if name in ZERO]

    def check_ranks(self, ranks: int, ranks_per_node: int) -> None:
        """Refuse a shard_size that does not divide the ranks. Raises ArgumentError."""
        if self.shard_size and ranks % self.shard_size:
            raise ArgumentError(
                "shard_size", self.shard_size, f"wants a divisor of {ranks}, the number of ranks"
            )
