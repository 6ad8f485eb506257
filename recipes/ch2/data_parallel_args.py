"""Arguments of `ch2_data_parallel`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import ArgumentError, TrainArgs, argument


@dataclass(frozen=True, kw_only=True)
class DataParallelArgs(TrainArgs):
    """How the copies' gradients come together."""

    variant: str = argument(
        "overlapped",
        "flat: one message of all gradients after the backward pass; bucketed: several; overlapped: each as soon as "
        "its gradients are there; compare: times all of them and torch's DDP, and trains nothing",
        ("flat", "bucketed", "overlapped", "compare"),
    )
    bucket_mb: float = argument(
        1.0, "MiB of gradients in a message; 25, which is DDP's own, suits large models", above=0
    )
    broadcast: bool = argument(
        True,
        "start from rank 0's weights everywhere; false: each rank from its own, to see what becomes of it",
    )
    trials: int = argument(
        5, "variant=compare: trials of each measurement; the median counts, the spread is shown", minimum=2
    )
    budget: float = argument(
        1.0, "variant=compare: seconds of a trial; short steps are repeated so long", above=0
    )

    def __post_init__(self) -> None:
        """Refuse to save copies that differ: a checkpoint holds one of them. Raises ArgumentError."""
        if not self.broadcast and self.save_every >= 0:
            raise ArgumentError(
                "broadcast", "false", "wants save_every=-1: a checkpoint holds one copy, and they differ"
            )
