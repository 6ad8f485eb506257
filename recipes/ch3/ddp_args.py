"""Arguments of `ch3_ddp`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument

UNTRACED_STEPS = 3
"""The first steps make the buckets, the kernels and the connections: they say nothing of the later ones."""


@dataclass(frozen=True, kw_only=True)
class DdpArgs(TrainArgs):
    """What DistributedDataParallel takes beside the rest."""

    dtype: str = argument(
        "auto",
        "of the computation: auto is bfloat16 on a GPU, float32 on a CPU; float16 scales the loss",
        ("auto", "float32", "bfloat16", "float16", "float64"),
    )
    bucket_mb: float = argument(
        25.0, "MiB of gradients that are reduced together; larger is fewer collectives, less overlap", above=0
    )
    gradient_as_bucket_view: bool = argument(
        True, "gradients live in the buckets that are reduced: saves one copy of them in memory"
    )
    compression: str = argument(
        "none",
        "how gradients travel: rounded to 16 bits (bfloat16 wants NCCL), or as PowerSGD's low-rank factors",
        ("none", "float16", "bfloat16", "power_sgd"),
    )
    power_sgd_rank: int = argument(
        2, "rank of PowerSGD's factors: larger is nearer, and more bytes", minimum=1
    )
    power_sgd_start: int = argument(
        10, "steps whose gradients travel whole before PowerSGD begins, also after a resume", minimum=2
    )
    static_graph: bool = argument(
        False, "promise that every step uses the same parameters: DDP stops looking for unused ones"
    )
    optimizer_sharding: bool = argument(
        False,
        "each rank updates a part of the parameters and keeps AdamW's moments of that part only (ZeRO 1)",
    )
    profile: int = argument(
        0,
        f"steps to trace after the first {UNTRACED_STEPS}: how much of the all-reduces is hidden",
        minimum=0,
    )

    def __post_init__(self) -> None:
        if self.dtype == "float16" and self.compression == "power_sgd":
            problem = (
                "an overflow of dtype=float16 would stay in its error feedback for ever; take dtype=bfloat16"
            )
            raise ArgumentError("compression", self.compression, problem)
        if self.profile and self.steps < self.profile + UNTRACED_STEPS:
            problem = f"wants steps={self.profile + UNTRACED_STEPS} or more; steps={self.steps}"
            raise ArgumentError("profile", self.profile, problem)
