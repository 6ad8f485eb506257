"""Arguments of `ch5_debug`."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.lib.arguments import argument

FAULTS = (
    "batch_sizes",
    "parameter_outside",
    "overflow_loop",
    "refused_optimizer",
    "missing_compiler",
)


@dataclass(frozen=True, kw_only=True)
class DebugArgs:
    """Which fault, and where."""

    fault: str = argument("all", "what goes wrong; all is one after another", ("all", *FAULTS))
    rank: int = argument(1, "overflow_loop: the rank whose gradient overflows", minimum=0)
    device: str = argument("auto", "auto is the GPU where there is one", ("auto", "cpu", "cuda"))
