"""Arguments of `ch2_tensor_parallel`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class TensorParallelArgs(TrainArgs):
    """Over how many ranks each matrix is split, and by whom."""

    tensor_parallel: int = argument(
        2,
        "ranks that share each matrix; of the ranks, so many neighbours make one copy of the model",
        minimum=1,
    )
    by: str = argument(
        "hand",
        "hand: slices and messages by hand; dtensor: by torch's; compare: times both beside data parallelism, and "
        "trains nothing",
        ("hand", "dtensor", "compare"),
    )
    sequence_parallel: bool = argument(
        False, "between the split parts, each rank keeps a part of the sequence instead of a copy of it"
    )
    trials: int = argument(
        5, "by=compare: trials of each measurement; the median counts, the spread is shown", minimum=2
    )
    budget: float = argument(1.0, "by=compare: seconds of a trial; short steps are repeated so long", above=0)

    def __post_init__(self) -> None:
        """Refuse what cannot be split. Raises ArgumentError."""
        size, ranks = SIZES[self.model], self.tensor_parallel
        for count, what in ((size.heads, "query heads"), (size.kv_heads, "key/value heads")):
            if count % ranks:
                problem = f"wants a divisor of {count}, the {what} of {self.model}: each rank has whole heads"
                raise ArgumentError("tensor_parallel", ranks, problem)
        if (self.sequence_parallel or self.by == "compare") and self.sequence_length % ranks:
            problem = (
                f"wants a multiple of tensor_parallel={ranks}: each rank has an equal part of the sequence"
            )
            raise ArgumentError("sequence_length", self.sequence_length, problem)
