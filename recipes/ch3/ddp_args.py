"""Arguments of `ch3_ddp`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import TrainArgs, argument


@dataclass(frozen=True, kw_only=True)
class DdpArgs(TrainArgs):
    """What DistributedDataParallel takes beside the rest."""

    bucket_mb: int = argument(
        25, "MiB of gradients that are reduced together; larger is fewer collectives, less overlap", minimum=1
    )
    gradient_as_bucket_view: bool = argument(
        True, "gradients live in the buckets that are reduced: saves one copy of them in memory"
    )
