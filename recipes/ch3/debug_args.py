"""Arguments of `ch3_debug`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument

FAULTS = (
    "mismatched_shapes",
    "unused_parameter",
    "skipped_collective",
    "deadlock",
    "straggler",
    "nan_on_one_rank",
)


@dataclass(frozen=True, kw_only=True)
class DebugArgs:
    """Which fault, where, and how long a rank may stand still."""

    fault: str = argument("all", "what goes wrong; all is one after another", ("all", *FAULTS))
    rank: int = argument(1, "the rank on which it goes wrong", minimum=0)
    step: int = argument(4, "the optimizer step in which it goes wrong", minimum=3)
    seconds: float = argument(
        5.0, "how long a step may take until a rank gives up and tells where it is", minimum=1
    )
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))
