"""Arguments of `ch2_overhead`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument
from recipes.lib.model_sizes import SIZES


@dataclass(frozen=True, kw_only=True)
class OverheadArgs:
    """Which strategies, for which models."""

    strategies: list[str] = argument(
        ["ddp", "full_shard", "shard_grad_op"],
        "how the model is spread over the ranks",
        ("ddp", "full_shard", "shard_grad_op"),
    )
    models: list[str] = argument(["tiny", "small"], "sizes of the model", tuple(SIZES))
    sequence_length: int = argument(128, "tokens per sequence", minimum=1)
    batch_size: int = argument(2, "sequences per forward pass on each rank", minimum=1)
    dtype: str = argument(
        "auto",
        "of the computation: auto is bfloat16 on a GPU, float32 on a CPU",
        ("auto", "float32", "bfloat16"),
    )
    trials: int = argument(5, "trials of each measurement; the median counts, the spread is shown", minimum=2)
    budget: float = argument(0.2, "seconds of a trial; short calls are repeated so long", above=0)
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))
