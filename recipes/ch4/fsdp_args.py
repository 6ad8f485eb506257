"""Arguments of `ch4_fsdp`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument


@dataclass(frozen=True, kw_only=True)
class FsdpArgs(TrainArgs):
    """What fully sharded data parallelism takes beside the rest."""

    strategy: str = argument(
        "full_shard",
        "full_shard frees a layer after its forward pass; shard_grad_op keeps it until its backward pass; "
        "hybrid_shard shards within a group of ranks and replicates over groups",
        ("full_shard", "shard_grad_op", "hybrid_shard"),
    )
    shard_size: int = argument(0, "hybrid_shard: ranks that share one copy; 0 is one node's ranks", minimum=0)
    param_dtype: str = argument(
        "auto",
        "of kept parameters and moments: auto is float32; bfloat16 halves them and loses small updates",
        ("auto", "bfloat16"),
    )
    reduce_dtype: str = argument(
        "auto",
        "of gradients while ranks sum them: auto is float32; bfloat16 halves the traffic",
        ("auto", "bfloat16"),
    )
    cpu_offload: bool = argument(False, "keep parameters and moments in host memory, and update them there")
    defer_reduction: bool = argument(
        False, "with microbatches, reduce gradients once per step: less traffic, whole gradients in memory"
    )

    def __post_init__(self) -> None:
        """Refuse a shard_size that would be ignored. Raises ArgumentError."""
        if self.shard_size and self.strategy != "hybrid_shard":
            raise ArgumentError("shard_size", self.shard_size, "wants strategy=hybrid_shard")
